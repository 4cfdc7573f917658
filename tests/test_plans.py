"""Calls that are alike share a plan, and no others do: fastbn/arguments/plans.py.

A plan of another call would read memory with wrong strides, or skip a check. So each test makes a good call first, whose plan is then at
hand, and a call second that may not take it. Contexts, which take their plan along, are in test_contexts.py.
"""

import threading

import checks
import inputs
import numpy as np
import pytest
import subprocesses

import fastbn
from fastbn.arguments import plans

SHAPE = (4, 6, 6)  # any axis but the first may hold the six channels


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The cache of plans, empty."""
    monkeypatch.setattr(plans, "_plans", {})
    return plans._plans


def arguments(**changes):
    """What a forward takes: new arrays of the same values each time. Views, as many of the arrays in these tests are."""
    gamma, beta, mean, var = inputs.parameters(6)
    given = {"x": inputs.normal(SHAPE), "gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var}
    return {name: a[:] for name, a in given.items()} | changes


def gradient_of(x, seed=1):
    return inputs.normal(x.shape, checks.native(x.dtype), seed=seed)


def results(**given):
    """All that a forward and its backward give, and the running statistics that the forward has moved."""
    y, ctx = fastbn.batch_norm_forward(**given)
    back = fastbn.batch_norm_backward(gradient_of(given["x"]), ctx)
    return y, *back, ctx.mean, ctx.var, given["running_mean"], given["running_var"]


def laid(layout, a):
    """An array in one of the layouts of inputs.py."""
    return inputs.LAYOUTS[layout][0](a)


def x_laid(layout):
    return laid(layout, inputs.normal(SHAPE))


def read_only(a):
    a = a.copy()
    a.setflags(write=False)
    return a


# ------------------------------------------------------------------------------------------------------------------- alike

ALIKE = {
    "other arrays": {},
    "other values": {"x": inputs.normal(SHAPE, seed=7)[:]},
    "numbers": {"momentum": 0.5, "eps": 1e-3, "unbiased": False},
    "axis of NumPy": {"axis": np.int64(1)},
    "training is 1": {"training": 1},
    "training is a word": {"training": "yes"},
    "training of NumPy": {"training": np.bool_(True)},
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_calls_that_are_alike_share_a_plan(change, known):
    _, first = fastbn.batch_norm_forward(**arguments())
    _, second = fastbn.batch_norm_forward(**arguments(**change))
    assert second.plan is first.plan
    assert len(known) == 1
    dy = gradient_of(first.x)
    fastbn.batch_norm_backward(dy, first)
    fastbn.batch_norm_backward(dy.copy(), second)
    assert len(first.plan.backwards) == 1


def test_a_training_that_is_false_in_any_way_is_one_kind_of_call(known):
    for training in (False, 0, "", np.bool_(False), None, []):
        assert not fastbn.batch_norm_forward(**arguments(training=training))[1].training
    assert len(known) == 1
    assert fastbn.batch_norm_forward(**arguments())[1].training


def test_a_plan_holds_no_array():
    """Else the cache would keep a user's memory alive."""
    given = arguments(residual=inputs.normal(SHAPE), sample_weight=np.ones(4), out=np.empty(SHAPE, np.float32))
    _, ctx = fastbn.batch_norm_forward(**given)
    fastbn.batch_norm_backward(gradient_of(ctx.x), ctx)
    for a in given.values():
        assert not checks.held_bytes(ctx.plan, a)[1]


# ------------------------------------------------------------------------------------------------------------------ unlike

# Made anew for each call: training writes into some of them.
UNLIKE = {
    "shape": lambda: {"x": inputs.normal((4, 6, 9))},
    "dimensions": lambda: {"x": inputs.normal((4, 6, 6, 1))},
    "strides of rows": lambda: {"x": x_laid("every second sample")},
    "strides of channels": lambda: {"x": x_laid("channel slice")},
    "order of axes": lambda: {"x": x_laid("channels last view")},
    "negative strides": lambda: {"x": x_laid("negative strides")},
    "dtype": lambda: {"x": inputs.normal(SHAPE, np.float64)},
    "half": lambda: {"x": inputs.normal(SHAPE).astype(np.float16)},
    "byte order": lambda: {"x": x_laid("big-endian")},
    "alignment": lambda: {"x": x_laid("unaligned")},
    "axis 2": lambda: {"axis": 2},
    "frozen": lambda: {"training": False},
    "activation": lambda: {"activation": "relu"},
    "no gamma": lambda: {"gamma": None},
    "no beta": lambda: {"beta": None},
    "no running statistics": lambda: {"running_mean": None, "running_var": None},
    "residual": lambda: {"residual": inputs.normal(SHAPE, seed=2)},
    "residual in another order": lambda: {"residual": laid("fortran", inputs.normal(SHAPE, seed=2))},
    "a weight a sample": lambda: {"sample_weight": np.array([1.0, 2.0, 0.0, 1.5])},
    "a weight a position": lambda: {"sample_weight": np.arange(24.0).reshape(4, 6)},
    "a mask": lambda: {"sample_weight": np.arange(4) > 0},
    "out": lambda: {"out": np.empty(SHAPE, np.float32)},
    "out in another order": lambda: {"out": np.empty(SHAPE, np.float32, order="F")},
}
for place, name in enumerate(("gamma", "beta", "running_mean", "running_var")):
    for what, change in {
        "dtype": lambda v: v.astype(np.float64),
        "strides": lambda v: np.repeat(v, 2)[::2],
        "byte order": lambda v: laid("big-endian", v),
        "alignment": lambda v: laid("unaligned", v),
    }.items():
        UNLIKE[f"{what} of {name}"] = lambda n=name, p=place, c=change: {n: c(inputs.parameters(6)[p])}


