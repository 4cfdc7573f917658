"""On real CuPy arrays, at sizes of real blocks; collected only where CuPy sees a GPU. Written without one: not yet run."""

import numpy as np
import pytest
import reference

import fastbn

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

SHAPES = [(32, 64, 56, 56), (32, 512, 14, 14), (8, 100, 7, 7), (300, 130), (2, 3, 1001)]
ROUNDING = {"float32": 0.0, "float64": 0.0, "float16": 2.0**-11}  # half a unit in the last place of what is stored


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_forward_and_backward(shape, axis, dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(1, 2, shape).astype(dtype) for _ in range(2))
    if axis == -1:
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    C = x.shape[axis]
    gamma, beta = rng.normal(1, 0.5, (2, C)).astype(np.float32)
    mean, var = cupy.zeros(C, np.float32), cupy.ones(C, np.float32)
    y, ctx = fastbn.batch_norm_forward(cupy.asarray(x), cupy.asarray(gamma), cupy.asarray(beta), mean, var, momentum=1.0, axis=axis)
    exact = reference.forward(x, gamma, beta, axis=axis)
    bound = 1e-6 + ROUNDING[dtype]  # the contract's, and the rounding of halves
    assert (np.abs(y.get() - exact.y) <= bound * np.maximum(1, np.abs(exact.y))).all()
    np.testing.assert_allclose(mean.get(), exact.mean, rtol=0, atol=1e-5)  # float32 statistics of values of size 10
    dx, dgamma, dbeta = fastbn.batch_norm_backward(cupy.asarray(dy), ctx)
    wanted = reference.backward(dy, x, gamma, axis=axis)
    assert (np.abs(dx.get() - wanted.dx) <= (1e-6 + 4 * ROUNDING[dtype]) * wanted.dx_scale.max()).all()
    assert (np.abs(dgamma.get() - wanted.dgamma) <= 1e-6 * wanted.dgamma_scale.max()).all()
    assert (np.abs(dbeta.get() - wanted.dbeta) <= 1e-6 * wanted.dbeta_scale.max()).all()


def test_the_same_bits_every_run_and_on_any_stream():
    x = cupy.asarray(np.random.default_rng(0).normal(0, 1, (32, 64, 56, 56)).astype(np.float32))
    first = fastbn.batch_norm_forward(x)[0]
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        again = fastbn.batch_norm_forward(x)[0]
        stream.synchronize()
    assert (first.view(np.uint32) == again.view(np.uint32)).all()
