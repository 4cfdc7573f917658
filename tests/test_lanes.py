"""Output in float32 lanes where that is as good, in float64 lanes elsewhere: kernels/formulas.py, `float32_anchor`.

Each case names a channel that float32 arithmetic gets wrong, as the plain NumPy formula shows beside it, among channels that fit.
"""

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn
from fastbn.cpu import dispatch
from fastbn.kernels.formulas import float32_anchor

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "axis -1", "channels last view"])
# nc and short planes are columns, long planes are planes; 600 channels are more than one strip.
SHAPES = pytest.mark.parametrize("shape", [(64, 5), (9, 600), (6, 5, 7, 7), (3, 5, 27, 33), (2, 2, 300, 300)], ids=str)
MAX = float(np.finfo(np.float32).max)

# name: x's mean and standard deviation, gamma, beta, running mean, running variance
LEFT_OUT = {
    "a large bias cancels": (0, 1, 1.0, 100.0, 0.0, 1.0 / 2000),
    "x less the mean overflows": (2e38, 3e37, 1.0, 0.0, -2e38, 1e75),
    "the scale overflows": (0, 1e-38, 3e38, 0.0, 0.0, 1e-4),
    "the running mean is infinite": (0, 1, 1.0, 0.0, np.inf, 1.0),
}


def in_float32(x, gamma, beta, mean, var, eps):
    """The formula as float32 lanes compute it."""
    with np.errstate(all="ignore"):
        scale = (gamma.astype(np.float64) / np.sqrt(var + eps)).astype(np.float32)
        near = mean.astype(np.float32)
        bias = (beta - (mean - near) * scale.astype(np.float64)).astype(np.float32)
        return (x - near) * scale + bias


@pytest.mark.parametrize("case", LEFT_OUT)
@LAYOUTS
@SHAPES
def test_inference(shape, layout, case):
    centre, spread, g, b, m, v = LEFT_OUT[case]
    C, bad = shape[1], shape[1] // 2
    x = inputs.normal(shape)
    x[:, bad] = np.clip(centre + spread * inputs.normal(shape, np.float64)[:, bad], -MAX, MAX).astype(np.float32)
    gamma, beta, *_ = inputs.parameters(C)
    mean, var = np.linspace(-1, 1, C), np.linspace(0.5, 2, C)
    gamma[bad], beta[bad], mean[bad], var[bad] = g, b, m, v
    with np.errstate(invalid="ignore"):  # of infinities
        exact = reference.forward(x, gamma, beta, mean=mean, var=var, eps=1e-5).y
        exact[:, bad] = -m if np.isinf(m) else exact[:, bad]
    laid, axis = inputs.arrange(layout, x)
    y = fastbn.batch_norm_inference(laid, gamma, beta, mean, var, axis=axis)
    here = fastbn.batch_norm_inference(laid, gamma, beta, mean, var, axis=axis, out=laid)
    assert here is laid
    np.testing.assert_array_equal(here, y)
    y = np.moveaxis(y, axis, 1)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(y[~finite], exact[~finite])
    assert (np.abs(y[finite] - exact[finite]) <= 1e-6 * np.maximum(1, np.abs(exact[finite]))).all()


@pytest.mark.parametrize("case", LEFT_OUT)
def test_float32_lanes_would_be_wrong(case):
    """So that the cases above show something."""
    centre, spread, *channel = LEFT_OUT[case]
    gamma, beta, mean, var = (np.array([value]) for value in channel)
    x = np.clip(centre + spread * inputs.normal((1000, 1), np.float64), -MAX, MAX).astype(np.float32)
    assert np.isnan(float32_anchor(mean[0], var[0], gamma[0] / np.sqrt(var[0] + 1e-5), beta[0]))
    with np.errstate(invalid="ignore"):
        exact = reference.forward(x, gamma, beta, mean=mean, var=var, eps=1e-5).y if np.isfinite(mean[0]) else np.full(x.shape, -np.inf)
    plain = in_float32(x, gamma, beta, mean, var, 1e-5)
    with np.errstate(all="ignore"):
        fine = (np.abs(plain - exact) <= 1e-6 * np.maximum(1, np.abs(exact))) | (plain == exact)
    assert not fine.all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("beta", [2.99, 3.01, -100.0, 1e20])