@pytest.mark.parametrize("change", UNLIKE.values(), ids=UNLIKE)
def test_calls_that_differ_do_not(change, known):
    """Bit for bit what they give where no other call has been made, in either order."""
    expected = results(**arguments(**change()))
    assert len(known) == 1
    usual = results(**arguments())
    assert len(known) == 2
    assert checks.same_results(results(**arguments(**change())), expected)
    known.clear()
    assert checks.same_results(results(**arguments()), usual)
    assert checks.same_results(results(**arguments(**change())), expected)
    assert len(known) == 2


def strided(v, step):
    return np.repeat(v, step)[::step]


# Two changes that differ in a single fact of one array: not in its flags too, as a slice and a contiguous array do.
ONE_FACT = {
    "shape": (lambda: {"x": inputs.normal((7, 6, 6))[:4]}, lambda: {"x": inputs.normal((7, 6, 6))[:5]}),
    "strides": (lambda: {"x": inputs.normal((12, 6, 6))[::2][:4]}, lambda: {"x": inputs.normal((12, 6, 6))[::3]}),
    "strides of gamma": tuple(lambda k=k: {"gamma": strided(inputs.parameters(6)[0], k)} for k in (2, 3)),
    "strides of running_mean": tuple(lambda k=k: {"running_mean": strided(inputs.parameters(6)[2], k)} for k in (2, 3)),
    "dtype of gamma": tuple(lambda d=d: {"gamma": inputs.parameters(6)[0].astype(d)} for d in (">f4", "<f4")),
    "alignment": (lambda: {"x": inputs.normal(SHAPE)[:]}, lambda: {"x": x_laid("unaligned")}),
    "dtype of weights": tuple(lambda d=d: {"sample_weight": np.arange(4).astype(d)} for d in (np.int64, np.float64)),
}


@pytest.mark.parametrize("changes", ONE_FACT.values(), ids=ONE_FACT)
def test_calls_that_differ_in_one_fact(changes, known):
    expected = []
    for change in changes:
        known.clear()
        expected.append(results(**arguments(**change())))
    for order in (0, 1), (1, 0):
        known.clear()
        for k in order:
            assert checks.same_results(results(**arguments(**changes[k]())), expected[k])
        assert len(known) == 2


def test_operations_have_plans_of_their_own(known):
    x, (gamma, beta, mean, var) = inputs.normal(SHAPE), inputs.parameters(6)
    forward = fastbn.batch_norm_forward(x, gamma, beta)[0]
    fastbn.batch_norm_forward_apply(x, fastbn.moments(x), gamma, beta)
    fastbn.batch_norm_inference(x, gamma, beta, mean, var)
    frozen = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=False)[0]
    assert len(known) == 5
    assert checks.same_bits(fastbn.batch_norm_inference(x, gamma, beta, mean, var), frozen)
    assert checks.same_bits(fastbn.batch_norm_forward(x, gamma, beta)[0], forward)
    assert len(known) == 5


OTHER_DY = {
    "strides": lambda dy: laid("channel slice", dy),
    "order of axes": lambda dy: laid("channels last view", dy),
    "byte order": lambda dy: laid("big-endian", dy),
    "alignment": lambda dy: laid("unaligned", dy),
}


@pytest.mark.parametrize("layout", ["contiguous", "axis -1"])
@pytest.mark.parametrize("change", OTHER_DY.values(), ids=OTHER_DY)
def test_backwards_that_differ(change, layout):
    x, axis = inputs.arrange(layout, inputs.normal(SHAPE))
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], axis=axis)
    dy = gradient_of(x)
    expected = fastbn.batch_norm_backward(dy, ctx)
    assert checks.same_results(fastbn.batch_norm_backward(change(dy), ctx), expected)
    out = np.empty_like(dy)
    assert checks.same_results(fastbn.batch_norm_backward(dy, ctx, out=out), expected)
    assert checks.same_results(fastbn.batch_norm_backward(change(dy), ctx, out=out), expected)
    assert len(ctx.plan.backwards) == 4
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    fastbn.batch_norm_backward_apply(dy, ctx, *sums)
    assert len(ctx.plan.backwards) == 6
    assert checks.same_results(fastbn.batch_norm_backward(dy, ctx), expected)
    assert len(ctx.plan.backwards) == 6


