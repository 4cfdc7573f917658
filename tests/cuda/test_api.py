"""The public functions on GPU arrays, on the simulator with a stand-in for CuPy: routing, planning, checks, results."""

import inputs
import numpy as np
import pytest
import reference
from cupy_standin import ndarray, on_device

import fastbn
from fastbn.cuda.backend import GpuPlan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPE = (3, 4, 5, 6)
EPS = 1e-3


def layouts(a):
    """a as views with other strides, by name."""
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a
    return {
        "contiguous": a,
        "channels last": np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
        "Fortran": np.asfortranarray(a),
        "batch in the middle": np.ascontiguousarray(a.swapaxes(0, 2)).swapaxes(0, 2),
        "reversed": a[::-1].copy()[::-1],
        "every other": wide[..., ::2],
        "off its boundary": unaligned(a),
    }


def unaligned(a):
    raw = np.zeros(a.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 16 + 1
    view = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def gpu(a, device=0):
    """a on a device with its very strides; None is None."""
    return None if a is None else on_device(a, device)


def parameters(C, dtype=np.float32):
    rng = np.random.default_rng(3)
    return rng.normal(1, 0.5, C).astype(dtype), rng.normal(0, 1, C).astype(dtype)


def close(got, exact, scale=1.0, bound=1e-6):
    """|got - exact| <= bound * max(scale, |exact|); 1e-6 and a scale of 1 are the contract's for y."""
    assert isinstance(got, ndarray)
    difference = np.abs(reference.widen(got.view(np.ndarray)) - exact)
    assert (difference <= bound * np.maximum(scale, np.abs(exact))).all(), difference.max()


def check(x, axis=1, dtype=np.float32, bound=1e-6, activation=None, residual=None, weight=None):
    """Forward and backward of a NumPy array's twin on the GPU against the reference; gives (y, ctx, gradients)."""
    C = x.shape[axis]
    gamma, beta = parameters(C)
    running = np.full(C, 0.5, np.float32), np.full(C, 2.0, np.float32)
    live = gpu(running[0].copy()), gpu(running[1].copy())
    extras = {"activation": activation, "eps": EPS, "axis": axis}
    before = x.copy()
    y, ctx = fastbn.batch_norm_forward(
        gpu(x), gpu(gamma), gpu(beta), *live, residual=gpu(residual), sample_weight=gpu(weight), momentum=0.25, **extras
    )
    exact = reference.forward(x, gamma, beta, residual=residual, sample_weight=weight, **extras)
    close(y, exact.y, 1 if residual is None else np.abs(exact.y).max(), bound)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(x, before)
    assert type(ctx) is fastbn.Context
    assert isinstance(ctx.plan, GpuPlan)
    close(ctx.mean, exact.mean, 3)  # float32 statistics of values of size 3
    close(ctx.var, exact.var, 3)
    close(live[0], 0.75 * 0.5 + 0.25 * exact.mean, 3)
    dy = inputs.normal(x.shape, seed=9).astype(x.dtype)
    mask = None if activation is None else exact.pre > 0
    dx, dgamma, dbeta, *rest = fastbn.batch_norm_backward(gpu(dy), ctx)
    wanted = reference.backward(dy, x, gamma, eps=EPS, axis=axis, sample_weight=weight, mask=mask)
    close(dx, wanted.dx, wanted.dx_scale.max(), 4 * bound if bound > 1e-6 else bound)  # halves round dx, of up to 4 dy, itself
    close(dgamma, wanted.dgamma, wanted.dgamma_scale.max())
    close(dbeta, wanted.dbeta, wanted.dbeta_scale.max())
    assert len(rest) == (residual is not None)
    return y, ctx, (dx, *rest)


def order(a):
    return sorted(range(a.ndim), key=lambda k: -a.strides[k])


@pytest.mark.parametrize("name", layouts(np.zeros(SHAPE, np.float32)))
def test_any_strides(cupy, name):
    x = layouts(inputs.normal(SHAPE) * 2 + 1)[name]
    y, ctx, (dx,) = check(x)
    if name not in ("reversed", "every other", "off its boundary"):
        assert order(y) == order(dx) == order(x)
        assert np.shares_memory(ctx.mask.x, x)  # read in place
    assert ctx.count == 90


@pytest.mark.parametrize(("shape", "axis"), [((9, 3), 1), ((9, 3), -1), ((2, 3, 7), 1), ((2, 7, 3), -1), ((4, 6), 0), ((2, 3, 2, 3, 4), 1)])
def test_ranks_and_axes(cupy, shape, axis):
    check(inputs.normal(shape) * 2 + 1, axis)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["contiguous", "channels last", "every other"])
