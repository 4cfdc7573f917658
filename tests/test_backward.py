"""batch_norm_backward: the reference itself against finite differences, then fastbn against the reference."""

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
WIDE = np.longdouble


def finite_differences(loss, a, step=1e-5):
    """Central differences of a scalar function of a longdouble array, fourth order: error about step^4."""
    gradient, step = np.zeros(a.shape, WIDE), WIDE(step)
    for k in np.ndindex(a.shape):
        there = a[k]
        at = {}
        for j in (-2, -1, 1, 2):
            a[k] = there + j * step
            at[j] = loss()
        a[k] = there
        gradient[k] = (at[-2] - 8 * at[-1] + 8 * at[1] - at[2]) / (12 * step)
    return gradient


MODES = {
    "plain": {},
    "axis -1": {"axis": -1},
    "eps 0.6": {"eps": 0.6},
    "frozen": {"frozen": True},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "relu, residual": {"activation": "relu", "residual": True},
    "relu, residual, frozen": {"activation": "relu", "residual": True, "frozen": True},
    "mask per sample": {"sample_weight": "samples"},
    "weights per value": {"sample_weight": "values"},
    "weights, relu, residual": {"sample_weight": "values", "activation": "relu", "residual": True},
}


def problem(mode):
    """x, dy, gamma, beta, residual and keyword arguments (of the reference) for one of the modes, in float64."""
    mode = dict(MODES[mode])
    rng = np.random.default_rng(5)
    x, dy, residual = rng.standard_normal((3, 3, 4, 3, 2))
    channels = x.shape[mode.get("axis", 1)]
    gamma, beta, mean, var = inputs.parameters(channels, np.float64)
    options = {k: mode[k] for k in ("axis", "eps", "activation") if k in mode}
    if mode.get("frozen"):
        options["mean"], options["var"] = mean, var
    if mode.get("sample_weight") == "samples":
        options["sample_weight"] = np.array([True, False, True])
    elif mode.get("sample_weight") == "values":
        options["sample_weight"] = rng.uniform(0, 2, (3, 3, 2)) * (rng.random((3, 3, 2)) > 0.3)
    return x, dy, gamma, beta, residual if mode.get("residual") else None, options


@pytest.mark.parametrize("mode", MODES)
def test_reference_agrees_with_finite_differences(mode):
    # The oracle's own formulas, term by term, against the definition of a derivative.
    x, dy, gamma, beta, residual, options = problem(mode)
    x, gamma, beta = (a.astype(WIDE) for a in (x, gamma, beta))
    residual = None if residual is None else residual.astype(WIDE)
    activation = options.pop("activation", None)

    def loss():
        return (dy * reference.forward(x, gamma, beta, residual=residual, activation=activation, **options).y).sum()

    mask = reference.forward(x, gamma, beta, residual=residual, activation=activation, **options).y > 0
    exact = reference.backward(dy, x, gamma, mask=mask if activation else None, **options)
    # Fourth-order differences with step 1e-5 leave 1e-20 of truncation and 1e-19 / 1e-5 of rounding.
    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(exact.dx, finite_differences(loss, x), **close)
    np.testing.assert_allclose(exact.dgamma, finite_differences(loss, gamma), **close)
    np.testing.assert_allclose(exact.dbeta, finite_differences(loss, beta), **close)
    if residual is not None:
        np.testing.assert_allclose(exact.dresidual, finite_differences(loss, residual), **close)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_agree_with_finite_differences_of_the_forward(mode):
    # fastbn's backward against the derivative of fastbn's own forward: the two must be one function.
    x, dy, gamma, beta, residual, options = problem(mode)
    frozen = None
    if "mean" in options:
        frozen = options.pop("mean"), options.pop("var")
    extra = {} if frozen is None else {"running_mean": frozen[0], "running_var": frozen[1], "training": False}

    def run():
        return fastbn.batch_norm_forward(x, gamma, beta, residual=residual, **options, **extra)

    results = fastbn.batch_norm_backward(dy, run()[1])
    arrays = [x, gamma, beta] + ([] if residual is None else [residual])
    assert len(results) == len(arrays)
    for analytic, a in zip(results, arrays, strict=True):
        numeric = finite_differences(lambda: (dy * run()[0]).sum(), a, step=1e-3)
        # Step 1e-3: truncation 1e-12 times a fifth derivative (up to some 1e3), rounding 1e-15 / 1e-3.
        np.testing.assert_allclose(analytic, numeric.astype(np.float64), rtol=1e-7, atol=1e-8)


