"""batch_norm_inference: y = (x - mean) / sqrt(var + eps) * gamma + beta with statistics that are given."""

import checks
import inputs
import numpy as np
import pytest

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])


@DTYPES
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", inputs.SHAPES.values(), ids=inputs.SHAPES)
def test_shapes(shape, axis, dtype):
    x = inputs.normal(shape, dtype)
    if axis == -1:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    y = checks.check_inference(x, *inputs.parameters(x.shape[axis], dtype), axis=axis)
    checks.assert_same_order(y, x)


@DTYPES
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout, dtype):
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7), dtype))
    before = checks.snapshot(x)
    y = checks.check_inference(x, *inputs.parameters(6, dtype), axis=axis)
    if layout != "zero strides":
        checks.assert_same_order(y, x)
    checks.assert_unchanged(before)


@DTYPES
@pytest.mark.parametrize("kind", inputs.VALUES)
def test_values(kind, dtype):
    x = inputs.values(kind, (4, 6, 5, 7), dtype)
    gamma, beta, mean, var = inputs.parameters(6, dtype)
    checks.check_inference(x, gamma, beta, mean, var)
    if kind in inputs.FINITE:  # statistics that fit the data, with means far larger than deviations
        wide = x.astype(np.float64)
        mean, var = wide.mean(axis=(0, 2, 3)), wide.var(axis=(0, 2, 3))
        checks.check_inference(x, gamma, beta, mean, var)
        checks.check_inference(x, gamma, beta, mean.astype(dtype), np.minimum(var, 1e30).astype(dtype))


@pytest.mark.parametrize("with_beta", [False, True], ids=["no beta", "beta"])
@pytest.mark.parametrize("with_gamma", [False, True], ids=["no gamma", "gamma"])
def test_parameters_may_be_none(with_gamma, with_beta):
    gamma, beta, mean, var = inputs.parameters(5)
    checks.check_inference(inputs.normal((6, 5, 7)), gamma if with_gamma else None, beta if with_beta else None, mean, var)


@pytest.mark.parametrize("eps", [0.6, 1e-3, 1e-12], ids=str)
def test_eps(eps):
    checks.check_inference(inputs.normal((6, 5, 7)), *inputs.parameters(5), eps=eps)


def test_zero_variance_is_saved_by_eps():
    x = np.full((3, 2), 7, np.float32)
    y = fastbn.batch_norm_inference(x, None, np.float32([1, 2]), np.float32([7, 7]), np.zeros(2, np.float32))
    np.testing.assert_array_equal(y, [[1, 2]] * 3)


@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels last view", "axis -1", "every second sample", "fortran"])
def test_in_place(layout, dtype):
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7), dtype))
    p = inputs.parameters(6, dtype)
    apart = fastbn.batch_norm_inference(x, *p, axis=axis)
    here = fastbn.batch_norm_inference(x, *p, axis=axis, out=x)
    assert here is x
    np.testing.assert_array_equal(here, apart)  # the same bits: no zeros among them


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_out(order):
    x = inputs.normal((4, 6, 5, 7))
    out = {
        "C": np.full(x.shape, np.nan, np.float32),
        "F": np.full(x.shape, np.nan, np.float32, order="F"),
        "strided": np.full((4, 6, 5, 14), np.nan, np.float32)[..., ::2],
    }[order]
    checks.check_inference(x, *inputs.parameters(6), out=out)


def test_nothing_is_written_outside_out():
    for shape in [(3, 5, 7, 7), (9, 33), (2, 3, 17, 31)]:
        out, untouched = inputs.guarded(shape, np.float32)
        checks.check_inference(inputs.normal(shape), *inputs.parameters(shape[1]), out=out)
        assert untouched()


def test_equals_the_frozen_forward():
    x = inputs.normal((4, 6, 5, 7))
    gamma, beta, mean, var = inputs.parameters(6)
    y, _ = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=False)
    assert checks.same_bits(y, fastbn.batch_norm_inference(x, gamma, beta, mean, var))


def test_arguments_are_only_read():
    x = inputs.normal((4, 6, 5, 7))
    arguments = (x, *inputs.parameters(6))
    for a in arguments:
        a.flags.writeable = False
    before = checks.snapshot(*arguments)
    fastbn.batch_norm_inference(*arguments)
    checks.assert_unchanged(before)