def test_half_types(cupy, dtype, name):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16").bfloat16
    x = layouts(inputs.normal(SHAPE).astype(dtype))[name]
    # y is rounded to 11 and 8 bits: half a unit in the last place
    check(x, bound=2.0**-11 + 1e-6 if dtype == "float16" else 2.0**-8 + 1e-6)


@pytest.mark.parametrize("name", ["contiguous", "channels last", "every other"])
def test_relu_and_residual(cupy, name):
    x = layouts(inputs.normal(SHAPE))[name]
    added = inputs.normal(SHAPE, seed=5)  # its memory order is another one
    y, _, (_, dresidual) = check(x, activation="relu", residual=added)
    dy = inputs.normal(SHAPE, seed=9)
    np.testing.assert_array_equal(np.asarray(dresidual), np.where(np.asarray(y) > 0, dy, 0))


@pytest.mark.parametrize("kind", ["samples", "mask", "real"])
@pytest.mark.parametrize("name", ["contiguous", "channels last", "batch in the middle"])
def test_sample_weights(cupy, name, kind):
    rng = np.random.default_rng(2)
    shape = SHAPE[:1] if kind == "samples" else (SHAPE[0], *SHAPE[2:])
    weight = rng.random(shape) < 0.6 if kind == "mask" else rng.uniform(0.5, 2, shape).astype(np.float32)
    x = layouts(inputs.normal(SHAPE) * 2 + 1)[name]
    _, ctx, _ = check(x, weight=weight)
    each = x.size // x.shape[1] / weight.size
    np.testing.assert_allclose(float(ctx.count), weight.sum(dtype=float) * each, rtol=1e-12)
    moments = fastbn.moments(gpu(x), sample_weight=gpu(weight))
    count, mean, m2 = reference.moments(x, sample_weight=weight)
    np.testing.assert_allclose(moments.count, float(count), rtol=1e-12)
    close(moments.mean, mean, 3)
    close(moments.m2, m2, 3 * moments.count)


def test_frozen_statistics_and_inference(cupy):
    x, (gamma, beta) = inputs.normal(SHAPE), parameters(4, np.float64)
    mean, var = np.linspace(-1, 1, 4), np.linspace(0.5, 2, 4)
    exact = reference.forward(x, gamma, beta, mean=mean, var=var, eps=EPS)
    given = gpu(mean.copy()), gpu(var.copy())
    y, ctx = fastbn.batch_norm_forward(gpu(x), gpu(gamma), gpu(beta), *given, training=False, eps=EPS)
    close(y, exact.y)
    assert given[0].tolist() == ctx.mean.tolist() == mean.tolist()
    dy = inputs.normal(SHAPE, seed=1)
    dx, dgamma, _ = fastbn.batch_norm_backward(gpu(dy), ctx)
    wanted = reference.backward(dy, x, gamma, mean=mean, var=var, eps=EPS)
    close(dx, wanted.dx, wanted.dx_scale.max())
    assert dgamma.dtype == np.float64
    z = gpu(x.copy())
    assert fastbn.batch_norm_inference(z, gpu(gamma), gpu(beta), *given, eps=EPS, out=z) is z
    np.testing.assert_array_equal(z, y)
    assert repr(ctx) == "Context(frozen, x: float32 (3, 4, 5, 6), axis=1, count=90)"


def test_moments_of_parts_add_up(cupy):
    x = 1e4 + inputs.normal((6, 3, 8))
    total = fastbn.Moments.empty(3) + fastbn.moments(gpu(x[:2])) + fastbn.moments(gpu(x[2:]))
    count, mean, m2 = reference.moments(x)
    assert total.count == count
    close(total.mean, mean)
    close(total.m2, m2, bound=1e-5)  # float32 deviations of the two parts' own means
    empty = fastbn.moments(gpu(x[:0]))
    assert empty.count == 0
    assert (empty + total) == total


