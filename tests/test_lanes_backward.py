"""Backward of float32 in float32 lanes, where that is as good: kernels/formulas.py, `float32_products_hold`.

Each case is a channel that is hard on float32 arithmetic, among ordinary ones. One bound for all: 1e-6, as everywhere.
"""

import checks
import inputs
import numpy as np
import pytest

import fastbn
from fastbn.cpu import dispatch
from fastbn.kernels.formulas import backward_coefficients, float32_products_hold

# Planes that the caches hold, which are taken channel by channel: short ones, of whole vectors or not, and longer than what is prefetched.
SHAPES = [(16, 7, 14, 14), (16, 6, 12, 12), (5, 9, 27, 33), (2, 17, 56, 56), (2, 9, 200, 200)]
LAYOUTS = ["contiguous", "channel slice", "unaligned"]


def outliers(rng, n):
    """Values around -1 and 1, and a few outliers: with dy of x's sign, b * (x - mean) reaches ten times the size of a * dy."""
    x = rng.normal(1, 0.1, n) * np.where(rng.random(n) < 0.5, -1, 1)
    x[rng.permutation(n)[: 1 + n // 1000]] *= 14
    return x, np.sign(x)


# name: (x, dy) of n values; and whether float32 lanes leave the channel out if there are 10,000
CHANNELS = {
    "ordinary": (lambda rng, n: rng.standard_normal((2, n)), False),
    "dy goes with x": (lambda rng, n: (x := rng.standard_normal(n), x), False),
    "dy is the sign of x": (lambda rng, n: (x := rng.standard_normal(n), np.sign(x)), True),
    "outliers and the sign of x": (outliers, True),
    "dy is constant": (lambda rng, n: (rng.standard_normal(n), np.full(n, 0.1)), False),
    "the mean is 1e6 standard deviations off": (lambda rng, n: (1e6 + rng.standard_normal(n), rng.standard_normal(n)), False),
    "small dy": (lambda rng, n: rng.standard_normal((2, n)) * [[1.0], [1e-20]], False),
    "products vanish": (lambda rng, n: rng.standard_normal((2, n)) * [[1e-15], [1e-25]], True),
    "products overflow": (lambda rng, n: rng.standard_normal((2, n)) * [[1e20], [1e20]], True),
    "dy is 0": (lambda rng, n: (rng.standard_normal(n), np.zeros(n)), False),
    "x is constant": (lambda rng, n: (np.full(n, 3.3), rng.standard_normal(n)), False),
}


def with_channel(case, shape):
    """Ordinary x and dy, but for the channel in the middle."""
    x, dy = inputs.normal(shape), inputs.normal(shape, seed=1)
    rng = np.random.default_rng(inputs.seed_of(case, shape))
    middle = x[:, shape[1] // 2]
    for array, values in zip((x, dy), CHANNELS[case][0](rng, middle.size), strict=True):
        array[:, shape[1] // 2] = np.asarray(values).reshape(middle.shape)
    return x, dy


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CHANNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hard_channel(shape, case, layout, activation):
    x, dy = with_channel(case, shape)
    gamma, beta, *_ = inputs.parameters(shape[1])
    (x, axis), (dy, _) = inputs.arrange(layout, x), inputs.arrange(layout, dy)
    _, ctx, found = checks.check_both(x, gamma, beta, dy=dy, axis=axis, activation=activation)
    # in the place of dy: what is computed again must not have been written before
    there = dy.copy(order="K")
    again = fastbn.batch_norm_backward(there, ctx, out=there)
    for a, b in zip(again, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("of", ["x", "dy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_finite_stays_in_its_channel(shape, of, poison):
    """The others have the same bits without it."""
    x, dy = with_channel("ordinary", shape)
    c = shape[1] // 2
    rest = np.arange(shape[1]) != c
    results = []
    for poisoned in (False, True):
        if poisoned:
            (x if of == "x" else dy)[(shape[0] // 2, c) + (0,) * (len(shape) - 2)] = poison
        _, ctx = fastbn.batch_norm_forward(x)
        results.append(fastbn.batch_norm_backward(dy, ctx)[0])
    np.testing.assert_array_equal(results[1][:, rest], results[0][:, rest])
    assert np.isnan(results[1][:, c]).any()


def test_the_lanes_are_float32s(monkeypatch, constants):
    """So that this file tests what it says: below STREAM_FROM bytes the variant is that of float32 lanes, beyond it is not."""
    constants()  # a plan asks for its program once
    present, program = [], dispatch.program
    monkeypatch.setattr(dispatch, "program", lambda *key: present.append(key[-1]) or program(*key))
    for shape, there in (*((shape, True) for shape in SHAPES), ((200, 8, 37, 41), False)):
        x = inputs.normal(shape)
        _, ctx = fastbn.batch_norm_forward(x)
        fastbn.batch_norm_backward(x, ctx)
        assert ("lanes32" in present[-1]) == there


def coefficients(x, dy):
    """What a channel's decision is made of: a, b, c, the largest dy, the largest deviation, standard deviation and count."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    invstd = 1 / np.sqrt(x.var() + 1e-5)
    a, b, c = backward_coefficients(1.0, invstd, dy.sum(), (dy * (x - x.mean())).sum(), x.size)
    return a, b, c, np.abs(dy).max(), np.abs(x - x.mean()).max(), x.std(), x.size


@pytest.mark.parametrize("case", CHANNELS)
def test_which_channels_are_left_out(case):
    values, left_out = CHANNELS[case]
    x, dy = (np.asarray(v, np.float32) for v in values(np.random.default_rng(0), 10_000))
    a, b, _, *rest = coefficients(x, dy)
    assert float32_products_hold(a, b, *rest) == (not left_out)


def in_float32(x, dy, a, b, c):
    """dx as float32 lanes compute it, but for the fused multiply-adds; its error over what the bound is of."""
    mean = x.astype(np.float64).mean()
    near = np.float32(mean)
    constant = np.float32(c - b * (mean - np.float64(near)))
    dx = np.float32(a) * dy + (np.float32(b) * (x - near) + constant)
    exact = a * dy.astype(np.float64) + b * (x.astype(np.float64) - mean) + c
    return np.abs(dx - exact).max() / (a * np.abs(dy).max())


def test_float32_lanes_would_be_wrong():
    """So that the case which is left out for its size shows something."""
    worst = 0.0
    for seed in range(20):
        x, dy = (np.asarray(v, np.float32) for v in outliers(np.random.default_rng(seed), 10_000))
        worst = max(worst, in_float32(x, dy, *coefficients(x, dy)[:3]))
    assert worst > 1e-6


def test_the_limit_is_needed():
    """Random channels at the limit, abs(b) * farthest = 2 * abs(a) * largest: the worst comes near 1e-6, and stays below."""
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(3000):
        x = rng.standard_normal(64).astype(np.float32) * np.float32(rng.uniform(0.5, 2)) + np.float32(rng.uniform(-9, 9))
        dy = rng.uniform(-1, 1, 64).astype(np.float32)
        a = rng.uniform(0.5, 2)
        largest, farthest = np.abs(dy).max(), np.abs(x - x.mean()).max()
        worst = max(worst, in_float32(x, dy, a, rng.choice([-2, 2]) * a * largest / farthest, rng.choice([-1, 1]) * a * largest))
    assert 3e-7 < worst < 8e-7
