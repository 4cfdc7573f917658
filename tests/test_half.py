"""float16 and bfloat16: float32 parameters, float64 statistics, results rounded once.

The reference gets the half input as it is; half a unit in the last place of the half type is the one rounding, 1e-6 (the
bound of float32) is left for the arithmetic before it. A result rounded twice or towards zero does not fit.
"""

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn
from fastbn.cpu import dispatch

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes, which is not installed")

# dtype, bits of the significand, exponent of the smallest normal number
HALVES = {
    "float16": (np.dtype(np.float16), 11, -14),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 8, -126),
}
HALF = pytest.mark.parametrize("half", HALVES)
SHAPES = inputs.SMALL_SHAPES | {
    "planes 7x7": (6, 20, 7, 7),
    "planes 10x10, many": (64, 3, 10, 10),
    "planes 27x33": (3, 5, 27, 33),
    "nc 33x257": (33, 257),
}


def assert_rounded_once(actual, exact, half, scale, what):
    """|actual - exact| <= half a unit in the last place + 1e-6 * scale."""
    _, bits, smallest = HALVES[half]
    error = np.abs(reference.widen(actual) - exact)
    excess = error - (0.5 * checks.ulp(exact, bits, smallest) + 1e-6 * scale)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"{what}, {half}: got {actual[worst]}, exact {float(exact[worst])!r} at {worst}"


def arranged(shape, half, layout, seed=0, scale=1.0, shift=0.0):
    v = (inputs.normal(shape, np.float64, seed) * scale + shift).astype(HALVES[half][0])
    return inputs.arrange(layout, v)


def check(x, dy, axis, half, frozen=None, parameters=None, **features):
    """Forward and backward against the reference."""
    gamma, beta = inputs.parameters(x.shape[axis])[:2] if parameters is None else parameters
    ours, theirs = {}, {}
    if frozen is not None:
        ours = {"running_mean": frozen[0], "running_var": frozen[1], "training": False}
        theirs = {"mean": frozen[0], "var": frozen[1]}
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, axis=axis, **ours, **features)
    exact = reference.forward(x, gamma, beta, axis=axis, **theirs, **features)
    assert y.dtype == x.dtype
    assert_rounded_once(y, exact.y, half, np.maximum(1, np.abs(exact.pre)), "y")
    assert ctx.mean.dtype == ctx.var.dtype == ctx.invstd.dtype == np.float64
    if frozen is None:
        np.testing.assert_allclose(ctx.var, exact.var.astype(np.float64), rtol=1e-9)

    mask = np.asarray(y, np.float32) > 0 if features.get("activation") else None
    weight = features.get("sample_weight")
    exact = reference.backward(dy, x, gamma, axis=axis, mask=mask, sample_weight=weight, **theirs)
    dx, dgamma, dbeta, *rest = fastbn.batch_norm_backward(dy, ctx)
    assert dx.dtype == x.dtype
    assert_rounded_once(dx, exact.dx, half, reference.per_channel(exact.dx_scale, x.ndim, axis), "dx")
    if gamma is not None:
        checks.assert_parameter_gradient(dgamma, exact.dgamma, exact.dgamma_scale, gamma, "dgamma", gamma, 0)
        checks.assert_parameter_gradient(dbeta, exact.dbeta, exact.dbeta_scale, beta, "dbeta", gamma, 0)
    if "residual" in features:
        assert rest[0].dtype == x.dtype
        np.testing.assert_array_equal(reference.widen(rest[0]), exact.dresidual)
    return y, ctx


@HALF
@pytest.mark.parametrize("layout", ["contiguous", "axis -1", "channels last view"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training(shape, layout, half):
    (x, axis), (dy, _) = (arranged(shape, half, layout, seed) for seed in (0, 1))
    y, _ = check(x, dy, axis, half)
    checks.assert_same_order(y, x)


@HALF
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(9, 33, 14, 14), (3, 9, 27, 33), (5, 40, 29, 31)], ids=str)
def test_planes_in_memory(shape, activation, half, constants):
    """Small arrays on the road of large ones."""
    constants(STREAM_FROM=0, CACHE=4 * shape[0] * shape[2] * shape[3] * 8)
    x, axis = arranged(shape, half, "contiguous", scale=3, shift=1)
    assert fastbn.explain(x).backward_road == "channels"
    check(x, arranged(shape, half, "contiguous", seed=1)[0], axis, half, activation=activation)


