"""Forward kernels on the CUDA simulator against longdouble."""

import numpy as np
import pytest

# Overflow is a case under test: the second attempt of the statistics starts where float32 squares overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# (N, C, S): whole tiles and rests, one block and many, vectors and single elements; S == 1 is rows of channels.
PLANES = [(2, 3, 512), (3, 2, 60), (5, 2, 49), (1, 5, 2), (9, 2, 64)]
COLUMNS = [(2, 3, 1), (70, 8, 1), (33, 3, 1), (130, 4, 1), (17, 21, 1)]
# |y - exact| <= bound * max(1, |exact|): 1e-6 and 1e-13 are the contract. Half types round y itself: half a unit in the last place.
BOUNDS = {"float32": 1e-6, "float64": 1e-13, "float16": 2.0**-11 + 1e-6, "bfloat16": 2.0**-8 + 1e-6}


def check(backend, exact, values, shape, dtype, parameters="float32", **options):
    rng = np.random.default_rng(7)
    C = shape[1]
    x = exact.encode(values, dtype)
    gamma, beta = (rng.normal(1, 0.5, C).astype(parameters), rng.normal(0, 1, C).astype(parameters))
    y = np.empty_like(x)
    state = backend.forward(x, y, shape, gamma=gamma, beta=beta, dtype=dtype, **options)
    truth = exact.decode(x, dtype)
    wanted, mean, var = exact.forward(truth, gamma, beta)
    error = np.abs(exact.decode(y, dtype) - wanted) / np.maximum(1, np.abs(wanted))
    assert error.max() <= BOUNDS[dtype], error.max()
    return state, mean, var


def roads(*shapes):
    """(persistent, shape): the persistent kernels take planes alone."""
    return [(False, shape) for shape in shapes] + [(True, shape) for shape in shapes if shape[2] > 1]


CASES = [(*road, "float32") for road in roads(*PLANES, *COLUMNS)] + [(False, shape, "float64") for shape in PLANES + COLUMNS]


@pytest.mark.parametrize(("persistent", "shape", "dtype"), CASES, ids=str)
def test_normal_data(backend, exact, shape, dtype, persistent):
    values = np.random.default_rng(1).normal(3, 2, shape)
    state, mean, var = check(backend(persistent), exact, values, shape, dtype)
    assert (state.plan.held_forward > 0) == (persistent and shape[0] * shape[2] <= 8 * (64 if state.plan.lanes > 1 else 32))
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(np.float64(state.mean - mean), 0, atol=tolerance * 3)  # sizes of mean and std: about 3
    np.testing.assert_allclose(state.var, var.astype(float), rtol=tolerance)
    assert state.count == shape[0] * shape[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("persistent", "shape"), roads((3, 2, 120), (5, 2, 49), (35, 16, 1), (9, 3, 1)), ids=str)
def test_half_types(backend, exact, shape, dtype, persistent):
    check(backend(persistent), exact, np.random.default_rng(2).normal(0.5, 2, shape), shape, dtype)


def _outliers(values):
    values.reshape(-1)[::97] = 1e5
    return values


