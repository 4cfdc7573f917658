"""batch_norm_forward: values over shapes and parameters, context, running statistics, frozen mode, empty batches."""

import warnings

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
EMPTY = {
    "no samples": (0, 3, 4, 4),
    "no samples, nc": (0, 3),
    "no rows": (2, 3, 0, 4),
    "no columns": (2, 3, 4, 0),
    "no channels": (2, 0, 4, 4),
    "no channels, nc": (5, 0),
    "nothing at all": (0, 0, 0),
}


@DTYPES
@pytest.mark.parametrize("shape", inputs.SHAPES.values(), ids=inputs.SHAPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_shapes(shape, dtype, axis):
    x = inputs.normal(shape, dtype)
    if axis == -1:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    gamma, beta, *_ = inputs.parameters(x.shape[axis], dtype)
    y, _ = checks.check_forward(x, gamma, beta, axis=axis)
    checks.assert_same_order(y, x)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_axis_may_hold_the_channels(axis):
    x = inputs.normal((5, 6, 7, 8))
    gamma, beta, *_ = inputs.parameters(x.shape[axis])
    checks.check_forward(x, gamma, beta, axis=axis)


@DTYPES
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("with_beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("with_gamma", [False, True], ids=["no gamma", "gamma"])
def test_parameters_may_be_none(with_gamma, with_beta, frozen, dtype):
    x = inputs.normal((6, 5, 7), dtype)
    gamma, beta, mean, var = inputs.parameters(5, dtype)
    checks.check_forward(x, gamma if with_gamma else None, beta if with_beta else None, frozen=(mean, var) if frozen else None)


@pytest.mark.parametrize("parameter_dtype", inputs.FLOATS, ids=["float32 parameters", "float64 parameters"])
@DTYPES
def test_parameter_dtype_is_free(dtype, parameter_dtype):
    x = inputs.normal((6, 5, 7), dtype)
    gamma, beta, mean, var = inputs.parameters(5, parameter_dtype)
    y, _ = checks.check_forward(x, gamma, beta)
    assert y.dtype == dtype
    checks.check_forward(x, gamma, beta, frozen=(mean, var))


def test_parameters_may_be_strided_views():
    x = inputs.normal((6, 5, 7))
    gamma, beta, mean, var = (np.repeat(p, 2)[::2] for p in inputs.parameters(5))
    checks.check_forward(x, gamma, beta)
    m, v = mean.copy(), var.copy()
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var)
    np.testing.assert_allclose(mean, reference.running_update(m, ctx.mean, 0.1), rtol=1e-6)
    np.testing.assert_allclose(var, reference.running_update(v, ctx.var * 42 / 41, 0.1), rtol=1e-6)


@pytest.mark.parametrize("eps", [0.6, 1e-3, 1e-12, np.float32(1e-5), 2], ids=str)
def test_eps(eps):
    x = inputs.normal((5, 5, 5))  # PyTorch's test shape for eps = 0.6
    checks.check_forward(x, eps=eps)


def test_context():
    x = inputs.normal((4, 3, 5, 6))
    y, ctx = checks.check_forward(x, *inputs.parameters(3)[:2], eps=1e-3)
    assert ctx.count == 4 * 5 * 6
    np.testing.assert_allclose(ctx.invstd, 1 / np.sqrt(ctx.var + 1e-3), rtol=1e-15)  # 4 roundings of 1.1e-16
    own, keeps_x = checks.held_bytes(ctx, x)
    assert keeps_x, "the context should hold x by reference"
    assert not np.shares_memory(y, x)
    # O(C) of float64: mean, var, invstd and a few more; never a tensor of x's size (1440 bytes here, 1 MB below)
    big = inputs.normal((64, 4, 32, 32))
    _, ctx = fastbn.batch_norm_forward(big)
    own, _ = checks.held_bytes(ctx, big)
    assert own <= 4 * 8 * 32, f"the context holds {own} bytes beside x"


def test_frozen_context_holds_the_given_statistics():
    x = inputs.normal((4, 3, 5))
    gamma, beta, mean, var = inputs.parameters(3)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=False)
    np.testing.assert_array_equal(ctx.mean, mean.astype(np.float64))
    np.testing.assert_array_equal(ctx.var, var.astype(np.float64))
    np.testing.assert_allclose(ctx.invstd, 1 / np.sqrt(var.astype(np.float64) + 1e-5), rtol=1e-15)


@DTYPES
@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_out(order, dtype):
    x = inputs.normal((4, 6, 5, 7), dtype)
    gamma, beta, *_ = inputs.parameters(6, dtype)
    plain, _ = fastbn.batch_norm_forward(x, gamma, beta)
    out = {
        "C": np.full(x.shape, np.nan, dtype),
        "F": np.full(x.shape, np.nan, dtype, order="F"),
        "strided": np.full((4, 6, 5, 14), np.nan, dtype)[..., ::2],
    }[order]
    checks.check_forward(x, gamma, beta, out=out)
    if order == "C":
        assert checks.same_bits(out, plain), "out= changed the bits of y"


def test_nothing_is_written_outside_out():
    for shape in [(3, 5, 7, 7), (9, 33), (2, 3, 17, 31)]:
        x = inputs.normal(shape)
        out, untouched = inputs.guarded(shape, np.float32)
        checks.check_forward(x, out=out)
        assert untouched()