@HALF
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout, half):
    if layout == "big-endian" and half == "bfloat16":
        pytest.skip("ml_dtypes has no big-endian bfloat16")
    (x, axis), (dy, _) = (arranged((4, 6, 5, 7), half, layout, seed) for seed in (0, 1))
    check(x, dy, axis, half)


@HALF
@pytest.mark.parametrize("layout", ["contiguous", "axis -1"])
def test_frozen_and_inference(layout, half):
    (x, axis), (dy, _) = (arranged((4, 6, 5, 7), half, layout, seed) for seed in (0, 1))
    gamma, beta, mean, var = inputs.parameters(6)
    y, _ = check(x, dy, axis, half, frozen=(mean, var))
    again = fastbn.batch_norm_inference(x, gamma, beta, mean, var, axis=axis)
    assert checks.same_bits(y, again)
    here = fastbn.batch_norm_inference(x, gamma, beta, mean, var, axis=axis, out=x)
    assert here is x
    assert checks.same_bits(here, again)


@HALF
@pytest.mark.parametrize("layout", ["contiguous", "axis -1"])
@pytest.mark.parametrize("feature", ["relu", "residual", "relu, residual", "mask", "weights, relu, residual"])
def test_features(feature, layout, half):
    shape = (4, 6, 5, 7)
    (x, axis), (dy, _), (residual, _) = (arranged(shape, half, layout, seed) for seed in range(3))
    features = {}
    if "relu" in feature:
        features["activation"] = "relu"
    if "residual" in feature:
        features["residual"] = residual
    if "mask" in feature:
        features["sample_weight"] = np.array([True, True, False, True])
    if "weights" in feature:
        features["sample_weight"] = np.random.default_rng(1).uniform(0, 2, (4, 5, 7))
    check(x, dy, axis, half, **features)


@HALF
def test_parameters_may_be_none(half):
    (x, axis), (dy, _) = (arranged((4, 6, 5, 7), half, "contiguous", seed) for seed in (0, 1))
    _, ctx = check(x, dy, axis, half, parameters=(None, None))
    assert fastbn.batch_norm_backward(dy, ctx)[1:] == (None, None)


@HALF
@pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
def test_running_statistics(dtype, half):
    x, _ = arranged((6, 5, 7), half, "contiguous")
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    _, ctx = fastbn.batch_norm_forward(x, None, None, mean, var)
    rtol = 2e-15 if dtype == np.float64 else 1.2e-7
    np.testing.assert_allclose(mean, reference.running_update(np.zeros(5), ctx.mean, 0.1), rtol=rtol)
    np.testing.assert_allclose(var, reference.running_update(np.ones(5), ctx.var * 42 / 41, 0.1), rtol=rtol)


@HALF
@pytest.mark.parametrize("layout", ["contiguous", "axis -1"])
def test_sums_beyond_the_range_of_half(layout, half):
    # PyTorch's regression of (16, 3, 224, 224), scaled to 150 thousand values: sums of 1e7 and squares of 4e5 are
    # infinite in float16, and one more value than 2048 is lost in a float16 count.
    x, axis = arranged((4, 3, 112, 112), half, layout, scale=100.0, shift=600.0)
    dy, _ = arranged((4, 3, 112, 112), half, layout, seed=1)
    y, ctx = check(x, dy, axis, half)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert ctx.count == 4 * 112 * 112


def test_every_float16():
    # All 63488 finite values, subnormals among them, go through the conversions in and out.
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 1)
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    y = fastbn.batch_norm_inference(every, None, None, mean, var, eps=1e-30)  # 1 + 1e-30 is 1 in float64
    np.testing.assert_array_equal(y, every)
    assert checks.same_bits(np.abs(y), np.abs(every))


def test_every_bfloat16():
    every = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    every = every[np.isfinite(every.astype(np.float32))].reshape(-1, 1)
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    y = fastbn.batch_norm_inference(every, None, None, mean, var, eps=1e-30)
    np.testing.assert_array_equal(y.astype(np.float32), every.astype(np.float32))