HARD = {
    "mean/std of 1e6": lambda rng, shape: 1e6 + rng.normal(0, 1, shape),
    "1e25": lambda rng, shape: 1e25 * rng.normal(0, 1, shape),
    "1e-30": lambda rng, shape: 1e-30 * rng.normal(0, 1, shape),
    "first value an outlier": lambda rng, shape: _outliers(rng.normal(0, 1, shape)),
    "one value in each channel": lambda rng, shape: np.where(np.arange(shape[0])[:, None, None] == 0, 1e5, np.zeros(shape)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(("persistent", "shape"), roads((3, 2, 60), (5, 2, 49), (70, 8, 1)), ids=str)
def test_hard_data(backend, exact, shape, name, persistent):
    check(backend(persistent), exact, HARD[name](np.random.default_rng(3), shape), shape, "float32")


@pytest.mark.parametrize("persistent", [False, True], ids=["two-launches", "persistent"])
@pytest.mark.parametrize("shape", [(3, 2, 60), (2, 3, 300), (33, 3, 1)], ids=str)
def test_constant_channels_give_beta_exactly(backend, shape, persistent):
    N, C, S = shape
    x = np.broadcast_to(np.float32([1e8, 0.1, -3.7])[:C, None], (N, C, S)).copy()
    beta = np.float32([0.1, 0.2, 0.3])[:C]
    y = np.empty_like(x)
    backend(persistent).forward(x, y, shape, beta=beta)
    np.testing.assert_array_equal(y, np.broadcast_to(beta[:, None], shape))


def test_moments_that_are_exact_come_out_exact(backend):
    # Values -1 and 3 in equal numbers: mean 1, variance 4, every intermediate a small integer or a power of two times one.
    x = np.where(np.arange(4 * 2 * 64).reshape(4, 2, 64) % 2, -1, 3).astype(np.float32)
    for persistent in (False, True):
        y = np.empty_like(x)
        state = backend(persistent).forward(x, y, x.shape)
        assert state.mean.tolist() == [1.0, 1.0]
        assert state.var.tolist() == [4.0, 4.0]


@pytest.mark.parametrize(("persistent", "shape"), roads((3, 2, 60), (3, 2, 25), (35, 8, 1), (33, 3, 1)), ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_fused_features(backend, exact, shape, relu, residual, persistent):
    rng = np.random.default_rng(4)
    x, added = rng.normal(1, 3, (2, *shape)).astype(np.float32)
    y = np.empty_like(x)
    state = backend(persistent).forward(x, y, shape, relu=relu, residual=added if residual else None)
    ones, zeros = np.ones(shape[1]), np.zeros(shape[1])
    wanted, _, _ = exact.forward(x.astype(np.longdouble), ones, zeros, residual=added if residual else None, relu=relu)
    # the contract's bound, for a sum of two terms of size up to max |y| + max |residual|
    assert np.abs(y - wanted).max() <= 1e-6 * (1 + np.abs(wanted).max())
    assert state.mask.size == state.plan.words if relu else state.mask is None


@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 3, 1)], ids=str)
def test_given_statistics(backend, exact, shape):
    rng = np.random.default_rng(5)
    C = shape[1]
    x = rng.normal(1, 3, shape).astype(np.float32)
    mean, var, gamma = rng.normal(0, 1, C), rng.uniform(0.5, 2, C), rng.normal(0, 1, C)
    wanted, _, _ = exact.forward(x.astype(np.longdouble), gamma, np.zeros(C), mean, var, eps=1e-3)
    bound = 1e-6 * np.maximum(1, np.abs(wanted))  # the contract
    module = backend(False)
    y = np.empty_like(x)
    running = mean.copy(), var.copy()
    state = module.forward(x, y, shape, gamma=gamma, running_mean=running[0], running_var=running[1], training=False, eps=1e-3)
    assert (np.abs(y - wanted) <= bound).all()
    assert state.frozen
    assert (running[0] == mean).all()
    assert (running[1] == var).all()
    module.inference(x, x, shape, gamma, None, mean, var, eps=1e-3)  # in place
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("persistent", [False, True], ids=["two-launches", "persistent"])
@pytest.mark.parametrize("running", ["float32", "float64"])
def test_running_statistics(backend, running, persistent):
    rng = np.random.default_rng(6)
    shape = (3, 4, 60)
    x = rng.normal(1, 3, shape).astype(np.float32)
    x[1, 2, 5] = np.nan
    x[0, 3, 0] = np.inf
    mean, var = np.full(4, 2.0, running), np.full(4, 5.0, running)
    y = np.empty_like(x)
    backend(persistent).forward(x, y, shape, running_mean=mean, running_var=var, momentum=0.25)
    good = x[:, :2].astype(float)
    tolerance = 1e-6 if running == "float32" else 1e-7  # float32 rounds the result; float64 keeps the error of float32 statistics
    np.testing.assert_allclose(mean[:2], 0.75 * 2 + 0.25 * good.mean(axis=(0, 2)), rtol=tolerance)
    np.testing.assert_allclose(var[:2], 0.75 * 5 + 0.25 * good.var(axis=(0, 2), ddof=1), rtol=tolerance)
    assert mean[2:].tolist() == [2, 2]  # a channel that is not finite leaves its running statistics
    assert var[2:].tolist() == [5, 5]
    assert np.isfinite(y[:, :2]).all()  # and does not reach the others
    assert np.isnan(y[:, 2:]).all()


def test_biased_running_variance_and_float32_overflow(backend):
    x = np.zeros((2, 2, 64), np.float32)
    x[0] = 2
    x[:, 1] *= 1e25  # a variance of 1e50 does not fit float32
    mean, var = np.zeros(2, np.float32), np.zeros(2, np.float32)
    backend(False).forward(x, np.empty_like(x), x.shape, running_mean=mean, running_var=var, momentum=1.0, unbiased=False)
    assert mean.tolist() == [1.0, 0.0]
    assert var.tolist() == [1.0, 0.0]


def test_parameters_of_float64(backend, exact):
    values = np.random.default_rng(8).normal(0, 1, (3, 2, 60))
    check(backend(False), exact, values, values.shape, "float32", parameters="float64")


@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 8, 1)], ids=str)
def test_data_off_a_16_byte_boundary(backend, exact, shape):
    rng = np.random.default_rng(9)
    values = rng.normal(0, 1, shape).astype(np.float32)
    x, y = np.empty(values.size + 4, np.float32), np.empty(values.size + 4, np.float32)
    start = next(i for i in range(4) if (x.ctypes.data + 4 * i) % 16 == 4)
    x, y = x[start:][: values.size].reshape(shape), y[start:][: values.size].reshape(shape)
    x[...] = values
    state = backend(False).forward(x, y, shape)
    assert state.plan.lanes == 1
    wanted, _, _ = exact.forward(values.astype(np.longdouble), np.ones(shape[1]), np.zeros(shape[1]))
    assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()  # the contract; |wanted| reaches above 1


@pytest.mark.parametrize("shape", [(4, 2, 300), (130, 4, 1)], ids=str)
def test_same_bits_every_run(backend, shape):
    x = np.random.default_rng(10).normal(0, 1, shape).astype(np.float32)
    module = backend(False)
    runs = []
    for _ in range(3):
        y = np.empty_like(x)
        state = module.forward(x, y, shape)
        assert state.plan.splits > 1
        runs.append((y.tobytes(), state.table_flat.tobytes(), state.coefs.tobytes()))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("shape", [(4, 2, 300), (33, 3, 1)], ids=str)
def test_moments(backend, shape):
    x = np.random.default_rng(11).normal(5, 1, shape).astype(np.float32)
    count, mean, m2, _ = backend(False).moments(x, shape)
    assert count == shape[0] * shape[2]
    np.testing.assert_allclose(mean, x.mean(axis=(0, 2), dtype=float), rtol=1e-7)  # float32 sums of deviations of size 1 around 5
    np.testing.assert_allclose(m2, x.var(axis=(0, 2), dtype=float) * count, rtol=1e-6)
