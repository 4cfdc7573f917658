"""Small arrays on the roads of large ones: of planes that are streamed, one group of channels is written while the next is read."""

import checks
import inputs
import numpy as np
import pytest

import fastbn

# Channels in one group and in many; planes that end with a vector and within one, shorter than what is prefetched and longer.
SHAPES = [(3, 17, 16, 16), (9, 33, 14, 14), (3, 9, 27, 33), (2, 8, 56, 56), (5, 40, 29, 31)]


@pytest.mark.parametrize("features", ["", "relu", "residual", "relu residual", "weights", "weights relu residual"])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("kind", ["normal", "1e6 +- 1", "first value 1e5"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_in_memory(shape, kind, dtype, features, constants):
    constants(STREAM_FROM=0, CACHE=4 * shape[0] * shape[2] * shape[3] * 16)
    x = inputs.values(kind, shape, dtype)
    e = fastbn.explain(x)
    assert (e.family, e.road, e.backward_road) == ("planes", "channels", "channels")
    given = {"activation": "relu"} if "relu" in features else {}
    if "residual" in features:
        given["residual"] = inputs.normal(shape, dtype, seed=2)
    if "weights" in features:
        given["sample_weight"] = np.random.default_rng(3).uniform(0.5, 2, shape[0])
    checks.check_both(x, *inputs.parameters(shape[1], dtype)[:2], **given)


@pytest.mark.parametrize("dtype", [*inputs.FLOATS, np.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_stays_in_its_channel(shape, dtype, constants):
    constants(STREAM_FROM=0, CACHE=4 * shape[0] * shape[2] * shape[3] * 16)
    x, dy = (inputs.normal(shape, seed=seed).astype(dtype) for seed in (0, 1))
    results = []
    for value in (1.0, np.nan):
        x[1, 5, 3, 4] = value
        y, ctx = fastbn.batch_norm_forward(x)
        dx = fastbn.batch_norm_backward(dy, ctx)[0]
        assert np.isnan(y[:, 5]).all() == np.isnan(dx[:, 5]).all() == np.isnan(value)
        results.append((np.delete(y, 5, axis=1), np.delete(dx, 5, axis=1)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
