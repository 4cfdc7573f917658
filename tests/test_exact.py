"""Inputs whose statistics are exact in binary, compared bit for bit; and the same bits on every run.

After oneDNN's benchdnn for batch normalisation: the data is built so that mean, variance and 1/sqrt(var + eps) are
dyadic rationals with few bits. Then every correct order of summation gives the same, exactly representable result,
and an error of one unit in the last place is an error of the implementation.
"""

import inputs
import numpy as np
import pytest

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
# (k, eps): values mean +- 2^k have variance 4^k; eps lifts it to an even power of two.
SPREADS = {"+-1, eps 3": (0, 3.0), "+-2, eps 12": (1, 12.0), "+-1/2, eps 3/4": (-1, 0.75), "+-64, eps 12288": (6, 12288.0)}
# Counts that are powers of two, so that blocks, lanes and their merges in any order stay exact in float64 too.
POWERS = {
    "nc": (64, 5),
    "nc wide": (16, 128),
    "ncl": (4, 3, 32),
    "planes 8x8": (8, 6, 8, 8),
    "planes 32x32": (4, 2, 32, 32),
    "ncdhw": (2, 3, 4, 4, 8),
    "channel of 65536": (1, 1, 256, 256),
}
# Even counts of any size: a float32 result hides a rounding of a float64 statistic.
EVEN = {
    "nc": (30, 7),
    "planes 7x7": (4, 40, 7, 7),
    "planes 27x33": (2, 3, 27, 33),
    "planes 14x14": (3, 17, 14, 14),
    "mb2 c128 h2": (2, 128, 2, 2),
    "six axes": (2, 3, 2, 3, 2, 3),
}


def exact_case(shape, dtype, k, eps):
    """x, gamma, beta and the exact y: signs alternate along the values of a channel, so that each channel balances."""
    channels = shape[1]
    positions = np.arange(np.prod(shape) // channels).reshape((shape[0], 1, *shape[2:]))
    channel = np.arange(channels).reshape((1, -1) + (1,) * (len(shape) - 2))
    sign = np.where((positions + channel) % 2 == 0, 1.0, -1.0)
    mean = (channel % 7 - 3.0) * 4.0
    gamma = np.choose(np.arange(channels) % 4, [1.0, -0.5, 2.0, 4.0])
    beta = np.choose(np.arange(channels) % 3, [0.125, -0.125, 0.0625])  # never cancels gamma * xhat to a zero
    invstd = 1 / np.sqrt(4.0**k + eps)
    assert np.frexp(invstd)[0] == 0.5, "the case is not exact"
    along = (1, -1) + (1,) * (len(shape) - 2)
    y = sign * 2.0**k * invstd * gamma.reshape(along) + beta.reshape(along)
    x = mean + sign * 2.0**k
    return (np.ascontiguousarray(a.astype(dtype)) for a in (x, gamma, beta, y))


def arrangements(x):
    """The same values channels first, as a channels-last view, and with axis = -1."""
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return [(x.copy(), 1), (np.moveaxis(last.copy(), -1, 1), 1), (last, -1)]  # apart: some are overwritten in place


def assert_same_values_and_signs(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param(s, d, id=f"{n}, {d.__name__}") for n, s in POWERS.items() for d in inputs.FLOATS]
    + [pytest.param(s, np.float32, id=f"{n}, float32, even count") for n, s in EVEN.items()],
)
def test_forward(shape, dtype, spread):
    k, eps = SPREADS[spread]
    x, gamma, beta, expected = exact_case(shape, dtype, k, eps)
    for arranged, axis in arrangements(x):
        y, ctx = fastbn.batch_norm_forward(arranged, gamma, beta, eps=eps, axis=axis)
        assert_same_values_and_signs(np.moveaxis(y, axis, 1), expected)
        here = fastbn.batch_norm_inference(arranged, gamma, beta, ctx.mean, ctx.var, eps=eps, axis=axis, out=arranged)
        assert_same_values_and_signs(np.moveaxis(here, axis, 1), expected)