def test_parameters_of_two_dtypes_and_any_strides(cupy):
    x = inputs.normal(SHAPE)
    gamma, beta = np.repeat(parameters(4)[0], 2)[::2], parameters(4, np.float64)[1]
    room = np.full(8, 0.5, np.float32)
    mean, var = gpu(room[::2]), gpu(np.full(4, 2.0))
    y, ctx = fastbn.batch_norm_forward(gpu(x), gpu(gamma), gpu(beta), mean, var, momentum=1.0, eps=EPS)
    exact = reference.forward(x, gamma, beta, eps=EPS)
    close(y, exact.y)
    close(mean, exact.mean)
    close(var, exact.var * 90 / 89)
    assert room[1::2].tolist() == [0.5] * 4
    _, dgamma, dbeta = fastbn.batch_norm_backward(gpu(x), ctx)
    assert (dgamma.dtype, dbeta.dtype) == (np.float32, np.float64)
    _, dgamma, dbeta = fastbn.batch_norm_backward(gpu(x), fastbn.batch_norm_forward(gpu(x), beta=gpu(beta))[1])
    assert dgamma is None
    assert dbeta.dtype == np.float64


@pytest.mark.parametrize("name", ["contiguous", "channels last", "every other"])
def test_out(cupy, name):
    x = gpu(inputs.normal(SHAPE))
    out = gpu(layouts(np.zeros(SHAPE, np.float32))[name])
    y, ctx = fastbn.batch_norm_forward(x)
    assert fastbn.batch_norm_forward(x, out=out)[0] is out
    np.testing.assert_array_equal(out, y)
    dy = gpu(layouts(inputs.normal(SHAPE, seed=1))[name])
    dx, *_ = fastbn.batch_norm_backward(dy, ctx)
    assert fastbn.batch_norm_backward(dy, ctx, out=dy)[0] is dy
    np.testing.assert_array_equal(dy, dx)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)])
def test_empty_batches(cupy, shape):
    C = shape[1]
    x, (gamma, beta), mean = np.zeros(shape, np.float32), parameters(C), np.full(C, 3.0)
    given = gpu(mean), gpu(np.full(C, 4.0))
    y, ctx = fastbn.batch_norm_forward(gpu(x), gpu(gamma), gpu(beta), *given, residual=gpu(x))
    assert (y.shape, ctx.count, given[0].tolist()) == (shape, 0.0, [3.0] * C)
    dx, dgamma, dbeta, dresidual = fastbn.batch_norm_backward(gpu(x), ctx)
    assert dx.shape == dresidual.shape == shape
    assert dgamma.tolist() == dbeta.tolist() == ctx.mean.tolist() == [0.0] * C
    _, ctx = fastbn.batch_norm_forward(gpu(x), None, None, *given, training=False, eps=1e-12)
    np.testing.assert_allclose(ctx.invstd, 0.5, rtol=1e-12)
    assert fastbn.batch_norm_inference(gpu(x), None, None, *given).shape == shape


def test_the_layer(cupy):
    layer = fastbn.BatchNorm(4, device="cuda", activation="relu", eps=EPS)
    x = inputs.normal(SHAPE)
    close(layer(gpu(x)), reference.forward(x, eps=EPS, activation="relu").y)
    layer.backward(gpu(inputs.normal(SHAPE, seed=1)))
    assert isinstance(layer.dgamma, ndarray)
    assert layer.dgamma.any()
    layer.recalibrate([gpu(x[:1]), gpu(x[1:])])
    close(layer.running_mean, reference.forward(x).mean)
    close(layer.eval()(gpu(x)), reference.forward(x, mean=layer.running_mean, var=layer.running_var, eps=EPS, activation="relu").y)


def test_everything_happens_on_the_arrays_device(cupy):
    x = gpu(inputs.normal(SHAPE), device=1)
    gamma = gpu(parameters(4)[0], device=1)
    y, ctx = fastbn.batch_norm_forward(x, gamma)
    dx, dgamma, _ = fastbn.batch_norm_backward(gpu(inputs.normal(SHAPE), 1), ctx)
    m = fastbn.moments(x)
    z, part = fastbn.batch_norm_forward_apply(x, m, gamma)
    sums = fastbn.batch_norm_backward_reduce(z, part)
    dz = fastbn.batch_norm_backward_apply(z, part, *sums)
    assert [a.device.id for a in (y, ctx.mean, dx, dgamma, m.mean, m.m2, z, part.mean, *sums, dz)] == [1] * 11
    assert cupy.cuda.runtime.getDevice() == 0
