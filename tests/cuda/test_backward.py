"""Backward kernels on the CUDA simulator against longdouble, given the forward's activation bits."""

from dataclasses import replace

import numpy as np
import pytest

from fastbn.kernels.cuda import plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(2, 3, 256), (3, 2, 60), (5, 2, 49), (1, 5, 2), (70, 8, 1), (33, 3, 1), (17, 21, 1)]
# dx within bound * max |gamma * invstd * dy|, sums within bound * the sum of their terms' sizes: 1e-6 is the contract, and float64
# keeps the mean as two words, so that 1e-13 holds. Half types round dx itself: half a unit in the last place of up to 4 times dy.
BOUNDS = {"float32": 1e-6, "float64": 1e-13, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def run(backend, exact, values, shape, dtype, relu=False, residual=False, training=True, in_place=False, offset=False):
    rng = np.random.default_rng(12)
    C = shape[1]
    x, dy = exact.encode(values, dtype), exact.encode(rng.normal(0.3, 1, shape), dtype)
    added = exact.encode(rng.normal(0, 1, shape), dtype) if residual else None
    parameters = "float64" if dtype == "float64" else "float32"
    gamma, beta = rng.normal(1, 0.5, C).astype(parameters), rng.normal(0, 1, C).astype(parameters)
    statistics = {}
    if not training:
        statistics = {"running_mean": rng.normal(0, 1, C), "running_var": rng.uniform(0.5, 2, C), "training": False}
    y = np.empty_like(x)
    state = backend.forward(x, y, shape, gamma=gamma, beta=beta, relu=relu, residual=added, dtype=dtype, **statistics)
    masked = exact.decode(dy, dtype)
    if relu:
        masked = np.where(exact.decode(y, dtype) > 0, masked, 0)
    truth = exact.decode(x, dtype)
    mean, var = statistics.get("running_mean"), statistics.get("running_var")
    if training:
        _, mean, var = exact.forward(truth, gamma, beta)
    wanted, dgamma, dbeta, size_gamma, size_beta = exact.backward(truth, masked, gamma, mean, var, frozen=not training)
    if offset:  # dy off a 16-byte boundary
        room = np.empty(dy.size + 16, dy.dtype)
        start = next(i for i in range(16) if (room.ctypes.data + dy.itemsize * i) % 16 == dy.itemsize)
        dy = room[start:][: dy.size].reshape(shape)
        dy[...] = exact.encode(np.random.default_rng(12).normal(0.3, 1, shape), dtype)
    dx = dy if in_place else np.empty_like(x)
    dresidual = np.empty_like(x) if residual else None
    got_gamma, got_beta = np.empty_like(gamma), np.empty_like(beta)
    sums = backend.backward(dy, dx, state, dgamma=got_gamma, dbeta=got_beta, dresidual=dresidual)
    bound = BOUNDS[dtype]
    scale = np.abs(gamma[:, None] / np.sqrt(var[:, None] + np.longdouble(1e-5)) * masked).max()
    assert np.abs(exact.decode(dx, dtype) - wanted).max() <= bound * scale
    sum_bound = min(bound, 1e-6)
    assert (np.abs(got_gamma - dgamma) <= sum_bound * size_gamma).all()
    assert (np.abs(got_beta - dbeta) <= sum_bound * size_beta).all()
    assert (np.abs(sums[0] - dbeta) <= sum_bound * size_beta).all()
    if residual:
        np.testing.assert_array_equal(exact.decode(dresidual, dtype), masked)
    return state, dx


# The persistent kernels take planes of float32 and half types.
FLOAT32 = [(False, shape) for shape in SHAPES] + [(True, shape) for shape in SHAPES if shape[2] > 1]
FUSED = [(road, shape) for road in (False, True) for shape in [(3, 2, 60), (3, 2, 25), (2, 2, 192), (35, 8, 1), (33, 3, 1)]]
HALF = [(False, (5, 2, 49)), (False, (3, 2, 120)), (True, (3, 2, 120)), (False, (70, 8, 1)), (False, (17, 21, 1))]
ROADS = [(*road, "float32") for road in FLOAT32] + [(False, shape, "float64") for shape in SHAPES]
ROADS += [(*road, dtype) for road in HALF for dtype in ("float16", "bfloat16")]


@pytest.mark.parametrize(("persistent", "shape", "dtype"), ROADS, ids=str)
def test_gradients(backend, exact, shape, dtype, persistent):
    run(backend(persistent), exact, np.random.default_rng(1).normal(3, 2, shape), shape, dtype)


@pytest.mark.parametrize(("persistent", "shape"), [r for r in FUSED if r[1][2] > 1 or not r[0]], ids=str)
@pytest.mark.parametrize("features", ["relu", "residual", "relu residual"])
def test_fused_features(backend, exact, shape, features, persistent):
    flags = dict.fromkeys(features.split(), True)
    run(backend(persistent), exact, np.random.default_rng(2).normal(0, 2, shape), shape, "float32", **flags)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 3, 1)], ids=str)
