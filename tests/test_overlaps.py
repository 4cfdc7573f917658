"""What is written may share memory with nothing else, but `out` with one input: fastbn/arguments/overlaps.py.

tests/test_errors.py has arrays that are one another, or overlap in part. Here are views: those that share an owner but no element, which
a layer of one flat parameter vector passes, and those that share memory without sharing an owner that NumPy knows.
"""

import itertools
import mmap

import checks
import inputs
import numpy as np
import pytest

import fastbn

SHAPE = (4, 6, 5, 7)
NAMES = ("gamma", "beta", "running_mean", "running_var")


def flat(order=NAMES, dtype=np.float32):
    """The parameters of six channels side by side in one vector, and views of it by name."""
    values = dict(zip(NAMES, inputs.parameters(6, dtype), strict=True))
    vector = np.concatenate([values[name] for name in order])
    return vector, {name: vector[6 * k : 6 * k + 6] for k, name in enumerate(order)}


def apart(views):
    return {name: view.copy() for name, view in views.items()}


def refused(*words):
    """The error names both arrays."""
    return pytest.raises(ValueError, match="".join(f"(?=.*{word})" for word in words))


# ----------------------------------------------------------------------------------------------------------------- one owner


@pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], ("running_mean", "gamma", "running_var", "beta")], ids=" ".join)
def test_views_of_one_vector_that_do_not_overlap(order, dtype):
    x = inputs.normal(SHAPE)
    vector, views = flat(order, dtype)
    own = apart(views)
    expected, ctx = fastbn.batch_norm_forward(x, **own)
    y, other = fastbn.batch_norm_forward(x, **views)
    assert checks.same_bits(y, expected)
    assert checks.same_bits(vector, np.concatenate([own[name] for name in order]))
    dy = inputs.normal(SHAPE, seed=1)
    for a, b in zip(fastbn.batch_norm_backward(dy, other), fastbn.batch_norm_backward(dy, ctx), strict=True):
        assert checks.same_bits(a, b)


def test_views_of_one_vector_may_be_interleaved():
    rows = np.stack(inputs.parameters(6), axis=1)  # row c: gamma, beta, running mean and running variance of channel c
    views = {name: rows[:, k] for k, name in enumerate(NAMES)}
    own = apart(views)
    x = inputs.normal(SHAPE)
    assert checks.same_bits(fastbn.batch_norm_forward(x, **views)[0], fastbn.batch_norm_forward(x, **own)[0])
    assert checks.same_bits(rows, np.stack([own[name] for name in NAMES], axis=1))


@pytest.mark.parametrize(("other", "statistic"), [(a, b) for a in NAMES for b in NAMES[2:] if a != b])
def test_views_of_one_vector_that_overlap(other, statistic):
    """By a single element, after a call in which they did not."""
    x, (vector, views) = inputs.normal(SHAPE), flat((other, statistic, *(n for n in NAMES if n not in (other, statistic))))
    fastbn.batch_norm_forward(x, **views)
    views[statistic] = vector[5:11]
    before = checks.snapshot(vector)
    with refused(statistic, other):
        fastbn.batch_norm_forward(x, **views)
    checks.assert_unchanged(before)
    fastbn.batch_norm_forward(x, **views, training=False)  # which writes nothing


def test_the_statistics_may_overlap_what_is_not_given():
    """The same vector without gamma and beta is fine, and refused again with them."""
    x, (vector, views) = inputs.normal(SHAPE), flat()
    running = {"running_mean": vector[:6], "running_var": vector[6:12]}
    fastbn.batch_norm_forward(x, **running)
    with refused("running_mean", "gamma"):
        fastbn.batch_norm_forward(x, **views | running)


@pytest.mark.parametrize("name", ["x", "residual", "sample_weight"])
def test_statistics_inside_of_data(name):
    owner = np.abs(inputs.normal((4, 6, 6))) + 1  # as weights it is of (N, H)
    data = {"x": inputs.normal((4, 6, 6)), "residual": None, "sample_weight": None}
    data[name] = owner[:, 0] if name == "sample_weight" else owner
    running = {"running_mean": np.zeros(6, np.float32), "running_var": np.ones(6, np.float32)}
    fastbn.batch_norm_forward(**data, **running)
    for statistic in running:
        before = checks.snapshot(owner)
        with refused(statistic, name):
            fastbn.batch_norm_forward(**data, **running | {statistic: owner[1, 0]})
        checks.assert_unchanged(before)
    if name == "sample_weight":  # the rest of its owner holds no weight
        fastbn.batch_norm_forward(**data, **running | {"running_mean": owner[1, 1]})