@DTYPES
@pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.01, 0.5, 1.0])
def test_running_statistics(momentum, unbiased, dtype):
    x = inputs.normal((6, 5, 3, 4), np.float32)
    _, _, mean, var = inputs.parameters(5, dtype)
    old_mean, old_var = mean.copy(), var.copy()
    _, ctx = fastbn.batch_norm_forward(x, None, None, mean, var, momentum=momentum, unbiased=unbiased)
    n = 6 * 3 * 4
    batch_var = ctx.var * n / (n - 1) if unbiased else ctx.var
    # Four roundings of float64, one to the dtype of the statistics.
    rtol = 2e-15 if dtype == np.float64 else 1.2e-7
    np.testing.assert_allclose(mean, reference.running_update(old_mean, ctx.mean, momentum), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(var, reference.running_update(old_var, batch_var, momentum), rtol=rtol)
    if momentum == 0:
        np.testing.assert_array_equal(mean, old_mean)
        np.testing.assert_array_equal(var, old_var)
    if momentum == 1:
        np.testing.assert_array_equal(mean, ctx.mean.astype(dtype))


def test_running_statistics_do_not_change_y():
    x = inputs.normal((6, 5, 3))
    gamma, beta, mean, var = inputs.parameters(5)
    plain, _ = fastbn.batch_norm_forward(x, gamma, beta)
    tracked, _ = fastbn.batch_norm_forward(x, gamma, beta, mean, var)
    assert checks.same_bits(plain, tracked)


@pytest.mark.parametrize("kind", inputs.POISON)
@pytest.mark.parametrize("axis", [1, -1])
def test_non_finite_channel_leaves_its_running_statistics_untouched(kind, axis):
    x = inputs.values(kind, (6, 5, 4))
    if axis == -1:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    gamma, beta, mean, var = inputs.parameters(5)
    old_mean, old_var = mean.copy(), var.copy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, axis=axis)
    assert [w.category for w in caught] == [RuntimeWarning]
    bad = 2  # inputs.values puts the value into the middle channel
    good = [0, 1, 3, 4]
    assert mean[bad] == old_mean[bad]
    assert var[bad] == old_var[bad]
    np.testing.assert_allclose(mean[good], reference.running_update(old_mean, ctx.mean, 0.1)[good], rtol=1e-6)
    np.testing.assert_allclose(var[good], reference.running_update(old_var, ctx.var * 24 / 23, 0.1)[good], rtol=1e-6)
    y = np.moveaxis(y, axis, 0)
    assert np.isnan(y[bad]).all()
    assert np.isfinite(y[good]).all()


def test_one_warning_for_many_non_finite_channels():
    x = inputs.normal((6, 5, 4))
    x[0, 1], x[1, 3] = np.nan, np.inf
    with pytest.warns(RuntimeWarning) as caught:
        fastbn.batch_norm_forward(x, None, None, np.zeros(5), np.ones(5))
    assert len(caught) == 1


CALLS = {
    "function": lambda x: fastbn.batch_norm_forward(x, None, None, np.zeros(5), np.ones(5)),
    "layer": lambda x: fastbn.BatchNorm(5)(x),
    "blocks": lambda x: fastbn.batch_norm_forward_apply(x, fastbn.moments(x), None, None, np.zeros(5), np.ones(5)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_warning_names_the_line_that_called(call):
    x = inputs.normal((6, 5, 4))
    x[0, 1] = np.nan
    with pytest.warns(RuntimeWarning, match="1 of 5 channels") as caught:
        call(x)
    assert caught[0].filename == __file__


def test_a_statistic_too_large_for_the_running_dtype_is_not_stored():
    # The variance of values of 1e25 is 1e50: finite in float64, infinite in a float32 running_var, for ever.
    x = inputs.normal((6, 2, 4))
    x[:, 0] *= np.float32(1e25)
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    with pytest.warns(RuntimeWarning):
        fastbn.batch_norm_forward(x, None, None, mean, var)
    assert np.isfinite(mean).all()
    assert np.isfinite(var).all()
    assert var[0] == 1


@DTYPES
def test_frozen(dtype):
    x = inputs.normal((6, 5, 7), dtype)
    gamma, beta, mean, var = inputs.parameters(5, dtype)
    before = checks.snapshot(mean, var)
    mean.flags.writeable = var.flags.writeable = False  # nothing is written, so read-only statistics are fine
    checks.check_forward(x, gamma, beta, frozen=(mean, var))
    checks.check_forward(inputs.normal((1, 5), dtype), gamma, beta, frozen=(mean, var))  # one value per channel
    checks.assert_unchanged(before)


@DTYPES
def test_many_values_of_one_sample(dtype):
    checks.check_forward(inputs.normal((1, 3, 40, 41), dtype))


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_empty(shape, training, dtype):
    x = np.empty(shape, dtype)
    channels = shape[1]
    gamma, beta, mean, var = inputs.parameters(channels, dtype)
    before = checks.snapshot(gamma, beta, mean, var)
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=training)
    assert y.shape == shape
    assert y.dtype == dtype
    dx, dgamma, dbeta = fastbn.batch_norm_backward(np.empty(shape, dtype), ctx)
    assert dx.shape == shape
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dgamma, np.zeros(channels, dtype))
    np.testing.assert_array_equal(dbeta, np.zeros(channels, dtype))
    assert dgamma.dtype == dbeta.dtype == dtype
    assert fastbn.batch_norm_inference(x, gamma, beta, mean, var).shape == shape
    checks.assert_unchanged(before)


def test_one_channel_is_like_any_other_in_company():
    # A channel's y must not depend on its neighbours: normalising channels apart gives the same values.
    x = inputs.normal((6, 5, 40))
    whole, _ = fastbn.batch_norm_forward(x)
    for c in range(5):
        apart, _ = fastbn.batch_norm_forward(np.ascontiguousarray(x[:, c : c + 1]))
        np.testing.assert_allclose(apart[:, 0], whole[:, c], rtol=2e-6, atol=2e-6)  # two bounds of 1e-6
