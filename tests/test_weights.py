"""sample_weight: masks and real weights, per sample and per value; statistics and gradients are weighted."""

import checks
import inputs
import ml_dtypes
import numpy as np
import pytest
import reference

import fastbn
from fastbn.cpu import memory
from fastbn.cpu import weights as sample_weights

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
SHAPES = inputs.SMALL_SHAPES | {
    "planes 7x7": (6, 20, 7, 7),
    "planes 10x10, many": (64, 3, 10, 10),
    "planes 27x33": (3, 5, 27, 33),
    "nc 33x257": (33, 257),
}
LAYOUTS = {"axis 1": "contiguous", "axis -1": "axis -1", "channels last view": "channels last view"}


def weights(kind, shape, seed=0):
    """Weights for values of `shape` (channels on axis 1)."""
    rng = np.random.default_rng(inputs.seed_of(kind, shape, seed))
    size = shape[:1] if "sample" in kind else shape[:1] + shape[2:]
    if "mask" in kind:
        mask = rng.random(size) < 0.6
        mask.flat[:2] = True  # two samples at least
        return mask
    w = rng.uniform(0.1, 2, size) * (rng.random(size) < 0.8)
    w.flat[:2] = 0.75
    return w.astype(np.float32 if "float32" in kind else np.float64)


KINDS = pytest.mark.parametrize(
    "kind", ["mask per sample", "mask per value", "weight per sample", "weight per value", "float32 weight per value"]
)


@KINDS
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, layout, dtype, kind):
    x, axis = inputs.arrange(layout, inputs.normal(shape, dtype))
    dy, _ = inputs.arrange(layout, inputs.normal(shape, dtype, seed=1))
    gamma, beta, *_ = inputs.parameters(shape[1], dtype)
    w = weights(kind, shape)
    before = checks.snapshot(x, w)
    checks.check_both(x, gamma, beta, axis=axis, dy=dy, sample_weight=w)
    checks.assert_unchanged(before)


@KINDS
@pytest.mark.parametrize("activation", [None, "relu"])
def test_with_relu_and_residual(activation, kind):
    x, residual = inputs.normal((4, 6, 5, 7)), inputs.normal((4, 6, 5, 7), seed=1)
    w = weights(kind, x.shape)
    checks.check_both(x, *inputs.parameters(6)[:2], sample_weight=w, activation=activation, residual=residual)


@DTYPES
@pytest.mark.parametrize("kind", inputs.FINITE)
def test_values(kind, dtype):
    x = inputs.values(kind, (8, 3, 9, 11), dtype)
    checks.check_both(x, *inputs.parameters(3, dtype)[:2], sample_weight=weights("weight per value", x.shape))


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout):
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7)))
    checks.check_both(x, axis=axis, sample_weight=weights("weight per value", (4, 6, 5, 7)))


@pytest.mark.parametrize("kind", ["mask per sample", "weight per sample", "weight per value"])
@pytest.mark.parametrize("layout", ["contiguous", "fortran"])
@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("shape", [(4, 3, 2, 5, 6), (4, 3, 1, 1, 1), (4, 3, 2, 17, 19)], ids=str)
def test_any_axis(shape, axis, layout, kind):
    """A sample is an index of the first axis that is not the channels'; wherever its positions lie in memory."""
    x, _ = inputs.arrange(layout, inputs.normal(shape))
    last = np.moveaxis(x, axis, 1)
    if last.shape[0] < 2 or last.size // last.shape[1] < 2:
        pytest.skip("one value a channel")
    checks.check_both(x, axis=axis, sample_weight=weights(kind, last.shape))


@pytest.mark.parametrize("layout", ["every second sample", "fortran", "negative strides", "big-endian", "read-only"])
def test_layouts_of_the_weights(layout):
    x = inputs.normal((4, 6, 5, 7))
    w, _ = inputs.arrange(layout, weights("weight per value", x.shape))
    checks.check_both(x, sample_weight=w)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ones_equal_no_weights(shape, dtype):
    x, dy = inputs.normal(shape, dtype), inputs.normal(shape, dtype, seed=1)
    bound = 2 * checks.BOUND[np.dtype(dtype)]  # each within one bound of the exact value
    plain, ctx = fastbn.batch_norm_forward(x)
    dx, *_ = fastbn.batch_norm_backward(dy, ctx)
    scale = np.abs(dy).max() * ctx.invstd.max()
    for ones in (np.ones(shape[0], bool), np.ones(shape[:1] + shape[2:], bool), np.ones(shape[0], np.float64)):
        y, weighted = fastbn.batch_norm_forward(x, sample_weight=ones)
        np.testing.assert_allclose(y, plain, rtol=bound, atol=bound)
        np.testing.assert_allclose(fastbn.batch_norm_backward(dy, weighted)[0], dx, rtol=0, atol=bound * scale)
        assert weighted.count == ctx.count