@HALF
def test_rounding_is_to_nearest_even(half):
    # gamma = 1, beta puts the result exactly between two halves, or just beside the middle.
    dtype, bits, _ = HALVES[half]
    unit = 2.0 ** (1 - bits)  # of values in [1, 2)
    beta = np.array([1 + (k + 0.5) * unit * (1 + d) for k in (0, 1, 2, 3) for d in (-2e-4, 0, 2e-4)], np.float32)
    x = np.zeros((2, beta.size), dtype)
    zeros, ones = np.zeros(beta.size, np.float32), np.ones(beta.size, np.float32)
    y = fastbn.batch_norm_inference(x, ones, beta, zeros, ones)
    expected = np.broadcast_to(beta, x.shape).astype(dtype)  # NumPy and ml_dtypes round to nearest even
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))


@HALF
def test_nan_stays_in_its_channel(half):
    x, _ = arranged((4, 6, 5, 7), half, "contiguous")
    x[1, 2, 3, 4] = np.nan
    y = np.asarray(fastbn.batch_norm_forward(x)[0], np.float32)
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(np.delete(y, 2, axis=1)).all()


# bfloat16 reaches as far as float32: magnitudes of x and dy, gamma, eps of a channel that float32 lanes get wrong in the backward.
UNFIT = {
    "products with dy overflow": (1e25, 1e20, 1.0, 1e-5),
    "products with dy vanish": (1e-25, 1e-25, 1.0, 1e-60),
    "the slope vanishes": (1e25, 1e-10, 1.0, 1e-5),
    "gamma * invstd * dy overflows": (1.0, 1e38, 0.1, 1e-5),
    "dy vanishes beside x": (1e15, 1e-36, 1e17, 1e-5),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("layout", ["contiguous", "axis -1"])
@pytest.mark.parametrize("shape", [(6, 20, 7, 7), (40, 40, 5, 3), (3, 12, 27, 33), (3, 2, 27, 33), (64, 50)], ids=str)
@pytest.mark.parametrize("stream_from", [0, dispatch.STREAM_FROM], ids=["in memory", "cached"])
def test_backward_of_channels_that_float32_does_not_reach(shape, layout, case, stream_from, constants):
    """One channel among others that fit, on every road; also where dx takes dy's place, so that nothing can be done twice."""
    constants(STREAM_FROM=stream_from)
    size, dy_size, g, eps = UNFIT[case]
    bad = shape[1] // 2
    x, dy = (inputs.normal(shape, np.float64, seed) for seed in (0, 1))
    x[:, bad] *= size
    dy[:, bad] = dy_size * np.clip(dy[:, bad], -2, 2)
    gamma = np.ones(shape[1])  # float64, as dgamma may be too large for float32
    gamma[bad] = g
    (x, axis), (dy, _) = (inputs.arrange(layout, v.astype(ml_dtypes.bfloat16)) for v in (x, dy))
    _, ctx = fastbn.batch_norm_forward(x, gamma, None, axis=axis, eps=eps)
    exact = reference.backward(dy, x, gamma, axis=axis, eps=eps)
    dx, dgamma, _ = fastbn.batch_norm_backward(dy, ctx)
    assert_rounded_once(dx, exact.dx, "bfloat16", reference.per_channel(exact.dx_scale, x.ndim, axis), "dx")
    assert (np.abs(dgamma - exact.dgamma) <= 1e-6 * exact.dgamma_scale).all()
    here = fastbn.batch_norm_backward(dy, ctx, out=dy)[0]
    assert here is dy
    assert checks.same_bits(here, dx)


@HALF
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_dy_that_is_not_finite_stays_in_its_channel(value, half):
    (x, _), (dy, _) = (arranged((6, 12, 27, 33), half, "contiguous", seed) for seed in (0, 1))
    _, ctx = fastbn.batch_norm_forward(x)
    clean = np.asarray(fastbn.batch_norm_backward(dy, ctx)[0], np.float32)
    dy[1, 5, 3, 4] = value
    dx = np.asarray(fastbn.batch_norm_backward(dy, ctx)[0], np.float32)
    assert np.isnan(dx[:, 5]).any()
    assert not np.isfinite(dx[:, 5]).all(axis=(1, 2)).any()
    np.testing.assert_array_equal(np.delete(dx, 5, axis=1), np.delete(clean, 5, axis=1))


@HALF
def test_moments(half):
    x, _ = arranged((40, 6, 5, 7), half, "contiguous", shift=30.0)
    m = fastbn.moments(x)
    count, mean, m2 = reference.moments(x)
    assert m.count == count
    np.testing.assert_allclose(m.mean, mean.astype(np.float64), rtol=1e-12)
    np.testing.assert_allclose(m.m2, m2.astype(np.float64), rtol=1e-9)
