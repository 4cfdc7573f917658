"""fastbn.moments: count, mean and m2 of every channel, in one pass, mergeable."""

import pickle

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])


def assert_moments(m, x, axis=1, sample_weight=None):
    """Against the reference, with the bounds of ctx.mean and ctx.var."""
    count, mean, m2 = reference.moments(x, axis=axis, sample_weight=sample_weight)
    np.testing.assert_allclose(float(m.count), float(count), rtol=1e-14)  # a sum of weights may round
    assert m.mean.dtype == m.m2.dtype == np.float64
    assert m.mean.shape == m.m2.shape == (x.shape[axis],)
    bound = checks.STATISTICS[checks.native(x.dtype)]
    with np.errstate(invalid="ignore"):
        mean_bound = bound * np.sqrt(m2 / count) + np.abs(mean) * 2.0**-52
        finite = np.isfinite(m2)
    checks.assert_within(m.mean[finite], mean[finite], mean_bound[finite], "Moments.mean", x, axis)
    m2_bound = bound * m2 + np.finfo(np.float64).smallest_subnormal  # subnormal float64 values have squares of zero
    checks.assert_within(m.m2[finite], m2[finite], m2_bound[finite], "Moments.m2", x, axis)
    assert not np.isfinite(m.m2[~finite]).any()


@DTYPES
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", inputs.SHAPES.values(), ids=inputs.SHAPES)
def test_shapes(shape, axis, dtype):
    x = inputs.normal(shape, dtype)
    assert_moments(fastbn.moments(x, axis=axis), x, axis)


@DTYPES
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout, dtype):
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7), dtype))
    before = checks.snapshot(x)
    assert_moments(fastbn.moments(x, axis=axis), x, axis)
    checks.assert_unchanged(before)


@DTYPES
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("kind", inputs.VALUES)
def test_values(kind, axis, dtype):
    x = inputs.values(kind, (12, 5, 9, 11), dtype)
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    assert_moments(fastbn.moments(x, axis=axis), x, axis)


@DTYPES
@pytest.mark.parametrize("axis", [1, -1])
def test_weights(axis, dtype):
    x = np.moveaxis(inputs.normal((12, 5, 9, 11), dtype), 1, axis).copy()
    rng = np.random.default_rng(2)
    for w in (rng.random(12) < 0.5, rng.random((12, 9, 11)) < 0.5, rng.uniform(0, 3, 12), rng.uniform(0, 3, (12, 9, 11))):
        assert_moments(fastbn.moments(x, axis=axis, sample_weight=w), x, axis, w)


def test_equals_the_statistics_of_the_forward():
    x = inputs.normal((6, 5, 7))
    _, ctx = fastbn.batch_norm_forward(x)
    m = fastbn.moments(x)
    assert m.count == ctx.count == 42
    np.testing.assert_array_equal(m.mean, ctx.mean)
    np.testing.assert_allclose(m.var(), ctx.var, rtol=4e-16)
    np.testing.assert_allclose(m.var(ddof=1), ctx.var * 42 / 41, rtol=1e-15)


@DTYPES
@pytest.mark.parametrize("kind", ["normal", "1e6 +- 1", "cauchy", "1e25"])
def test_merging_chunks_equals_the_whole(kind, dtype):
    x = inputs.values(kind, (50, 4, 6, 7), dtype)
    total = fastbn.moments(x[:0])  # an empty chunk counts for nothing
    for start, stop in [(0, 1), (1, 8), (8, 8), (8, 37), (37, 50)]:
        total = total + fastbn.moments(x[start:stop])
    assert total.count == 50 * 6 * 7
    assert_moments(total, x)


def test_chunks_of_a_memory_map(tmp_path):
    whole = np.memmap(tmp_path / "data", np.float32, mode="w+", shape=(64, 8, 8, 3))
    whole[...] = inputs.normal((64, 8, 8, 3)) * 50 + 120
    chunks = [fastbn.moments(whole[k : k + 10], axis=-1) for k in range(0, 64, 10)]
    chunks = [pickle.loads(pickle.dumps(m)) for m in chunks]  # as processes hand them over
    assert_moments(sum(chunks[1:], chunks[0]), whole, -1)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape):
    x = inputs.normal(shape)
    m = fastbn.moments(x)
    assert m.count == 1
    np.testing.assert_array_equal(m.mean, x.ravel())
    np.testing.assert_array_equal(m.m2, 0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_empty(shape):
    m = fastbn.moments(np.empty(shape, np.float32))
    assert m.count == 0
    assert m.mean.shape == m.m2.shape == (3,)
    x = inputs.normal((5, 3))
    merged = m + fastbn.moments(x)
    assert_moments(merged, x)
