"""activation="relu" and residual=, fused into training, frozen and inference, forward and backward."""

import tracemalloc

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
FUSIONS = pytest.mark.parametrize(
    ("activation", "with_residual"),
    [("relu", False), (None, True), ("relu", True)],
    ids=["relu", "residual", "residual and relu"],
)
SHAPES = inputs.SMALL_SHAPES | {
    "nc 33x257": (33, 257),
    "planes 7x7": (6, 40, 7, 7),
    "planes 10x10, many": (64, 3, 10, 10),
    "planes 27x33": (3, 5, 27, 33),
}


def problem(shape, dtype, with_residual, layout="contiguous"):
    """x, residual (or None), dy, axis, and the parameters."""
    arrays = [inputs.arrange(layout, inputs.normal(shape, dtype, seed=s)) for s in range(3)]
    (x, axis), (residual, _), (dy, _) = arrays
    return x, residual if with_residual else None, dy, axis, inputs.parameters(shape[1], dtype)


@DTYPES
@FROZEN
@FUSIONS
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape, axis, activation, with_residual, frozen, dtype):
    layout = "axis -1" if axis == -1 else "contiguous"
    x, residual, dy, axis, (gamma, beta, mean, var) = problem(shape, dtype, with_residual, layout)
    given = (mean, var) if frozen else None
    y, *_ = checks.check_both(x, gamma, beta, axis=axis, dy=dy, frozen=given, activation=activation, residual=residual)
    checks.assert_same_order(y, x)
    if activation:
        assert (y >= 0).all()
        assert (y == 0).any()


@DTYPES
@FUSIONS
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout, activation, with_residual, dtype):
    x, residual, dy, axis, (gamma, beta, *_) = problem((4, 6, 5, 7), dtype, with_residual, layout)
    before = checks.snapshot(x, dy) + checks.snapshot(residual)
    checks.check_both(x, gamma, beta, axis=axis, dy=dy, activation=activation, residual=residual)
    checks.assert_unchanged(before)


@DTYPES
@FUSIONS
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_inference(layout, activation, with_residual, dtype):
    x, residual, _, axis, p = problem((4, 6, 5, 7), dtype, with_residual, layout)
    checks.check_inference(x, *p, axis=axis, activation=activation, residual=residual)


@FUSIONS
def test_inference_in_place(activation, with_residual):
    x, residual, _, _, p = problem((4, 6, 5, 7), np.float32, with_residual)
    checks.check_inference(x, *p, activation=activation, residual=residual, out=x)


@pytest.mark.parametrize("of_residual", inputs.LAYOUTS)
@pytest.mark.parametrize("of_x", ["contiguous", "channels last view"])
def test_residual_may_lie_otherwise_than_x(of_x, of_residual):
    x, axis = inputs.arrange(of_x, inputs.normal((4, 6, 5, 7)))
    residual, its_axis = inputs.arrange(of_residual, inputs.normal((4, 6, 5, 7), seed=1))
    residual = np.moveaxis(residual, its_axis, 1)
    checks.check_both(x, *inputs.parameters(6)[:2], axis=axis, activation="relu", residual=residual)


@FROZEN
@pytest.mark.parametrize("activation", [None, "relu"])
def test_residual_gradient_survives_an_in_place_backward(activation, frozen):
    # out=dy overwrites dy with dx; the residual's gradient is dy (behind the ReLU) and must not be a view of it.
    x, residual, dy, _, (gamma, beta, mean, var) = problem((4, 6, 5, 7), np.float32, True)
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=not frozen, activation=activation, residual=residual)
    expected = np.where(y > 0, dy, 0) if activation else dy.copy()
    apart = fastbn.batch_norm_backward(dy.copy(), ctx)
    here = fastbn.batch_norm_backward(dy, ctx, out=dy)
    assert here[0] is dy
    np.testing.assert_array_equal(here[3], expected)
    assert all(checks.same_bits(a, b) for a, b in zip(here, apart, strict=True))


@pytest.mark.parametrize("shape", [(64, 4, 32, 32), (63, 5, 31, 33), (2048, 129)], ids=str)
def test_context_keeps_one_bit_per_element(shape):
    x, residual = inputs.normal(shape), inputs.normal(shape, seed=1)
    for arranged, axis in ((x, 1), (np.moveaxis(x, 1, -1).copy(), -1)):
        other = residual if axis == 1 else np.moveaxis(residual, 1, -1).copy()
        y, ctx = fastbn.batch_norm_forward(arranged, axis=axis, activation="relu", residual=other)
        own, keeps_x = checks.held_bytes(ctx, arranged)
        assert keeps_x
        # One bit each, planes or rows rounded up to whole 64-byte lines at most, and O(C) of float64.
        runs = shape[0] * (shape[1] if axis == 1 and len(shape) > 2 else 1)
        assert x.size / 8 <= own <= x.size / 8 + 64 * runs + 128 * shape[1]
        assert not np.shares_memory(y, arranged)