# ------------------------------------------------------------------------------------------- checks that a plan does not skip


@pytest.mark.parametrize("name", ["running_mean", "running_var", "out"])
def test_what_is_written_may_have_become_read_only(name):
    given = arguments(out=np.empty(SHAPE, np.float32))
    fastbn.batch_norm_forward(**given)
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        fastbn.batch_norm_forward(**given | {name: read_only(given[name])})
    given[name].setflags(write=False)  # the same object
    before = checks.snapshot(*given.values())
    with pytest.raises(ValueError, match=f"{name} is read-only"):
        fastbn.batch_norm_forward(**given)
    checks.assert_unchanged(before)
    given[name].setflags(write=True)
    fastbn.batch_norm_forward(**given)


def test_out_of_a_backward_may_have_become_read_only():
    _, ctx = fastbn.batch_norm_forward(inputs.normal(SHAPE))
    dy, out = gradient_of(ctx.x), np.empty(SHAPE, np.float32)
    fastbn.batch_norm_backward(dy, ctx, out=out)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out is read-only"):
        fastbn.batch_norm_backward(dy, ctx, out=out)


@pytest.mark.parametrize("axis", [True, 1.0, np.bool_(True), np.float64(1)], ids=repr)
def test_an_axis_that_equals_one_is_still_refused(axis):
    x, (gamma, beta, mean, var) = inputs.normal(SHAPE), inputs.parameters(6)
    calls = (
        lambda **k: fastbn.batch_norm_forward(x, **k),
        lambda **k: fastbn.batch_norm_inference(x, gamma, beta, mean, var, **k),
        lambda **k: fastbn.moments(x, **k),
    )
    for call in calls:
        call(axis=1)
        with pytest.raises(TypeError, match=r"axis is .* pass a whole number"):
            call(axis=axis)


@pytest.mark.parametrize("activation", [False, 0, "", "RELU", [], ["relu"], np.array("relu")], ids=repr)
def test_other_activations_are_refused(activation):
    for good in (None, "relu"):
        fastbn.batch_norm_forward(**arguments(activation=good))
    with pytest.raises(ValueError, match="activation is"):
        fastbn.batch_norm_forward(**arguments(activation=activation))