@DTYPES
@pytest.mark.parametrize("shape", inputs.SHAPES.values(), ids=inputs.SHAPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_shapes(shape, dtype, axis):
    x = inputs.normal(shape, dtype)
    if axis == -1:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    checks.check_both(x, *inputs.parameters(x.shape[axis], dtype)[:2], axis=axis)


@DTYPES
@FROZEN
@pytest.mark.parametrize("with_beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("with_gamma", [False, True], ids=["no gamma", "gamma"])
def test_parameters_may_be_none(with_gamma, with_beta, frozen, dtype):
    x = inputs.normal((6, 5, 7), dtype)
    gamma, beta, mean, var = inputs.parameters(5, dtype)
    checks.check_both(x, gamma if with_gamma else None, beta if with_beta else None, frozen=(mean, var) if frozen else None)


@DTYPES
@pytest.mark.parametrize("shape", inputs.SMALL_SHAPES.values(), ids=inputs.SMALL_SHAPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_frozen(axis, shape, dtype):
    x = inputs.normal(shape, dtype)
    gamma, beta, mean, var = inputs.parameters(shape[axis], dtype)
    checks.check_both(x, gamma, beta, axis=axis, frozen=(mean, var))


def test_frozen_gradient_keeps_the_statistics_it_was_given():
    # A training step between forward and backward moves the running statistics; the gradient is that of the forward.
    x, dy = inputs.normal((6, 5, 7)), inputs.normal((6, 5, 7), seed=1)
    gamma, beta, mean, var = inputs.parameters(5)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=False)
    before = fastbn.batch_norm_backward(dy, ctx)
    mean += 1
    var *= 2
    after = fastbn.batch_norm_backward(dy, ctx)
    assert all(checks.same_bits(a, b) for a, b in zip(before, after, strict=True))


@FROZEN
def test_one_context_twice(frozen):
    x, dy = inputs.normal((6, 5, 7, 7)), inputs.normal((6, 5, 7, 7), seed=1)
    gamma, beta, mean, var = inputs.parameters(5)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=not frozen)
    before = checks.snapshot(x, dy, gamma, beta, mean, var, ctx.mean, ctx.var, ctx.invstd)
    first = fastbn.batch_norm_backward(dy, ctx)
    second = fastbn.batch_norm_backward(dy, ctx)
    assert all(checks.same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert not np.shares_memory(first[0], second[0])
    checks.assert_unchanged(before)


@DTYPES
@FROZEN
@pytest.mark.parametrize("axis", [1, -1])
def test_in_place(axis, frozen, dtype):
    x, dy = inputs.normal((6, 5, 4, 7), dtype), inputs.normal((6, 5, 4, 7), dtype, seed=1)
    gamma, beta, mean, var = inputs.parameters(x.shape[axis], dtype)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, axis=axis, training=not frozen)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, ctx)
    here, dgamma_here, dbeta_here = fastbn.batch_norm_backward(dy, ctx, out=dy)
    assert here is dy
    assert checks.same_bits(here, dx)
    assert checks.same_bits(dgamma_here, dgamma)
    assert checks.same_bits(dbeta_here, dbeta)


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_out(order):
    x, dy = inputs.normal((4, 6, 5, 7)), inputs.normal((4, 6, 5, 7), seed=1)
    gamma, beta, *_ = inputs.parameters(6)
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta)
    out = {
        "C": np.full(x.shape, np.nan, np.float32),
        "F": np.full(x.shape, np.nan, np.float32, order="F"),
        "strided": np.full((4, 6, 5, 14), np.nan, np.float32)[..., ::2],
    }[order]
    checks.check_backward(dy, ctx, y, x, gamma, beta, out=out)


