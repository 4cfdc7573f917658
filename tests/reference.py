"""Batch normalisation written down plainly, in the widest float the machine has: the oracle of the test-suite.

Two passes, whole-array NumPy, no attention to speed or memory. Everything is computed in ``dtype`` (``np.longdouble``
unless told otherwise) and returned in it, so that a test can round, compare or differentiate as it needs.

Notation: i runs over every axis but the channel axis, w_i are the sample weights (1 without any), W = sum_i w_i.

    mean   = sum_i w_i x_i / W
    var    = sum_i w_i (x_i - mean)^2 / W
    invstd = 1 / sqrt(var + eps)
    xhat_i = (x_i - mean) * invstd
    y_i    = relu(gamma * xhat_i + beta + residual_i)

References
----------
Ioffe & Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML, algorithm 1 (forward) and the unnumbered equations of section 3 (backward); algorithm 2 (inference).
"""

from typing import NamedTuple

import numpy as np


class Forward(NamedTuple):
    """What the forward computes; `pre` is y before the ReLU, `xhat` is x normalised."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    invstd: np.ndarray
    xhat: np.ndarray
    pre: np.ndarray


class Backward(NamedTuple):
    """Gradients, and the magnitudes (per channel) that the contract's bounds refer to."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dresidual: np.ndarray
    dx_scale: np.ndarray  # max_i |gamma * invstd * dy_i|
    dgamma_scale: np.ndarray  # sum_i |dy_i * xhat_i|
    dbeta_scale: np.ndarray  # sum_i |dy_i|


def widen(a, dtype=np.longdouble):
    """`a` as a C-contiguous array of `dtype`; half types pass through float64, which holds them exactly."""
    a = np.asarray(a)
    if a.dtype.itemsize == 2:
        a = a.astype(np.float64)
    return np.ascontiguousarray(a, dtype=dtype)


