"""The public functions on NumPy arrays of (N, C, S) elements, which stand for GPU arrays: what the tests of the kernels call.

Results are written into arrays that the caller brings, and what the kernels have worked with can be looked at.
"""

from types import SimpleNamespace

import numpy as np
from cupy_standin import on_device

import fastbn

JOBS = []  # what the kernels of the last call were given


def _gpu(a, shape=None, dtype=None):
    """a as a GPU array of the same memory, (N, C) where S is 1."""
    if a is None:
        return None
    if dtype == "bfloat16":
        import ml_dtypes

        a = a.view(ml_dtypes.bfloat16)
    if shape is not None:
        a = a.reshape(shape if shape[2] > 1 else shape[:2])
    return on_device(a)


def _weight(w, shape):
    """Weights of N or N * S elements as the functions take them."""
    if w is None:
        return None
    N, _, S = shape
    return on_device(w.reshape(-1) if w.size != N * S or S == 1 else w.reshape(N, S))


def _plain(a):
    return None if a is None else np.asarray(a).view(np.ndarray)


def forward(x, y, shape, *, gamma=None, beta=None, running_mean=None, running_var=None, residual=None, sample_weight=None, relu=False,
            dtype=None, **options):  # fmt: skip
    """Normalise x into y; gives the context, and what it holds for kernels."""
    x, y, residual = (_gpu(a, shape, dtype) for a in (x, y, residual))
    vectors = (_gpu(a) for a in (gamma, beta, running_mean, running_var))
    activation, weight = "relu" if relu else None, _weight(sample_weight, shape)
    _, ctx = fastbn.batch_norm_forward(x, *vectors, residual=residual, sample_weight=weight, activation=activation, out=y, **options)
    state = ctx.mask
    return SimpleNamespace(
        ctx=ctx, shape=shape, dtype=dtype, plan=ctx.plan.setting.plan, mean=_plain(ctx.mean), var=_plain(ctx.var), count=ctx.count,
        frozen=not ctx.training, mask=state.bits, table_flat=state.table, coefs=state.coefs,
    )  # fmt: skip


def inference(x, y, shape, gamma, beta, mean, var, *, eps=1e-5):
    """Normalise x into y with given statistics."""
    fastbn.batch_norm_inference(_gpu(x, shape), _gpu(gamma), _gpu(beta), _gpu(mean), _gpu(var), eps=eps, out=_gpu(y, shape))


def backward(dy, dx, state, *, dgamma=None, dbeta=None, dresidual=None):
    """Gradients of a forward; gives the kernels' sums, float64, (rows, C)."""
    dy, dx, dresidual = (_gpu(a, state.shape, state.dtype) for a in (dy, dx, dresidual))
    _, *found = fastbn.batch_norm_backward(dy, state.ctx, out=dx)
    for to, result in zip((dgamma, dbeta, dresidual), found, strict=False):
        if to is not None:
            assert to.dtype == result.dtype
            to[...] = _plain(result) if to is not dresidual else result
    return _plain(JOBS[-1]["grads"]).reshape(-1, state.shape[1])


def moments(x, shape, *, sample_weight=None):
    """(count, mean, m2, low word of the mean)."""
    m = fastbn.moments(_gpu(x, shape), sample_weight=_weight(sample_weight, shape))
    return m.count, _plain(m.mean), _plain(m.m2), _plain(m.mean_lo)
