"""A context is a value: pickled, copied, sent to another process or used again, it gives the same gradients bit for bit.

It holds x, which lies otherwise in memory once it has been copied, and a plan, which says how x lies and holds machine code.
"""

import copy
import pickle

import checks
import inputs
import numpy as np
import pytest
import subprocesses

import fastbn

SHAPE = (4, 6, 6)


def gradient_of(x, seed=1):
    return inputs.normal(x.shape, checks.native(x.dtype), seed=seed)


COPIES = {"pickle": lambda c: pickle.loads(pickle.dumps(c)), "deepcopy": copy.deepcopy, "copy": copy.copy}
FEATURES = {
    "plain": lambda x: {},
    "residual and relu": lambda x: {"activation": "relu", "residual": inputs.normal(x.shape, seed=3).astype(x.dtype)},
    "weights": lambda x: {"sample_weight": np.arange(4.0)},
    "frozen": lambda x: {"training": False, "running_mean": inputs.parameters(6)[2], "running_var": inputs.parameters(6)[3]},
}


def native(found):
    """Without byte order, which NumPy does not keep in a pickle."""
    return [None if a is None else a.astype(checks.native(a.dtype)) for a in found]


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layout", [name for name in inputs.LAYOUTS if name != "memory-mapped"])
def test_a_copy_of_a_context_gives_the_same_gradients(layout, duplicate, used):
    """Copies of a strided x lie otherwise in memory than x did, and plans say how it lies."""
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7)))
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], axis=axis, activation="relu", sample_weight=np.arange(4.0))
    dy = gradient_of(x)
    if used:  # the plan then holds machine code
        fastbn.batch_norm_backward(dy, ctx)
    other = duplicate(ctx)
    expected = fastbn.batch_norm_backward(dy, ctx)
    for _ in range(2):
        assert checks.same_results(native(fastbn.batch_norm_backward(dy, other)), native(expected))
    assert checks.same_results(fastbn.batch_norm_backward_reduce(dy, other), fastbn.batch_norm_backward_reduce(dy, ctx))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_a_copy_has_all_that_the_forward_left(dtype, features, duplicate):
    x = np.asfortranarray(inputs.normal((4, 6, 5, 7)).astype(dtype))
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], **features(x))
    other = duplicate(ctx)
    for name in ("axis", "training", "count", "has_residual", "relu"):
        assert getattr(other, name) == getattr(ctx, name)
    assert checks.same_results([other.x, other.mean, other.var, other.invstd], [ctx.x, ctx.mean, ctx.var, ctx.invstd])
    dy = inputs.normal(x.shape, seed=1).astype(dtype)
    assert checks.same_results(fastbn.batch_norm_backward(dy, other), fastbn.batch_norm_backward(dy, ctx))


def test_contexts_of_one_plan_in_one_pickle():
    pairs = [(inputs.normal(SHAPE, seed=s), inputs.normal(SHAPE, seed=s + 10)) for s in range(3)]
    contexts = [fastbn.batch_norm_forward(x, activation="relu")[1] for x, _ in pairs]
    others = pickle.loads(pickle.dumps(contexts))
    assert len({id(c.plan) for c in others}) == 1
    for (_, dy), ctx, other in zip(pairs, contexts, others, strict=True):
        assert checks.same_results(fastbn.batch_norm_backward(dy, other), fastbn.batch_norm_backward(dy, ctx))


def test_a_context_of_nothing_is_copied():
    _, ctx = fastbn.batch_norm_forward(np.empty((0, 3), np.float32), np.ones(3))
    for duplicate in COPIES.values():
        assert checks.same_results(fastbn.batch_norm_backward(ctx.x, duplicate(ctx)), fastbn.batch_norm_backward(ctx.x, ctx))


def test_a_pickle_holds_no_compiled_code():
    x = inputs.normal((64, 6, 32, 32))
    _, ctx = fastbn.batch_norm_forward(x)
    fastbn.batch_norm_backward(gradient_of(x), ctx)
    assert len(pickle.dumps(ctx)) < x.nbytes + 4096


def test_a_context_of_another_process(tmp_path):
    """As of a worker that computes the backward. The other process has made no call before, and writes its gradients back."""
    x, axis = inputs.arrange("channels last view", inputs.normal((4, 6, 5, 7)))
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], axis=axis, activation="relu", sample_weight=np.arange(4.0))
    dy = gradient_of(x)
    (tmp_path / "ctx").write_bytes(pickle.dumps((ctx, dy)))
    subprocesses.run(
        """
import pathlib, pickle
ctx, dy = pickle.loads(pathlib.Path("ctx").read_bytes())
import fastbn
pathlib.Path("back").write_bytes(pickle.dumps((fastbn.batch_norm_backward(dy, ctx), ctx)))
""",
        cwd=tmp_path,
    )
    found, back = pickle.loads((tmp_path / "back").read_bytes())
    expected = fastbn.batch_norm_backward(dy, ctx)
    assert checks.same_results(found, expected)
    assert checks.same_results(fastbn.batch_norm_backward(dy, back), expected)


def test_a_context_is_used_again_whatever_was_done_with_it():
    """The same bits after a backward into `out`, into dy, in steps, of a dy that lies otherwise, and after one that was refused."""
    x = inputs.normal(SHAPE)
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], activation="relu", residual=inputs.normal(SHAPE, seed=2))
    dy = gradient_of(x)
    expected = fastbn.batch_norm_backward(dy, ctx)

    def refused(dy):
        with pytest.raises(ValueError, match="out overlaps"):
            fastbn.batch_norm_backward(dy, ctx, out=x)

    between = (
        lambda dy: fastbn.batch_norm_backward(dy, ctx, out=np.empty_like(dy)),
        lambda dy: fastbn.batch_norm_backward(dy, ctx, out=dy),
        lambda dy: fastbn.batch_norm_backward_apply(dy, ctx, *fastbn.batch_norm_backward_reduce(dy, ctx)),
        lambda dy: fastbn.batch_norm_backward(np.asfortranarray(dy), ctx),
        refused,
    )
    for use in between:
        use(dy.copy())
        assert checks.same_results(fastbn.batch_norm_backward(dy, ctx), expected)