@LAYOUTS
@SHAPES
def test_training_with_a_large_bias(shape, layout, beta, activation):
    """Outliers reach the bias, so that it cancels to nearly nothing."""
    rng = np.random.default_rng(3)
    x, axis = inputs.arrange(layout, rng.standard_cauchy(shape).clip(-1e4, 1e4).astype(np.float32))
    C = shape[1]
    betas = np.zeros(C, np.float32)
    betas[C // 2] = beta
    checks.check_both(x, np.ones(C, np.float32), betas, axis=axis, activation=activation)


def test_what_fits():
    # mean, var, scale, beta
    assert float32_anchor(0.5, 1.0, 1.0, 0.0) == 0.0
    assert float32_anchor(2.0, 1.0, 1.0, 1.0) == 0.0  # the bias is -1 instead of 1
    assert float32_anchor(5.0, 1.0, 1.0, 0.0) == 5.0  # it would be -5
    assert float32_anchor(1e-3, 0.0, 300.0, 0.0) == 1e-3  # a constant channel
    assert float32_anchor(1e6, 1.0, 1.0, 0.0) == 1e6  # 1e6 standard deviations from 0: rounding it puts 0.06 into the bias
    assert float32_anchor(0.0, 1.0, 0.0, 3.0) == 0.0  # y is beta
    assert float32_anchor(0.0, 1.0, np.nan, 0.0) == 0.0
    assert float32_anchor(np.nan, np.nan, np.nan, 0.0) == 0.0
    for mean, scale in [(np.inf, 1), (2.0**104, 1), (0, 1e39), (0, 1e-39), (1e8, 1), (0, np.inf)]:
        assert np.isnan(float32_anchor(float(mean), 1.0, float(scale), 0.0)), (mean, scale)
    for beta in (3.1, np.nan, np.inf):
        assert np.isnan(float32_anchor(0.0, 1.0, 1.0, beta))


@LAYOUTS
@SHAPES
def test_a_constant_channel_is_beta(shape, layout):
    """Exactly, also where x * scale is small enough for an anchor of 0."""
    x = inputs.normal(shape)
    C = shape[1]
    gamma, beta, *_ = inputs.parameters(C)
    for c in range(0, C, 2):
        x[:, c] = [0.005, -0.001, 0.0, 3.3, 1e-12][c % 5]
    laid, axis = inputs.arrange(layout, x)
    y = np.moveaxis(fastbn.batch_norm_forward(laid, gamma, beta, axis=axis)[0], axis, 1)
    for c in range(0, C, 2):
        np.testing.assert_array_equal(y[:, c], beta[c])


@pytest.mark.parametrize(("mean", "gamma", "beta"), [(0, 1, 0), (0, 1.5, 0.25), (0.5, 1, 0.5), (2, 1, 1), (5, 1, 0), (0, 1, 2)])
def test_errors_of_ordinary_values(mean, gamma, beta):
    """What numerics.md says: 1.5e-7 at most, and 3e-8 in the mean, as PyTorch or better."""
    x = (mean + inputs.normal((64, 2, 64, 64), np.float64)).astype(np.float32)
    g, b = np.full(2, gamma, np.float32), np.full(2, beta, np.float32)
    exact = reference.forward(x, g, b).y
    error = np.abs(fastbn.batch_norm_forward(x, g, b)[0] - exact) / np.maximum(1, np.abs(exact))
    assert error.max() <= 1.6e-7
    assert np.sqrt(np.square(error).mean()) <= 5e-8


def test_the_bound_is_needed():
    """The worst rounding in float32 lanes over random channels comes near 1e-6 at |bias| = 3: the limit is not idle."""
    rng = np.random.default_rng(0)
    scale, bias = rng.uniform(0.5, 2, 2000), rng.uniform(2.5, 3, 2000)
    x = (-(bias / scale) + rng.uniform(-0.2, 0.2, (500, 2000))).astype(np.float32)
    y = in_float32(x, np.ones(2000), bias, np.zeros(2000), 1 / scale**2, 0.0)
    error = np.abs(y - (x * scale + bias)) / np.maximum(1, np.abs(x * scale + bias))
    assert 2e-7 < error.max() < 1e-6


# Which channels float32 lanes leave out: all, or the ends of vectors of sixteen, stretches that cross them, and the last.
LEFT = {"all": lambda c, C: True, "some": lambda c, C: c % 16 in (0, 14, 15) or c == C - 1}
# As SHAPES; the last three are large enough for several threads.
IN_PLACE = [(9, 5), (9, 600), (6, 37, 7, 7), (3, 5, 27, 33), (1400, 600), (1000, 17, 7, 7), (4, 5, 200, 200)]


@pytest.fixture
def three_threads():
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(3)
    yield
    fastbn.set_num_threads(before)


@pytest.fixture
def programs(monkeypatch):
    """What runs, by name of the operation."""
    names, program = [], dispatch.program
    monkeypatch.setattr(dispatch, "program", lambda run, *rest: names.append(run) or program(run, *rest))
    return names


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("left_out", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("feature", ["plain", "relu", "residual"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("layout", ["contiguous", "axis -1", "channel slice"])
@pytest.mark.parametrize("shape", IN_PLACE, ids=str)
def test_in_place(shape, layout, dtype, feature, left_out, programs):
    """Channels that float32 lanes leave out are computed after the others, which have been written over x by then. The same bits."""
    C = shape[1]
    values = inputs.normal(shape).astype(dtype)
    gamma, beta, mean, var = inputs.parameters(C)
    for c in range(C):
        if left_out(c, C):
            beta[c] = -100.0 if c % 2 else 100.0
    (x, axis), (there, _) = inputs.arrange(layout, values.copy()), inputs.arrange(layout, values)
    residual = inputs.arrange(layout, inputs.normal(shape, seed=1).astype(dtype))[0] if feature == "residual" else None
    options = {"axis": axis, "activation": "relu" if feature == "relu" else None, "residual": residual}
    expected = fastbn.batch_norm_inference(there, gamma, beta, mean, var, **options)
    assert ("leftovers" in programs) == (dtype != np.float64 and residual is None)
    assert (expected.min() >= 0.0) == (feature == "relu")
    before = checks.snapshot(there, gamma, beta, mean, var, residual)
    assert fastbn.batch_norm_inference(x, gamma, beta, mean, var, out=x, **options) is x
    np.testing.assert_array_equal(x, expected)
    checks.assert_unchanged(before)
    if layout == "channel slice":  # what lies around it
        assert (x.base[:, :1] == 777).all()
        assert (x.base[:, -2:] == 777).all()