def test_frozen_statistics(backend, exact, shape, relu):
    values = np.random.default_rng(3).normal(0, 2, shape)
    for persistent in (False, True):
        run(backend(persistent), exact, values, shape, "float32", relu=relu, residual=relu, training=False)


@pytest.mark.parametrize("scale", [1e25, 1e-20])
@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 3, 1)], ids=str)
def test_hard_data(backend, exact, shape, scale):
    for persistent in (False, True):
        run(backend(persistent), exact, scale * np.random.default_rng(4).normal(0, 1, shape), shape, "float32")


def test_mean_a_million_times_the_deviation(backend, exact):
    values = 1e6 + np.random.default_rng(5).normal(0, 1, (3, 2, 60))
    run(backend(False), exact, values, values.shape, "float32")


@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 8, 1)], ids=str)
def test_dx_in_the_memory_of_dy(backend, exact, shape):
    for persistent in (False, True):
        run(backend(persistent), exact, np.random.default_rng(6).normal(0, 1, shape), shape, "float32", relu=True, in_place=True)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place"])
def test_dy_off_a_16_byte_boundary(backend, exact, relu, in_place):
    values = np.random.default_rng(7).normal(0, 1, (3, 2, 60))
    run(backend(False), exact, values, values.shape, "float32", relu=relu, residual=relu, offset=True, in_place=in_place)


@pytest.mark.parametrize("shape", [(4, 2, 300), (130, 4, 1)], ids=str)
def test_one_state_used_twice_gives_the_same_bits(backend, shape):
    rng = np.random.default_rng(8)
    x, dy = rng.normal(0, 1, (2, *shape)).astype(np.float32)
    module = backend(False)
    state = module.forward(x, np.empty_like(x), shape, gamma=np.ones(shape[1], np.float32), relu=True)
    results = []
    for _ in range(2):
        dx, dgamma = np.empty_like(x), np.empty(shape[1], np.float32)
        module.backward(dy, dx, state, dgamma=dgamma)
        results.append((dx.tobytes(), dgamma.tobytes()))
    assert results[0] == results[1]


def test_sums_of_equal_terms_do_not_drift(backend, monkeypatch):
    # 0.1 rounds to the same side at each addition: one block of 4 threads, each with 300 tiles to add up.
    shape = (8, 1, 4800)
    x = np.random.default_rng(9).normal(0, 1, shape).astype(np.float32)
    dy = np.full(shape, 0.1, np.float32)
    module = backend(False)
    monkeypatch.setattr(plan, "DEFAULT", replace(plan.DEFAULT, threads=4, blocks=1))
    state = module.forward(x, np.empty_like(x), shape)
    sums = module.backward(dy, np.empty_like(x), state)
    assert abs(sums[0, 0] / (float(np.float32(0.1)) * 38400) - 1) <= 1e-6  # the contract


def test_a_nan_stays_in_its_channel(backend):
    rng = np.random.default_rng(10)
    x, dy = rng.normal(0, 1, (2, 3, 3, 60)).astype(np.float32)
    dy[1, 2, 7] = np.nan
    for persistent in (False, True):
        module = backend(persistent)
        state = module.forward(x, np.empty_like(x), x.shape)
        dx = np.empty_like(x)
        module.backward(dy, dx, state)
        assert np.isfinite(dx[:, :2]).all()
        assert np.isnan(dx[:, 2]).all()