@DTYPES
@pytest.mark.parametrize("shape", POWERS.values(), ids=POWERS)
def test_statistics(shape, dtype):
    x, *_ = exact_case(shape, dtype, 0, 3.0)
    for arranged, axis in arrangements(x):
        channels = np.arange(shape[1])
        mean, var = np.full(shape[1], 8.0), np.full(shape[1], 16.0)
        _, ctx = fastbn.batch_norm_forward(arranged, None, None, mean, var, axis=axis, momentum=0.5, unbiased=False)
        np.testing.assert_array_equal(ctx.mean, (channels % 7 - 3.0) * 4.0)
        np.testing.assert_array_equal(ctx.var, 1.0)
        np.testing.assert_array_equal(mean, 4 + (channels % 7 - 3.0) * 2.0)
        np.testing.assert_array_equal(var, 8.5)


@DTYPES
@pytest.mark.parametrize("shape", POWERS.values(), ids=POWERS)
def test_backward(shape, dtype):
    # dy of small integers: its sums divided by a power-of-two count are dyadic, and dx has at most 24 bits.
    if np.prod(shape) // shape[1] > 4096 and dtype == np.float32:
        shape = (1, 1, 64, 64)  # more values than that need more bits than float32 has
    x, gamma, beta, _ = exact_case(shape, dtype, 0, 3.0)
    dy = np.random.default_rng(3).integers(-4, 5, shape).astype(dtype)
    axes = (0, *range(2, len(shape)))
    along = (1, -1) + (1,) * (len(shape) - 2)
    g, xhat = dy.astype(np.float64), (x - x.mean(axis=axes, keepdims=True, dtype=np.float64)) / 2
    dbeta, dgamma, n = g.sum(axis=axes), (g * xhat).sum(axis=axes), x.size // shape[1]
    expected = gamma.reshape(along) / 2 * (g - dbeta.reshape(along) / n - xhat * dgamma.reshape(along) / n)
    assert (expected == expected.astype(dtype)).all(), "the case is not exact"
    for (arranged, axis), (dy_arranged, _) in zip(arrangements(x), arrangements(dy), strict=True):
        _, ctx = fastbn.batch_norm_forward(arranged, gamma, beta, eps=3.0, axis=axis)
        for out in (None, dy_arranged):
            dx, dgamma_, dbeta_ = fastbn.batch_norm_backward(dy_arranged, ctx, out=out)
            np.testing.assert_array_equal(np.moveaxis(dx, axis, 1), expected)
            np.testing.assert_array_equal(dgamma_, dgamma)
            np.testing.assert_array_equal(dbeta_, dbeta)


@DTYPES
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e8, 1e-30, 1e25, 16777217.0])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7, 7), (2, 5, 61, 67)], ids=str)
def test_a_constant_channel_gives_exactly_beta(shape, value, dtype):
    x = np.full(shape, value, dtype)
    gamma, beta, *_ = inputs.parameters(5, dtype)
    for arranged, axis in arrangements(x):
        y, ctx = fastbn.batch_norm_forward(arranged, gamma, beta, axis=axis)
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), np.broadcast_to(beta, np.moveaxis(y, axis, -1).shape))
        np.testing.assert_array_equal(ctx.mean, x[0].reshape(5, -1)[:, 0].astype(np.float64))
        np.testing.assert_array_equal(ctx.var, 0)


@DTYPES
@pytest.mark.parametrize("shape", [(64, 33), (4, 9, 27, 33), (3, 40, 7, 7), (2, 1, 300, 301)], ids=str)
def test_every_run_gives_the_same_bits(shape, dtype):
    x, dy = inputs.values("cauchy", shape, dtype), inputs.normal(shape, dtype, seed=1)
    for (arranged, axis), (dy_arranged, _) in zip(arrangements(x), arrangements(dy), strict=True):
        gamma, beta, *_ = inputs.parameters(shape[1], dtype)
        seen = set()
        for _ in range(4):
            mean, var = np.zeros(shape[1]), np.ones(shape[1])
            y, ctx = fastbn.batch_norm_forward(arranged, gamma, beta, mean, var, axis=axis)
            results = (y, mean, var, ctx.mean, ctx.var, ctx.invstd, *fastbn.batch_norm_backward(dy_arranged, ctx))
            seen.add(b"".join(a.tobytes() for a in results))
        assert len(seen) == 1