@pytest.mark.parametrize("axis", [1, -1])
def test_no_second_tensor_is_allocated(axis):
    x, residual, dy = (inputs.normal((32, 32, 32, 32), seed=s) for s in range(3))
    p = inputs.parameters(32)[:2]
    y, ctx = fastbn.batch_norm_forward(x, *p, axis=axis, activation="relu", residual=residual)  # compiles
    fastbn.batch_norm_backward(dy, ctx)
    tracemalloc.start()
    try:
        y, ctx = fastbn.batch_norm_forward(x, *p, axis=axis, activation="relu", residual=residual)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 1.1 * y.nbytes, f"the forward needed {peak / y.nbytes:.2f} tensors; y is one, the mask 1/32"
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        results = fastbn.batch_norm_backward(dy, ctx)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - held < 2.1 * y.nbytes, f"the backward needed {(peak - held) / y.nbytes:.2f} tensors for two results"
    finally:
        tracemalloc.stop()
    assert len(results) == 4


@FUSIONS
def test_one_context_twice(activation, with_residual):
    x, residual, dy, _, (gamma, beta, *_) = problem((4, 6, 5, 7), np.float32, with_residual)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, activation=activation, residual=residual)
    first, second = fastbn.batch_norm_backward(dy, ctx), fastbn.batch_norm_backward(dy, ctx)
    assert all(checks.same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_running_statistics_are_those_of_x_alone():
    x, residual, _, _, (gamma, beta, mean, var) = problem((4, 6, 5, 7), np.float32, True)
    plain_mean, plain_var = mean.copy(), var.copy()
    fastbn.batch_norm_forward(x, gamma, beta, plain_mean, plain_var)
    fastbn.batch_norm_forward(x, gamma, beta, mean, var, activation="relu", residual=residual)
    assert checks.same_bits(mean, plain_mean)
    assert checks.same_bits(var, plain_var)


def test_relu_lets_nan_through():
    # max(nan, 0) hides a NaN in some implementations; NumPy's and PyTorch's do not.
    x = inputs.values("one nan", (4, 6, 5, 7))
    y, _ = fastbn.batch_norm_forward(x, activation="relu")
    assert np.isnan(y[:, 3]).all()
    assert np.isfinite(np.delete(y, 3, axis=1)).all()


def test_relu_at_exactly_zero_has_no_gradient():
    # A constant channel with beta = 0 sits on the kink; PyTorch's convention: the gradient there is 0.
    x, dy = np.full((4, 2, 8), 3, np.float32), inputs.normal((4, 2, 8))
    gamma, beta = np.ones(2, np.float32), np.float32([0, 1])
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, activation="relu")
    np.testing.assert_array_equal(y[:, 0], 0)
    _, _, dbeta = fastbn.batch_norm_backward(dy, ctx)
    assert dbeta[0] == 0
    np.testing.assert_allclose(dbeta[1], dy[:, 1].sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4)], ids=str)
def test_empty(shape):
    x = np.empty(shape, np.float32)
    y, ctx = fastbn.batch_norm_forward(x, activation="relu", residual=x.copy())
    assert y.shape == shape
    dx, _, _, dresidual = fastbn.batch_norm_backward(x.copy(), ctx)
    assert dx.shape == dresidual.shape == shape


@DTYPES
@pytest.mark.parametrize("kind", inputs.FINITE)
def test_values(kind, dtype):
    # The residual is of y's size, not of x's: the bound on y is absolute below one.
    x = inputs.values(kind, (4, 6, 9, 11), dtype)
    residual = inputs.normal(x.shape, dtype, seed=1)
    checks.check_both(x, *inputs.parameters(6, dtype)[:2], activation="relu", residual=residual)


def test_relu_equals_relu_applied_apart():
    x, _, _, _, (gamma, beta, *_) = problem((4, 6, 5, 7), np.float32, False)
    plain, _ = fastbn.batch_norm_forward(x, gamma, beta)
    fused, _ = fastbn.batch_norm_forward(x, gamma, beta, activation="relu")
    np.testing.assert_array_equal(fused, np.maximum(plain, 0))
    exact = reference.forward(x, gamma, beta, activation="relu").y
    assert (exact[fused == 0] <= 1e-6).all()
