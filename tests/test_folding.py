"""Folding: the folded layer computes what the layer and the normalisation after it compute."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from scipy.signal import correlate
from sklearn.datasets import load_digits

from fastbn.folding import fold_batch_norm

EPS = 1e-3


def conv2d(x, weight, bias):
    """Valid convolution of x (N, I, H, W) with weight (O, I, kh, kw), one correlation a pair, in float64."""
    y = [[sum(correlate(p, k, "valid") for p, k in zip(image, w, strict=True)) for w in weight] for image in x]
    return np.array(y) + bias.reshape(-1, 1, 1)


def normalise(y, gamma, beta, mean, var, axis):
    """The definition: gamma * (y - mean) / sqrt(var + eps) + beta along `axis`."""
    shape = [1] * y.ndim
    shape[axis] = -1
    gamma, beta, mean, var = (v.reshape(shape) for v in (gamma, beta, mean, var))
    return gamma * (y - mean) / np.sqrt(var + EPS) + beta


@pytest.fixture
def statistics():
    rng = np.random.default_rng(3)
    gamma, beta, mean = rng.normal(size=(3, 4))
    return gamma, beta, mean, rng.uniform(0.1, 30.0, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conv2d_on_digits(statistics, dtype):
    rng = np.random.default_rng(4)
    images = load_digits().images[:6].reshape(3, 2, 8, 8)  # real pixels, 0 to 16, two channels of input
    weight, bias = rng.normal(size=(4, 2, 3, 3)).astype(dtype), rng.normal(size=4).astype(dtype)
    expected = normalise(conv2d(images, weight.astype(float), bias.astype(float)), *statistics, axis=1)
    folded_weight, folded_bias = fold_batch_norm(weight, bias, *statistics, eps=EPS)
    assert folded_weight.dtype == folded_bias.dtype == dtype
    assert folded_weight.shape == weight.shape
    # One rounding per weight; 18 products of pixels up to 16 and scaled weights of up to about 10 add up.
    tolerance = 18 * 16 * 10 * np.finfo(dtype).eps
    actual = conv2d(images, folded_weight.astype(float), folded_bias.astype(float))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_linear_layers_in_both_orientations(statistics, axis):
    rng = np.random.default_rng(5)
    x, weight, bias = rng.normal(size=(7, 5)), rng.normal(size=(4, 5)), rng.normal(size=4)
    expected = normalise(x @ weight.T + bias, *statistics, axis=1)
    stored = weight if axis in (0, -2) else weight.T  # (out, in), or (in, out)
    folded_weight, folded_bias = fold_batch_norm(stored, bias, *statistics, eps=EPS, axis=axis)
    matrix = folded_weight.T if axis in (0, -2) else folded_weight
    np.testing.assert_allclose(x @ matrix + folded_bias, expected, rtol=0, atol=1e-13)  # float64, sums of 5


@pytest.mark.parametrize("absent", list(itertools.product([True, False], repeat=3)))
def test_absent_parameters_mean_zero_bias_unit_gamma_zero_beta(statistics, absent):
    gamma, beta, mean, var = statistics
    weight, bias = np.random.default_rng(6).normal(size=(4, 3)), np.arange(4.0)
    without = [None if gone else v for gone, v in zip(absent, (bias, gamma, beta), strict=True)]
    neutral = [d if gone else v for gone, v, d in zip(absent, (bias, gamma, beta), (0.0, 1.0, 0.0), strict=True)]
    expected = [np.full(4, v) if np.isscalar(v) else v for v in neutral]
    for actual, wanted in zip(
        fold_batch_norm(weight, *without, mean, var), fold_batch_norm(weight, *expected, mean, var), strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_computed_in_float64_and_rounded_once(statistics, dtype):
    weight = np.random.default_rng(7).normal(size=(4, 3)).astype(dtype)
    gamma, beta, mean, var = (v.astype(np.float32) for v in statistics)
    scale = gamma.astype(float) / np.sqrt(var.astype(float) + 1e-5)
    folded_weight, folded_bias = fold_batch_norm(weight, None, gamma, beta, mean, var)
    expected = (weight.astype(float) * scale[:, None]).astype(dtype)
    np.testing.assert_array_equal(folded_weight.astype(float), expected.astype(float))
    np.testing.assert_array_equal(folded_bias.astype(float), (-mean.astype(float) * scale + beta).astype(dtype).astype(float))
    assert folded_weight.dtype == folded_bias.dtype == dtype


def test_inputs_are_left_alone(statistics):
    weight, bias = np.ones((4, 2)), np.ones(4)
    before = [a.tobytes() for a in (weight, bias, *statistics)]
    outputs = fold_batch_norm(weight, bias, *statistics)
    assert [a.tobytes() for a in (weight, bias, *statistics)] == before
    assert not any(np.shares_memory(o, a) for o in outputs for a in (weight, bias, *statistics))


def test_non_finite_statistics_stay_in_their_channel():
    mean, var = np.array([math.nan, 1.0, 2.0]), np.array([1.0, math.inf, 4.0])
    weight, bias = fold_batch_norm(np.ones((3, 2)), None, None, None, mean, var, eps=1e-12)
    assert np.isnan(bias[0])
    assert weight[1].tolist() == [0.0, 0.0]
    np.testing.assert_allclose([*weight[2], bias[2]], [0.5, 0.5, -1.0], rtol=1e-12)  # eps/var


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_are_plain_arrays(statistics):
    weight, bias = np.random.default_rng(7).normal(size=(4, 4)), np.ones(4)
    folded = fold_batch_norm(np.asmatrix(weight), bias, *statistics)
    for actual, wanted in zip(folded, fold_batch_norm(weight, bias, *statistics), strict=True):
        assert type(actual) is np.ndarray
        np.testing.assert_array_equal(actual, wanted)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\)"):
        fold_batch_norm(weight, np.asmatrix(bias), *statistics)


@pytest.mark.parametrize(("dtype", "largest"), [(np.float16, 65504.0), (np.float32, 3e38), (np.float64, 1.5e308)])
def test_what_the_dtype_cannot_hold_is_an_error(dtype, largest):
    weight = np.array([[1.0, -1.0], [largest, 1.0]], dtype)
    ones, scale = np.ones(2), np.array([1.0, 2.0])
    with pytest.raises(ValueError, match=f"folded weight has values as large as .* which {np.dtype(dtype).name} cannot hold"):
        fold_batch_norm(weight, None, scale, None, ones, ones)
    with pytest.raises(ValueError, match=f"folded bias has values as large as .* which {np.dtype(dtype).name} cannot hold"):
        fold_batch_norm(np.ones((2, 2), dtype), np.array([0.0, largest]), scale, None, ones, ones)
    # What was infinite before has not overflowed.
    weight[1] = np.inf, 1.0
    folded, _ = fold_batch_norm(weight, None, scale, None, ones, ones)
    assert np.isposinf(folded[1, 0])
    assert np.isfinite([*folded[0], folded[1, 1]]).all()


ONE, GOOD = np.ones(2), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("weight", "bias", "gamma", "beta", "mean", "var", "options", "error", "message"),
    [
        (GOOD.tolist(), None, ONE, ONE, ONE, ONE, {}, TypeError, "weight is a list"),
        (np.ma.array(GOOD), None, ONE, ONE, ONE, ONE, {}, TypeError, r"weight is a masked array.*weight\.data"),
        (None, None, ONE, ONE, ONE, ONE, {}, TypeError, "weight is None"),
        (np.array(1.0), None, ONE, ONE, ONE, ONE, {}, ValueError, r"weight has shape \(\)"),
        (GOOD, np.ma.array(ONE), ONE, ONE, ONE, ONE, {}, TypeError, r"bias is a masked array.*bias\.data"),
        (GOOD, None, ONE.astype(np.longdouble), ONE, ONE, ONE, {}, TypeError, r"gamma has dtype .*gamma\.astype\(np\.float64\)"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"axis": 0.0}, TypeError, "axis is 0.0 of type float; pass a whole number"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"axis": False}, TypeError, "axis is False of type bool"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"eps": 10**400}, ValueError, "eps is beyond"),
        (GOOD.astype(int), None, ONE, ONE, ONE, ONE, {}, TypeError, r"dtype int64.*weight\.astype\(np\.float32\)"),
        (GOOD.astype(complex), None, ONE, ONE, ONE, ONE, {}, TypeError, r"dtype complex128.*weight\.real"),
        (GOOD.astype(np.longdouble), None, ONE, ONE, ONE, ONE, {}, TypeError, r"weight has dtype .*astype\(np\.float64\)"),
        (GOOD, [0, 0], ONE, ONE, ONE, ONE, {}, TypeError, "bias is a list"),
        (GOOD, None, ONE.astype(complex), ONE, ONE, ONE, {}, TypeError, r"gamma has dtype complex128.*gamma\.real"),
        (GOOD, None, ONE, ONE, None, ONE, {}, TypeError, "mean is None; fastbn takes NumPy arrays"),
        (GOOD, None, ONE, ONE, ONE, np.ones(3), {}, ValueError, r"var has shape \(3,\).*\(2, 3\) has 2 output"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"axis": 1}, ValueError, r"has 3 output channels along axis 1"),
        (GOOD, np.ones((2, 1)), ONE, ONE, ONE, ONE, {}, ValueError, r"bias has shape \(2, 1\)"),
        (GOOD, None, ONE, np.ones(1), ONE, ONE, {}, ValueError, r"beta has shape \(1,\)"),
        (GOOD, None, ONE, ONE, ONE, np.array([1, -0.5]), {}, ValueError, "negative values .smallest: -0.5"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"axis": 2}, ValueError, "axis is 2; .* has axes -2 to 1"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"axis": -3}, ValueError, "axis is -3"),
        (np.float32(1), None, ONE, ONE, ONE, ONE, {}, TypeError, "weight is a numpy.float32"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"eps": 0}, ValueError, "eps is 0"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"eps": -1e-5}, ValueError, "eps is -1e-05"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"eps": math.nan}, ValueError, "eps is nan"),
        (GOOD, None, ONE, ONE, ONE, ONE, {"eps": math.inf}, ValueError, "eps is inf"),
    ],
)
def test_refuses(weight, bias, gamma, beta, mean, var, options, error, message):
    with pytest.raises(error, match=message):
        fold_batch_norm(weight, bias, gamma, beta, mean, var, **options)
