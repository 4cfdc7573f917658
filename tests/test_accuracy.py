"""The contract's numeric bounds on data that breaks careless arithmetic.

E[x^2] - E[x]^2 in float32 is off by 1e9 on some of these, Welford in float32 by 1e-2, x * a + b by 0.1 (see the bounds in
checks.py). Values of 1e25 overflow float32 squares, 1e-30 underflows them.
"""

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn
from fastbn.cpu import memory

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
KINDS = pytest.mark.parametrize("kind", inputs.VALUES)
SHAPES = {
    "nc": (200, 6),
    "planes 7x7": (6, 20, 7, 7),
    "planes 27x33": (3, 4, 27, 33),
    "planes 64x64": (2, 3, 64, 64),
}


@KINDS
@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "axis -1", "channels last view"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training(shape, layout, dtype, kind):
    x, axis = inputs.arrange(layout, inputs.values(kind, shape, dtype))
    dy, _ = inputs.arrange(layout, inputs.normal(shape, dtype, seed=1))
    checks.check_both(x, *inputs.parameters(shape[1], dtype)[:2], axis=axis, dy=dy)


@DTYPES
@pytest.mark.parametrize("kind", ["1e4 +- 1e-2", "1e6 +- 1", "first value 1e5", "padded", "1e25", "cauchy"])
@pytest.mark.parametrize("axis", [1, -1])
def test_one_huge_channel(axis, kind, dtype):
    x = inputs.values(kind, (3, 1, 317, 317), dtype)
    checks.check_both(np.moveaxis(x, 1, axis).copy(), axis=axis)


@pytest.mark.parametrize("value", [0.0, 1e6])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(3000, 20), (90, 3, 5, 5), (9, 20, 4, 4), (3, 5, 20, 20), (40, 8, 64, 64), (2, 2, 300, 300)], ids=str)
def test_outliers_where_the_shift_is_chosen(shape, axis, weighted, value):
    """Two of the three values whose median is the shift are far off; float64 is gathered again. Shapes of all roads, and of many blocks."""
    values = inputs.normal((shape[0], *shape[2:], shape[1]), np.float64) + 100
    positions = values.reshape(-1, shape[1])
    positions[(memory.PLACES[:2] * len(positions)).astype(int)] = value
    x = values if axis == -1 else np.ascontiguousarray(np.moveaxis(values, -1, 1))
    weight = inputs.normal(values.shape[:-1], np.float64, seed=1) ** 2 + 0.1 if weighted else None
    checks.check_forward(x, *inputs.parameters(shape[1], np.float64)[:2], axis=axis, sample_weight=weight)


@DTYPES
def test_tiny_values_with_an_eps_that_lets_them_count(dtype):
    # With the usual eps, 1e-30 is zero; with eps of 1e-64 it is normalised like any other value.
    x = inputs.values("1e-30", (6, 5, 40), dtype)
    y, *_ = checks.check_both(x, eps=1e-64)
    np.testing.assert_allclose(y.std(axis=(0, 2)), 1, rtol=1e-3)  # var / (var + eps) = 1 - 1e-4


@DTYPES
def test_mean_of_a_million_standard_deviations(dtype):
    # The steepest case of the contract: mean / std = 1e6 (float32 has 16 steps per standard deviation left).
    rng = np.random.default_rng(8)
    for shape in [(500, 3), (4, 3, 20, 20)]:
        x = (np.float64(3e6) + 3 * rng.standard_normal(shape)).astype(dtype)
        checks.check_both(x, *inputs.parameters(3, dtype)[:2])
        checks.check_both(-x, *inputs.parameters(3, dtype)[:2], axis=-1 if x.ndim == 2 else 1)


@KINDS
@DTYPES
def test_frozen_with_statistics_of_the_data(dtype, kind):
    x = inputs.values(kind, (4, 6, 5, 7), dtype)
    exact = reference.forward(np.nan_to_num(x, nan=1, posinf=2, neginf=-2))
    mean, var = exact.mean.astype(np.float64), exact.var.astype(np.float64)
    y, ctx = checks.check_forward(x, *inputs.parameters(6, dtype)[:2], frozen=(mean, var))
    # dx does not depend on x here: where x is NaN, dx is as good as anywhere; dgamma is not.
    dy = inputs.normal(x.shape, dtype, seed=1)
    checks.check_backward(dy, ctx, y, x, *inputs.parameters(6, dtype)[:2], frozen=(mean, var))


@pytest.mark.parametrize("kind", inputs.POISON)
@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "axis -1", "channels last view"])
@pytest.mark.parametrize("shape", [(9, 33), (3, 33, 5, 7), (2, 5, 31, 33)], ids=str)
def test_nan_and_inf_stay_in_their_channel(shape, layout, dtype, kind):
    # Not only "the others are finite": they have the very bits they have beside a clean channel.
    poisoned, clean = inputs.values(kind, shape, dtype), inputs.values(kind, shape, dtype)
    bad = shape[1] // 2
    clean[:, bad] = inputs.normal(shape, dtype)[:, bad]
    dy = inputs.normal(shape, dtype, seed=1)
    results = []
    for v in (poisoned, clean):
        x, axis = inputs.arrange(layout, v)
        y, ctx = fastbn.batch_norm_forward(x, axis=axis)
        dx, *_ = fastbn.batch_norm_backward(inputs.arrange(layout, dy)[0], ctx)
        results.append((np.moveaxis(y, axis, 1), np.moveaxis(dx, axis, 1)))
    others = np.arange(shape[1]) != bad
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours[:, others], theirs[:, others])
        assert np.isnan(ours[:, bad]).all()


@DTYPES
def test_nan_in_dy_stays_in_its_channel(dtype):
    x, dy = inputs.normal((4, 5, 6, 7), dtype), inputs.values("one nan", (4, 5, 6, 7), dtype)
    gamma, beta, *_ = inputs.parameters(5, dtype)
    _, _, (dx, dgamma, dbeta) = checks.check_both(x, gamma, beta, dy=dy)
    assert np.isnan(dx[:, 2]).all()
    assert np.isnan([dgamma[2], dbeta[2]]).all()
    others = [0, 1, 3, 4]
    assert np.isfinite(dx[:, others]).all()
    assert np.isfinite([dgamma[others], dbeta[others]]).all()


@DTYPES
def test_nan_in_gamma_stays_in_its_channel(dtype):
    x = inputs.normal((4, 5, 6, 7), dtype)
    gamma, beta, *_ = inputs.parameters(5, dtype)
    gamma[3] = np.nan
    y, _, (dx, *_) = checks.check_both(x, gamma, beta)
    assert np.isnan(y[:, 3]).all()
    assert np.isnan(dx[:, 3]).all()


@pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
def test_gamma_of_zero(dtype):
    x = inputs.normal((4, 3, 6), dtype)
    gamma, beta = np.array([0, 1, -0.0], dtype), np.array([2, 3, 4], dtype)
    y, _, (dx, dgamma, _) = checks.check_both(x, gamma, beta)
    assert (y[:, [0, 2]] == [[[2], [4]]]).all()
    assert (dx[:, [0, 2]] == 0).all()
    assert (dgamma != 0).all()