def test_out_of_a_subclass_comes_back_itself(tmp_path):
    """As from a NumPy function: a memory map that was passed can be flushed."""
    x = inputs.normal((4, 6, 5))
    *p, mean, var = inputs.parameters(6)
    out = np.memmap(tmp_path / "y", np.float32, "w+", shape=x.shape)
    y, ctx = fastbn.batch_norm_forward(x, *p, out=out)
    assert y is out
    assert fastbn.batch_norm_backward(x, ctx, out=out)[0] is out
    assert fastbn.batch_norm_inference(x, *p, mean, var, out=out) is out


@pytest.mark.parametrize("size", [1e110, 1e-110, 1e150])
def test_gradients_of_a_size_whose_third_power_float64_does_not_hold(size):
    x, dy = inputs.normal((64, 3), np.float64) * size, inputs.normal((64, 3), np.float64, seed=1)
    checks.check_both(x, *inputs.parameters(3, np.float64)[:2], dy=dy, eps=1e-300)


def test_gradients_of_a_constant_channel_and_a_tiny_eps():
    x, dy = np.full((8, 2), 3.0), inputs.normal((8, 2), np.float64, seed=1)
    dx = fastbn.batch_norm_backward(dy, fastbn.batch_norm_forward(x, eps=1e-210)[1])[0]
    # invstd is 1e105, and what the sum over dy has lost is 4 ulp of it at most
    np.testing.assert_allclose(dx, (dy - dy.mean(axis=0)) * 1e105, rtol=0, atol=1e105 * 1e-15)


def test_nothing_is_written_outside_out():
    for shape in [(3, 5, 7, 7), (9, 33), (2, 3, 17, 31)]:
        x, dy = inputs.normal(shape), inputs.normal(shape, seed=1)
        out, untouched = inputs.guarded(shape, np.float32)
        y, ctx = fastbn.batch_norm_forward(x)
        checks.check_backward(dy, ctx, y, x, out=out)
        assert untouched()


@pytest.mark.parametrize("of_dy", inputs.LAYOUTS)
@pytest.mark.parametrize("of_x", ["contiguous", "channels last view"])
def test_dy_may_lie_otherwise_than_x(of_x, of_dy):
    x, axis = inputs.arrange(of_x, inputs.normal((4, 6, 5, 7)))
    dy, dy_axis = inputs.arrange(of_dy, inputs.normal((4, 6, 5, 7), seed=1))
    dy = np.moveaxis(dy, dy_axis, 1)
    y, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(6)[:2], axis=axis)
    checks.check_backward(dy, ctx, y, x, *inputs.parameters(6)[:2], axis=axis)


def test_gradient_of_a_constant_dy_vanishes():
    # y has zero mean whatever x is, so that sum(y) cannot depend on x.
    x = inputs.normal((6, 5, 7, 7), np.float64)
    _, ctx = fastbn.batch_norm_forward(x)
    dx, *_ = fastbn.batch_norm_backward(np.ones_like(x), ctx)
    np.testing.assert_allclose(dx, 0, atol=1e-13)  # dx_scale is about 1 here


def test_gamma_of_the_forward_is_used():
    # The optimiser may have changed gamma in place between forward and backward; PyTorch forbids it, fastbn documents
    # that x is held by reference. Either meaning is defensible for gamma, a mixture of both is not.
    x, dy = inputs.normal((6, 5, 7)), inputs.normal((6, 5, 7), seed=1)
    gamma, beta, *_ = inputs.parameters(5)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta)
    dx, *_ = fastbn.batch_norm_backward(dy, ctx)
    gamma *= 2
    after, *_ = fastbn.batch_norm_backward(dy, ctx)
    assert checks.same_bits(after, dx) or np.allclose(after, 2 * dx, rtol=1e-6)