REFUSED = {
    "list": (np.ndarray.tolist, "is a list"),
    "masked array": (np.ma.masked_array, "is a masked array"),
    "integers": (lambda a: a.astype(np.int32), "has dtype int32"),
    "objects": (lambda a: a.astype(object), "has dtype object"),
    "bytes": (np.ndarray.tobytes, "is a bytes"),
    "another shape": (lambda a: a[:-1], "has shape"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["x", "gamma", "beta", "running_mean", "running_var", "residual", "out"])
def test_other_kinds_after_a_good_call(name, change, words):
    given = arguments(residual=inputs.normal(SHAPE), out=np.empty(SHAPE, np.float32))
    fastbn.batch_norm_forward(**given)
    given[name] = change(given[name])
    words = f"^{name} {words}"
    if name == "x":
        words = words.replace("^x has shape", "residual has shape")  # a smaller x is good, but for the others
    with pytest.raises((TypeError, ValueError), match=words):
        fastbn.batch_norm_forward(**given)


@pytest.mark.parametrize(("change", "words"), [*REFUSED.values(), (lambda a: None, "is None")], ids=[*REFUSED, "None"])
def test_other_kinds_of_dy_after_a_good_call(change, words):
    _, ctx = fastbn.batch_norm_forward(inputs.normal(SHAPE))
    dy = gradient_of(ctx.x)
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    calls = (
        lambda dy: fastbn.batch_norm_backward(dy, ctx),
        lambda dy: fastbn.batch_norm_backward_reduce(dy, ctx),
        lambda dy: fastbn.batch_norm_backward_apply(dy, ctx, *sums),
    )
    for call in calls:
        call(dy)
        with pytest.raises((TypeError, ValueError), match=f"^dy {words}"):
            call(change(dy))


def test_x_is_none_after_a_good_call():
    fastbn.batch_norm_forward(**arguments())
    fastbn.moments(inputs.normal(SHAPE))
    with pytest.raises(TypeError, match=r"^x is None"):
        fastbn.batch_norm_forward(**arguments(x=None))
    with pytest.raises(TypeError, match=r"^x is None"):
        fastbn.moments(None)


def test_what_equals_the_facts_of_an_array_is_not_taken_for_it():
    """In a process of its own: taken for an array, it ends the process."""
    out = subprocesses.run("""
import inputs, fastbn
x, (gamma, *_) = inputs.normal((4, 6, 6)), inputs.parameters(6)
_, ctx = fastbn.batch_norm_forward(x, gamma)
fastbn.batch_norm_backward(x, ctx)
fastbn.moments(x)

def facts(a):
    return a.shape, a.strides, a.dtype, a.flags.num

for call in (
    lambda: fastbn.moments(facts(x)),
    lambda: fastbn.batch_norm_forward(x, facts(gamma)),
    lambda: fastbn.batch_norm_backward(facts(x), ctx),
):
    try:
        call()
    except TypeError as error:
        print(str(error).split(";")[0].replace("builtins.", ""))
""")
    assert out.splitlines() == ["x is a tuple", "gamma is a tuple", "dy is a tuple"]


def test_subclasses_are_seen_as_plain_arrays(tmp_path, known):
    x, gamma = inputs.normal((12, 6)), inputs.parameters(6)[0]
    y, ctx = fastbn.batch_norm_forward(x, gamma)
    dy = gradient_of(x)
    expected = y, *fastbn.batch_norm_backward(dy, ctx)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    for other in (x.view(np.matrix), mapped):
        y, ctx = fastbn.batch_norm_forward(other, gamma)
        assert type(y) is np.ndarray
        for kind in (np.ndarray, type(other)):
            assert checks.same_results((y, *fastbn.batch_norm_backward(dy.view(kind), ctx)), expected)
    before = len(known)
    fastbn.batch_norm_forward(x.view(np.matrix), gamma)
    assert len(known) == before


# ------------------------------------------------------------------------------------------------------------ bounded caches


def test_the_cache_of_plans_is_bounded(known, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    shapes = [(n, 6, 6) for n in range(2, 9)]
    expected = {}
    for shape in shapes:
        known.clear()
        expected[shape] = results(**arguments(x=inputs.normal(shape)))
    known.clear()
    for shape in (*shapes, *reversed(shapes)):
        assert checks.same_results(results(**arguments(x=inputs.normal(shape))), expected[shape])
        assert 1 <= len(known) <= 3


def test_the_cache_of_backwards_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST_BACKWARDS", 2)
    _, ctx = fastbn.batch_norm_forward(inputs.normal(SHAPE), *inputs.parameters(6)[:2])
    dy = gradient_of(ctx.x)
    expected = fastbn.batch_norm_backward(dy, ctx)
    for _ in range(2):
        for layout in ("contiguous", "fortran", "channel slice", "every second sample", "channels last view"):
            assert checks.same_results(fastbn.batch_norm_backward(laid(layout, dy), ctx), expected)
            assert 1 <= len(ctx.plan.backwards) <= 2


def test_a_context_outlives_the_plans_of_its_kind(known, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 1)
    _, ctx = fastbn.batch_norm_forward(**arguments())
    expected = fastbn.batch_norm_backward(gradient_of(ctx.x), ctx)
    fastbn.moments(ctx.x)
    assert ctx.plan not in known.values()
    assert checks.same_results(fastbn.batch_norm_backward(gradient_of(ctx.x), ctx), expected)


# ----------------------------------------------------------------------------------------------------------- several threads


def in_threads(number, function):
    """What function(k) returned in each of several threads that begin together."""
    barrier, found = threading.Barrier(number), {}

    def work(k):
        barrier.wait()
        found[k] = function(k)

    team = [threading.Thread(target=work, args=(k,)) for k in range(number)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert len(found) == number, "a thread raised"
    return [found[k] for k in range(number)]


def test_two_threads_make_the_first_call_of_a_kind(known):
    for n in range(2, 40):
        given = [arguments(x=inputs.normal((n, 6, 6))) for _ in range(2)]
        first, second = in_threads(2, lambda k, given=given: results(**given[k]))
        assert checks.same_results(first, second)
        assert checks.same_results(first, results(**arguments(x=inputs.normal((n, 6, 6)))))
        assert len(known) == n - 1


def test_threads_and_a_cache_that_is_emptied_all_the_time(known, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    monkeypatch.setattr(plans, "MOST_BACKWARDS", 1)
    shapes = [(n, 6, 6) for n in range(2, 7)]
    expected = {shape: results(**arguments(x=inputs.normal(shape))) for shape in shapes}

    def many(k):
        order = (shapes[k % 5 :] + shapes[: k % 5]) * 10
        return all(checks.same_results(results(**arguments(x=inputs.normal(shape))), expected[shape]) for shape in order)

    assert in_threads(4, many) == [True] * 4
