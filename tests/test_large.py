"""Arrays of more than 2**31 values: every offset is 64 bits wide."""

import numpy as np
import psutil
import pytest

import fastbn

VALUES = 2**31 + 2**12
NEEDED = 12 << 30

pytestmark = pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED, reason=f"needs {NEEDED >> 30} GiB of free memory for 2**31 float16 values, twice"
)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_last_values_count(axis):
    """Zeros, which cost no memory until they are written, and a few ones at the far end."""
    shape = (1, 2, VALUES // 2) if axis == 1 else (VALUES // 64, 64)
    x = np.zeros(shape, np.float16)
    flat = x.reshape(-1)
    flat[-64:] = 1  # of the last channel, or one in every channel
    m = fastbn.moments(x, axis=axis)
    n = VALUES // 2 if axis == 1 else VALUES // 64
    ones = np.array([0, 64]) if axis == 1 else np.ones(64)
    assert m.count == n
    # float64 sums of ones: exact but for the division
    np.testing.assert_allclose(m.mean, ones / n, rtol=1e-14)
    np.testing.assert_allclose(m.m2, ones - ones**2 / n, rtol=1e-12)


def test_in_place_inference_reaches_the_end():
    x = np.zeros((1, 1, VALUES), np.float16)
    x[..., -1], x[..., 2**31] = 3, 5
    y = fastbn.batch_norm_inference(x, None, None, np.ones(1), np.full(1, 4.0), eps=1e-12, out=x)
    assert y is x
    assert y[0, 0, [0, 2**31 - 1, 2**31, VALUES - 2, VALUES - 1]].tolist() == [-0.5, -0.5, 2, -0.5, 1]