# ------------------------------------------------------------------------------------------------------------- out and views

WAYS = {
    "halves": (lambda a: a[:4], lambda a: a[4:]),
    "samples": (lambda a: a[::2], lambda a: a[1::2]),
    "from behind": (lambda a: a[::-2], lambda a: a[::2]),
    "channels": (lambda a: a.reshape(4, 12, 5, 7)[:, ::2], lambda a: a.reshape(4, 12, 5, 7)[:, 1::2]),
    "blocks of channels": (lambda a: a.reshape(4, 12, 5, 7)[:, :6], lambda a: a.reshape(4, 12, 5, 7)[:, 6:]),
    "values": (lambda a: a.reshape(4, 6, 5, 14)[..., ::2], lambda a: a.reshape(4, 6, 5, 14)[..., 1::2]),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_out_and_x_may_be_parts_of_one_array(way):
    here, there = way
    owner = inputs.normal((8, *SHAPE[1:]))
    x, out = here(owner), there(owner)
    p = inputs.parameters(6)
    values = x.copy()
    expected = fastbn.batch_norm_forward(values, *p[:2])[0], fastbn.batch_norm_inference(values, *p)
    assert fastbn.batch_norm_forward(x, *p[:2], out=out)[0] is out
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(x, values)
    fastbn.batch_norm_inference(x, *p, out=out)
    np.testing.assert_array_equal(out, expected[1])
    np.testing.assert_array_equal(x, values)
    _, ctx = fastbn.batch_norm_forward(values, *p[:2])
    (dx, *_), dy = fastbn.batch_norm_backward(x, ctx), x.copy()
    fastbn.batch_norm_backward(x, ctx, out=out)
    np.testing.assert_array_equal(out, dx)
    np.testing.assert_array_equal(x, dy)


def shifted(owner):
    """Views of x's shape that share elements with the first four samples of eight."""
    whole = owner.reshape(-1)
    size = owner.size // 2
    return {
        "the last of its elements": whole[size - 1 : 2 * size - 1].reshape(SHAPE),
        "every second sample": owner[::2],
        "samples backwards": owner[3::-1],
        "rows backwards": owner[:4, :, ::-1],
    }


@pytest.mark.parametrize("which", shifted(np.zeros((8, *SHAPE[1:]))))
def test_out_that_reaches_into_x(which):
    owner = inputs.normal((8, *SHAPE[1:]))
    x, out, p = owner[:4], shifted(owner)[which], inputs.parameters(6)
    _, ctx = fastbn.batch_norm_forward(x.copy(), *p[:2])
    before = checks.snapshot(owner)
    for call in (
        lambda: fastbn.batch_norm_forward(x, *p[:2], out=out),
        lambda: fastbn.batch_norm_inference(x, *p, out=out),
    ):
        with refused("out overlaps x", "empty_like"):
            call()
    with refused("out overlaps dy", "empty_like"):
        fastbn.batch_norm_backward(x, ctx, out=out)
    checks.assert_unchanged(before)


def test_another_view_of_the_same_elements_is_in_place():
    """out need not be x itself, only be it element for element."""
    owner, p = inputs.normal((4 * 6 * 5 * 7,)), inputs.parameters(6)
    x, out = owner.reshape(SHAPE), owner[:].reshape(SHAPE)
    values = x.copy()
    expected = fastbn.batch_norm_inference(values, *p)
    with refused("out overlaps x"):
        fastbn.batch_norm_forward(x, *p[:2], out=out)
    assert fastbn.batch_norm_inference(x, *p, out=out) is out
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("name", ["gamma", "beta", "mean", "var", "residual"])
def test_out_and_the_other_arrays_of_an_inference(name):
    owner = np.ones((8, *SHAPE[1:]), np.float32)
    given = dict(zip(("gamma", "beta", "mean", "var"), inputs.parameters(6), strict=True)) | {"residual": inputs.normal(SHAPE)}
    given[name] = owner[3:7] if name == "residual" else owner[3, 0].reshape(-1)[::3][:6]
    with refused("out", name):
        fastbn.batch_norm_inference(inputs.normal(SHAPE), **given, out=owner[:4])
    fastbn.batch_norm_inference(inputs.normal(SHAPE), **given | {"residual": None}, out=owner[4:])


@pytest.mark.parametrize("name", [*NAMES, "residual", "sample_weight"])
def test_out_and_the_other_arrays_of_a_forward(name):
    owner = np.ones((8, *SHAPE[1:]), np.float32)
    given = dict(zip(NAMES, inputs.parameters(6), strict=True)) | {"residual": inputs.normal(SHAPE), "sample_weight": np.ones(4)}
    given[name] = {"residual": owner[3:7], "sample_weight": owner[3, 0, 0, :4]}.get(name, owner[3, 0].reshape(-1)[::3][:6])
    before = checks.snapshot(owner)
    with refused("out", name):
        fastbn.batch_norm_forward(inputs.normal(SHAPE), **given, out=owner[:4])
    checks.assert_unchanged(before)


def test_out_of_a_backward_and_the_x_of_the_context():
    owner = inputs.normal((8, *SHAPE[1:]))
    _, ctx = fastbn.batch_norm_forward(owner[:4])
    dy = inputs.normal(SHAPE, seed=1)
    expected = fastbn.batch_norm_backward(dy, ctx)[0]
    assert checks.same_bits(fastbn.batch_norm_backward(dy, ctx, out=owner[4:])[0], expected)
    before = checks.snapshot(owner)
    with refused("out overlaps x, which ctx holds"):
        fastbn.batch_norm_backward(dy, ctx, out=owner[3:7])
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    with refused("out overlaps x, which ctx holds"):
        fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=owner[3:7])
    checks.assert_unchanged(before)