def per_channel(values, ndim, axis):
    """`values` of shape (C,), reshaped to broadcast along `axis` of an array of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(values, shape)


def other_axes(ndim, axis):
    """All axes but the channel axis."""
    return tuple(k for k in range(ndim) if k != axis % ndim)


def spread_weights(sample_weight, shape, axis, dtype=np.longdouble):
    """Weights of shape (N,), or of x's shape without the channel axis, as an array of x's full shape."""
    if sample_weight is None:
        return np.ones(shape, dtype)
    w = widen(sample_weight, dtype)
    per_value = w.ndim == len(shape) - 1
    if per_value:
        w = np.expand_dims(w, axis % len(shape))
    else:  # along the first axis that is not the channels'
        w = w.reshape([-1 if k == (axis % len(shape) == 0) else 1 for k in range(len(shape))])
    return np.broadcast_to(w, shape)


def _centre(x, w, axis):
    """Weighted mean (C,), and x - mean. Shifted by a value of the channel, so that constant channels give exact zeros."""
    axes = other_axes(x.ndim, axis)
    counted = np.where(w > 0, x, 0)  # an element of weight zero has no say, even if it is NaN
    by_channel = (np.moveaxis(a, axis, 0).reshape(x.shape[axis], -1) for a in (counted, np.broadcast_to(w > 0, x.shape)))
    values, positive = by_channel
    first = values[np.arange(len(values)), positive.argmax(axis=1)]
    shift = per_channel(first, x.ndim, axis)
    offset = (w * np.where(w > 0, x - shift, 0)).sum(axis=axes) / w.sum(axis=axes)
    return first + offset, (x - shift) - per_channel(offset, x.ndim, axis)


def moments(x, *, axis=1, sample_weight=None, dtype=np.longdouble):
    """Sum of weights (scalar), mean (C,) and sum of weighted squared deviations m2 (C,)."""
    x = widen(x, dtype)
    with np.errstate(all="ignore"):
        w = spread_weights(sample_weight, x.shape, axis, dtype)
        mean, centred = _centre(x, w, axis)
        squares = np.where(w > 0, centred, 0) ** 2
        axes = other_axes(x.ndim, axis)
        return w.sum(axis=axes)[0], mean, (w * squares).sum(axis=axes)


def forward(
    x,
    gamma=None,
    beta=None,
    *,
    eps=1e-5,
    axis=1,
    mean=None,
    var=None,
    sample_weight=None,
    residual=None,
    activation=None,
    dtype=np.longdouble,
):
    """Ioffe & Szegedy (2015), algorithm 1; with `mean` and `var` given, the frozen form (algorithm 2, line 11)."""
    x = widen(x, dtype)
    with np.errstate(all="ignore"):
        if mean is None:
            w = spread_weights(sample_weight, x.shape, axis, dtype)
            mean, centred = _centre(x, w, axis)
            squares = np.where(w > 0, centred, 0) ** 2
            axes = other_axes(x.ndim, axis)
            var = (w * squares).sum(axis=axes) / w.sum(axis=axes)
        else:
            mean, var = widen(mean, dtype), widen(var, dtype)
            centred = x - per_channel(mean, x.ndim, axis)
        invstd = 1 / np.sqrt(var + dtype(eps))
        xhat = centred * per_channel(invstd, x.ndim, axis)
        y = xhat
        if gamma is not None:
            y = y * per_channel(widen(gamma, dtype), x.ndim, axis)
        if beta is not None:
            y = y + per_channel(widen(beta, dtype), x.ndim, axis)
        if residual is not None:
            y = y + widen(residual, dtype)
        pre = y
        if activation == "relu":
            y = np.where(pre > 0, pre, np.where(np.isnan(pre), pre, 0))
    return Forward(y, mean, var, invstd, xhat, pre)


def backward(
    dy,
    x,
    gamma=None,
    *,
    eps=1e-5,
    axis=1,
    mean=None,
    var=None,
    sample_weight=None,
    mask=None,
    dtype=np.longdouble,
):
    """Gradients of sum_i dy_i * y_i.

    With g = dy where the ReLU let the value through (`mask`; None: everywhere) and 0 elsewhere:

        dbeta  = sum_i g_i
        dgamma = sum_i g_i xhat_i
        dx_i   = gamma * invstd * (g_i - w_i / W * (dbeta + xhat_i * dgamma))        statistics of the batch
        dx_i   = gamma * invstd * g_i                                                statistics given (frozen)

    The first dx is Ioffe & Szegedy (2015), section 3, with their three chain-rule terms gathered; the weights enter as
    d mean / d x_i = w_i / W and d var / d x_i = 2 w_i (x_i - mean) / W.
    """
    x, g = widen(x, dtype), widen(dy, dtype)
    frozen = mean is not None
    done = forward(x, gamma, eps=eps, axis=axis, mean=mean, var=var, sample_weight=sample_weight, dtype=dtype)
    axes = other_axes(x.ndim, axis)
    with np.errstate(all="ignore"):
        if mask is not None:
            g = np.where(mask, g, 0)
        dbeta = g.sum(axis=axes)
        dgamma = (g * done.xhat).sum(axis=axes)
        scale = done.invstd if gamma is None else done.invstd * widen(gamma, dtype)
        inner = g
        if not frozen:
            w = spread_weights(sample_weight, x.shape, axis, dtype)
            total = w.sum(axis=axes)[0]
            common = per_channel(dbeta, x.ndim, axis) + done.xhat * per_channel(dgamma, x.ndim, axis)
            inner = g - w / total * common
        scale = per_channel(scale, x.ndim, axis)
        return Backward(
            dx=scale * inner,
            dgamma=dgamma,
            dbeta=dbeta,
            dresidual=g,
            dx_scale=np.abs(scale * g).max(axis=axes),
            dgamma_scale=np.abs(g * done.xhat).sum(axis=axes),
            dbeta_scale=np.abs(g).sum(axis=axes),
        )


def running_update(running, batch, momentum):
    """running := (1 - momentum) * running + momentum * batch, in float64 (the moving averages of algorithm 2)."""
    return (1.0 - momentum) * np.asarray(running, np.float64) + momentum * np.asarray(batch, np.float64)