def test_only_ratios_of_weights_count():
    x, w = inputs.normal((6, 5, 8), np.float64), weights("weight per value", (6, 5, 8))
    y, _ = fastbn.batch_norm_forward(x, sample_weight=w)
    for factor in (1e-3, 4.0, 1e6):
        again, _ = fastbn.batch_norm_forward(x, sample_weight=w * factor)
        np.testing.assert_allclose(again, y, rtol=2e-13, atol=2e-13)


def test_a_mask_is_the_batch_without_the_masked():
    # The definition: statistics, and gradients of what is left, are those of the shorter batch.
    x, dy = inputs.normal((9, 5, 4, 3), np.float64), inputs.normal((9, 5, 4, 3), np.float64, seed=1)
    gamma, beta, *_ = inputs.parameters(5, np.float64)
    keep = np.array([True, False, True, True, False, True, True, False, True])
    mean, var, m, v = np.zeros(5), np.ones(5), np.zeros(5), np.ones(5)
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, sample_weight=keep)
    short, short_ctx = fastbn.batch_norm_forward(x[keep], gamma, beta, m, v)
    np.testing.assert_allclose(y[keep], short, rtol=2e-13, atol=2e-13)
    np.testing.assert_allclose(mean, m, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(var, v, rtol=1e-12)  # Bessel's n is the number of values kept
    dy[~keep] = 0  # what is masked has no part in the loss
    results = fastbn.batch_norm_backward(dy, ctx)
    expected = fastbn.batch_norm_backward(dy[keep], short_ctx)
    np.testing.assert_allclose(results[0][keep], expected[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(results[0][~keep], 0)
    for ours, theirs in zip(results[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_masked_values_are_still_normalised():
    x = inputs.normal((6, 5, 8), np.float64)
    keep = np.arange(6) < 4
    y, ctx = fastbn.batch_norm_forward(x, sample_weight=keep)
    expected = (x[4:] - ctx.mean[:, None]) * ctx.invstd[:, None]
    np.testing.assert_allclose(y[4:], expected, rtol=1e-13, atol=1e-13)
    # ... and so their dy reaches the statistics: gradients of the kept values differ from zero.
    dy = np.zeros_like(x)
    dy[5] = inputs.normal((1, 5, 8), np.float64)[0]
    dx, *_ = fastbn.batch_norm_backward(dy, ctx)
    assert (np.abs(dx[:4]).max(axis=(0, 2)) > 1e-6).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("where", ["first", "middle"])
def test_a_value_of_weight_zero_cannot_poison_the_statistics(where, layout, value):
    # Padding is often NaN; 0 * NaN is NaN, so that multiplying by the weight is not enough.
    clean = inputs.normal((6, 5, 8))
    n = 0 if where == "first" else 3
    keep = np.ones((6, 8), bool)
    keep[n, :3] = False
    dirty = clean.copy()
    dirty[n, :, :3] = value
    mean, var = np.zeros(5), np.ones(5)
    x, axis = inputs.arrange(layout, dirty)
    y, ctx = fastbn.batch_norm_forward(x, None, None, mean, var, axis=axis, sample_weight=keep)
    exact = reference.forward(np.where(np.isfinite(dirty), dirty, 0), sample_weight=keep)
    checks.assert_statistics(ctx.mean, ctx.var, exact, x, axis)
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()
    y = np.moveaxis(y, axis, 1)
    kept = np.broadcast_to(keep[:, None], y.shape)
    checks.assert_forward_close(np.where(kept, y, 0), np.where(kept, exact.y, 0), x, axis)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(3, 5, 27, 33), (6, 20, 7, 7)], ids=str)
def test_the_dtype_of_weights_changes_no_bit(shape, dtype):
    """Some are kept as float32, which holds them exactly; float64 ones as they are."""
    x, dy = inputs.normal(shape), inputs.normal(shape, seed=1)
    w = np.random.default_rng(2).integers(0, 2 if dtype == np.bool_ else 4, (shape[0], *shape[2:])).astype(dtype)
    results = []
    for same in (w, w.astype(np.float64)):
        y, ctx = fastbn.batch_norm_forward(x, sample_weight=same)
        results.append((y, ctx.mean, ctx.var, np.array(ctx.count), *fastbn.batch_norm_backward(dy, ctx)))
    for a, b in zip(*results, strict=True):
        assert checks.same_bits(a, b)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("shape", [(65536, 2), (640, 3, 10, 10), (64, 9, 32, 32), (2, 2, 300, 300)], ids=str)
def test_many_equal_weights(shape, by_sample, axis):
    """Added one after the other, 65,536 weights of 0.1 are off by 1e-12, and float64's statistics by 5e-13."""
    x = np.moveaxis(inputs.normal(shape, np.float64), 1, axis).copy()
    positions = x.shape[:1] + x.shape[2:] if axis == 1 else x.shape[:-1]
    checks.check_forward(x, axis=axis, sample_weight=np.full(positions[:1] if by_sample else positions, 0.1))


@pytest.mark.parametrize("size", [1, 10, sample_weights.COUNTED, sample_weights.COUNTED + 1, 3 * sample_weights.COUNTED + 5])
def test_places_of_positive_weights(size):
    """Three of them, at fixed shares of their list, which is not made where it is long."""
    w = np.random.default_rng(size).integers(0, 3, size).astype(np.float32)
    w[0] = 1
    positive = np.flatnonzero(w)
    assert sample_weights._positive(w) == (len(positive), positive[(memory.PLACES * len(positive)).astype(int)].tolist())


def test_running_statistics_of_real_weights():
    x, w = inputs.normal((6, 5, 8)), weights("weight per value", (6, 5, 8))
    mean, var = np.zeros(5), np.ones(5)
    _, ctx = fastbn.batch_norm_forward(x, None, None, mean, var, sample_weight=w, unbiased=False)
    exact = reference.forward(x, sample_weight=w)
    np.testing.assert_allclose(ctx.var, exact.var.astype(np.float64), rtol=1e-9)
    np.testing.assert_allclose(mean, reference.running_update(np.zeros(5), ctx.mean, 0.1), rtol=2e-15)
    np.testing.assert_allclose(var, reference.running_update(np.ones(5), ctx.var, 0.1), rtol=2e-15)


@pytest.mark.parametrize("factor", [1.0, 0.01, 100.0])
def test_bessel_counts_the_effective_number_of_real_weights(factor):
    # n = W^2 / sum w_i^2 (Kish 1965): the number of values for equal weights of any size, and for masks the number kept.
    x, w = inputs.normal((6, 5, 8), np.float64), weights("weight per value", (6, 5, 8)) * factor
    mean, var = np.zeros(5), np.zeros(5)
    _, ctx = fastbn.batch_norm_forward(x, None, None, mean, var, sample_weight=w, momentum=1.0)
    n = w.sum() ** 2 / (w**2).sum()
    np.testing.assert_allclose(var, ctx.var * n / (n - 1), rtol=1e-13)  # sums of 48 terms, in another order


def test_one_weight_outweighs_all_others():
    """Their effective number is 1: finite statistics, but no unbiased variance."""
    x, mean, var = inputs.normal((3, 2)), np.zeros(2), np.ones(2)
    w = np.array([1.0, 1e-20, 0.0])
    with pytest.warns(RuntimeWarning, match="all but one of the sample weights are vanishingly small"):
        fastbn.batch_norm_forward(x, None, None, mean, var, sample_weight=w)
    assert mean.tolist() == [0, 0]
    assert var.tolist() == [1, 1]
    fastbn.batch_norm_forward(x, None, None, mean, var, sample_weight=w, unbiased=False)


def test_weights_with_an_infinite_sum():
    with pytest.raises(ValueError, match="divide the weights by their largest"):
        fastbn.batch_norm_forward(inputs.normal((4, 2)), sample_weight=np.full(4, 1e308))


def test_one_context_twice_and_in_place():
    x, dy = inputs.normal((4, 6, 5, 7)), inputs.normal((4, 6, 5, 7), seed=1)
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], sample_weight=weights("weight per value", x.shape))
    first, second = fastbn.batch_norm_backward(dy, ctx), fastbn.batch_norm_backward(dy, ctx)
    here = fastbn.batch_norm_backward(dy, ctx, out=dy)
    for a, b, c in zip(first, second, here, strict=True):
        assert checks.same_bits(a, b)
        assert checks.same_bits(a, c)