@pytest.mark.parametrize("which", [0, 1], ids=["sum_dy", "sum_dy_xmu"])
def test_out_of_a_backward_and_the_sums(which):
    x, dy = inputs.normal(SHAPE, np.float64), inputs.normal(SHAPE, np.float64, seed=1)
    _, ctx = fastbn.batch_norm_forward(x)
    sums, out = list(fastbn.batch_norm_backward_reduce(dy, ctx)), np.zeros(SHAPE)
    part = out[0, 0].reshape(-1)[:6]
    part[...] = sums[which]
    sums[which] = part
    with refused("out", ("sum_dy", "sum_dy_xmu")[which]):
        fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=out)


@pytest.mark.parametrize("apply", [False, True], ids=["backward", "apply"])
@pytest.mark.parametrize(("shape", "of_weight"), [((16, 6), (16,)), ((16, 6, 2), (16, 2)), ((16, 6, 128), (16, 128))], ids=str)
def test_out_of_a_backward_and_the_weights_of_the_context(shape, of_weight, apply):
    """The kernels may read weights where they were given: `out` is refused there, or harms nothing."""
    x, dy, out = inputs.normal(shape, np.float64), inputs.normal(shape, np.float64, seed=1), np.zeros(shape)
    weight = out.reshape(-1)[: np.prod(of_weight)].reshape(of_weight)
    weight[...] = np.random.default_rng(0).uniform(0.5, 1, of_weight)
    _, ctx = fastbn.batch_norm_forward(x, sample_weight=weight)
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    expected = fastbn.batch_norm_backward(dy, ctx)[0]
    before = checks.snapshot(out)
    dx, refusal = None, ""
    try:
        dx = fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=out) if apply else fastbn.batch_norm_backward(dy, ctx, out=out)[0]
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "out overlaps sample_weight" in refusal
        checks.assert_unchanged(before)
    else:
        np.testing.assert_allclose(dx, expected, rtol=1e-12, atol=1e-12)  # the two ways to dx round differently


# -------------------------------------------------------------------------------------------------- memory of other owners


def of_bytearray(tmp_path, size):
    memory = bytearray(4 * size)
    return lambda: np.frombuffer(memory, np.float32)


def of_memoryview(tmp_path, size):
    memory = memoryview(bytearray(4 * size))
    return lambda: np.frombuffer(memory[:], np.float32)


def of_asarray(tmp_path, size):
    memory = memoryview(bytearray(4 * size)).cast("f")
    return lambda: np.asarray(memory)


def of_buffer(tmp_path, size):
    memory = np.zeros(size, np.float32)
    return lambda: np.ndarray(size, np.float32, memory.data)


def of_interface(tmp_path, size):
    memory = np.zeros(size, np.float32)

    class Other:
        __array_interface__ = memory.__array_interface__
        keep = memory

    return lambda: np.asarray(Other())


DLPACK = np.from_dlpack(np.zeros(1)).flags.writeable  # read-only before NumPy 2.2


def of_dlpack(tmp_path, size):
    if not DLPACK:
        pytest.skip("this NumPy makes read-only arrays of DLPack's")
    memory = np.zeros(size, np.float32)
    return lambda: np.from_dlpack(memory)


def of_memmap(tmp_path, size):
    memory = np.memmap(tmp_path / "memory", np.float32, "w+", shape=size)
    return lambda: memory


def of_mmap(tmp_path, size):
    memory = mmap.mmap(-1, 4 * size)
    return lambda: np.frombuffer(memory, np.float32)


def of_strides(tmp_path, size):
    memory = np.zeros(size, np.float32)
    return lambda: np.lib.stride_tricks.as_strided(memory, (size,), (4,))


def of_subclass(tmp_path, size):
    memory = np.zeros(size, np.float32)
    return lambda: memory.view(np.recarray)


OWNERS = (
    of_bytearray, of_memoryview, of_asarray, of_buffer, of_interface, of_dlpack, of_memmap, of_mmap, of_strides, of_subclass,
)  # fmt: skip


@pytest.mark.parametrize("owner", OWNERS, ids=lambda f: f.__name__[3:])
def test_memory_of_other_owners(owner, tmp_path):
    """Two arrays that NumPy thinks have nothing to do with each other."""
    size = 4 * 6 * 5 * 7
    again = owner(tmp_path, 2 * size)
    x, p = again()[:size].reshape(SHAPE), inputs.parameters(6)
    x[...] = inputs.normal(SHAPE)
    values = np.array(x)
    beside, over = again()[size:].reshape(SHAPE), again()[size - 1 : 2 * size - 1].reshape(SHAPE)
    expected = fastbn.batch_norm_forward(values, *p[:2])[0]
    assert fastbn.batch_norm_forward(x, *p[:2], out=beside)[0] is beside
    np.testing.assert_array_equal(beside, expected)
    np.testing.assert_array_equal(x, values)
    before = np.array(again())
    with refused("out overlaps x"):
        fastbn.batch_norm_forward(x, *p[:2], out=over)
    with refused("out overlaps x"):
        fastbn.batch_norm_inference(x, *p, out=over)
    with refused("running_mean shares memory with x"):
        fastbn.batch_norm_forward(x, *p[:2], again()[:6], p[3])
    with refused("running_mean and running_var share memory"):
        fastbn.batch_norm_forward(values, *p[:2], again()[:6], again()[5:11])
    np.testing.assert_array_equal(again(), before)
    fastbn.batch_norm_inference(x, *p, out=again()[:size].reshape(SHAPE))  # in place
    np.testing.assert_array_equal(x, fastbn.batch_norm_inference(values, *p))


def test_buffers_that_are_passed_as_they_are():
    """Not a view of what np.frombuffer has made, as a slice is."""
    memory, x, p = bytearray(4 * 4 * 6 * 5 * 7), inputs.normal(SHAPE), inputs.parameters(6)
    expected = fastbn.batch_norm_inference(x, *p)
    out = np.ndarray(SHAPE, np.float32, memory)
    np.testing.assert_array_equal(fastbn.batch_norm_inference(x, *p, out=out), expected)
    mean, var = np.frombuffer(memory, np.float32, 6), np.frombuffer(memory, np.float32, 6, offset=4 * 6)
    mean[...], var[...] = p[2:]
    with refused("out overlaps running_mean"):
        fastbn.batch_norm_forward(x, None, None, mean, p[3], out=out)
    fastbn.batch_norm_forward(x, None, None, mean, var)
    with refused("running_mean and running_var share memory"):
        fastbn.batch_norm_forward(x, None, None, mean, np.frombuffer(memory, np.float32, 6, offset=4 * 5))


def test_every_pair_of_ways_to_the_same_memory():
    """The array itself on one side, a view or a buffer of it on the other."""
    memory = np.zeros(4 * 6 * 5 * 7 + 6, np.float32)
    ways = (
        lambda: memory,
        lambda: memory[:],
        lambda: np.frombuffer(memory, np.float32),
        lambda: np.frombuffer(memory, np.float32)[:],
        lambda: memory.view(np.recarray),
        *([lambda: np.from_dlpack(memory)] if DLPACK else []),
    )
    var = np.ones(6, np.float32)
    for one, other in itertools.product(ways, ways):
        x = one()[:-6].reshape(SHAPE)
        x[...] = inputs.normal(SHAPE)
        fastbn.batch_norm_forward(x, running_mean=other()[-6:], running_var=var)
        with refused("running_mean shares memory with x"):
            fastbn.batch_norm_forward(x, running_mean=other()[-7:-1], running_var=var)
