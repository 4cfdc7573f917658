"""The peers: what a user would write without fastbn, and PyTorch.

* naive NumPy: the formula as it stands in the paper, two passes for the statistics, whole-array temporaries, one
  thread (NumPy has no other way). It allocates its results, as such code does.
* naive Numba: plain two-pass loops, `@njit(parallel=True, fastmath=True)` over the channels, float64 accumulators,
  output preallocated. What a competent user writes in an afternoon; as many threads as fastbn gets.
* PyTorch: its functional calls on zero-copy views of the same arrays (`torch.from_numpy`; channels last as PyTorch's
  own memory format), output preallocated for forward and inference through the `out=` overload. The backward has
  no such overload of its own (the generated one copies), so it allocates dx, from memory that
  `machine.keep_freed_memory` has made the C library keep.

Formulas: Ioffe & Szegedy 2015, algorithm 1 (forward) and section 3 (backward).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

try:
    import torch
except ImportError:  # its column says "not installed"
    torch = None


# --- NumPy: x is (N, C, S) or rows of channels (R, C); every other argument is per channel, shape (C,) ---


def _axes(x):
    return (0, 2) if x.ndim == 3 else 0


def _wide(v, x):
    """A per-channel vector in a shape that broadcasts against x."""
    return v[:, None] if x.ndim == 3 else v


def numpy_normalise(x, gamma, beta, mean, var, eps):
    return _wide(gamma, x) * (x - _wide(mean, x)) / _wide(np.sqrt(var + eps), x) + _wide(beta, x)


def numpy_forward(x, gamma, beta, running_mean, running_var, momentum, eps):
    """y; updates the running statistics in place."""
    mean, var = x.mean(axis=_axes(x)), x.var(axis=_axes(x))
    n = x.size // mean.size
    running_mean[:] = (1 - momentum) * running_mean + momentum * mean
    running_var[:] = (1 - momentum) * running_var + momentum * var * (n / (n - 1))
    return numpy_normalise(x, gamma, beta, mean, var, eps)


def numpy_backward(dy, x, gamma, mean, var, eps):
    """dx, dgamma, dbeta."""
    invstd = 1 / np.sqrt(var + eps)
    n = x.size // mean.size
    xhat = (x - _wide(mean, x)) * _wide(invstd, x)
    dbeta = dy.sum(axis=_axes(x))
    dgamma = (dy * xhat).sum(axis=_axes(x))
    dx = _wide(gamma * invstd, x) * (dy - _wide(dbeta / n, x) - xhat * _wide(dgamma / n, x))
    return dx, dgamma, dbeta


# --- Numba, channels first: x[n, c, s] ---


@njit(parallel=True, fastmath=True)
def numba_forward_planes(x, gamma, beta, running_mean, running_var, momentum, eps, y):
    N, C, S = x.shape
    m = N * S
    for c in prange(C):
        total = 0.0
        for n in range(N):
            for s in range(S):
                total += x[n, c, s]
        mean = total / m
        squares = 0.0
        for n in range(N):
            for s in range(S):
                squares += (x[n, c, s] - mean) ** 2
        var = squares / m
        scale = x.dtype.type(gamma[c] / np.sqrt(var + eps))
        bias = x.dtype.type(beta[c] - mean * scale)
        for n in range(N):
            for s in range(S):
                y[n, c, s] = x[n, c, s] * scale + bias
        running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean
        running_var[c] = (1 - momentum) * running_var[c] + momentum * squares / (m - 1)


@njit(parallel=True, fastmath=True)
def numba_inference_planes(x, gamma, beta, mean, var, eps, y):
    N, C, S = x.shape
    for p in prange(N * C):
        n, c = p // C, p % C
        scale = x.dtype.type(gamma[c] / np.sqrt(var[c] + eps))
        bias = x.dtype.type(beta[c] - mean[c] * scale)
        for s in range(S):
            y[n, c, s] = x[n, c, s] * scale + bias


@njit(parallel=True, fastmath=True)
def numba_backward_planes(dy, x, gamma, mean, var, eps, dx, dgamma, dbeta):
    N, C, S = x.shape
    m = N * S
    for c in prange(C):
        invstd = 1.0 / np.sqrt(var[c] + eps)
        mu = mean[c]
        sum_dy = 0.0
        sum_dy_xhat = 0.0
        for n in range(N):
            for s in range(S):
                sum_dy += dy[n, c, s]
                sum_dy_xhat += dy[n, c, s] * ((x[n, c, s] - mu) * invstd)
        dgamma[c] = sum_dy_xhat
        dbeta[c] = sum_dy
        a = gamma[c] * invstd
        for n in range(N):
            for s in range(S):
                xhat = (x[n, c, s] - mu) * invstd
                dx[n, c, s] = a * (dy[n, c, s] - sum_dy / m - xhat * sum_dy_xhat / m)


# --- Numba, rows of channels: x[r, c]; each thread takes a run of neighbouring channels ---


@njit(parallel=True, fastmath=True)
def numba_forward_rows(x, gamma, beta, running_mean, running_var, momentum, eps, y, threads):
    R, C = x.shape
    mean = np.zeros(C)
    squares = np.zeros(C)
    for t in prange(threads):
        low, high = C * t // threads, C * (t + 1) // threads
        for r in range(R):
            for c in range(low, high):
                mean[c] += x[r, c]
        for c in range(low, high):
            mean[c] /= R
        for r in range(R):
            for c in range(low, high):
                squares[c] += (x[r, c] - mean[c]) ** 2
        scale = np.empty(high - low, x.dtype)
        bias = np.empty(high - low, x.dtype)
        for c in range(low, high):
            scale[c - low] = gamma[c] / np.sqrt(squares[c] / R + eps)
            bias[c - low] = beta[c] - mean[c] * scale[c - low]
            running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c]
            running_var[c] = (1 - momentum) * running_var[c] + momentum * squares[c] / (R - 1)
        for r in range(R):
            for c in range(low, high):
                y[r, c] = x[r, c] * scale[c - low] + bias[c - low]


@njit(parallel=True, fastmath=True)
def numba_inference_rows(x, gamma, beta, mean, var, eps, y):
    R, C = x.shape
    scale = np.empty(C, x.dtype)
    bias = np.empty(C, x.dtype)
    for c in range(C):
        scale[c] = gamma[c] / np.sqrt(var[c] + eps)
        bias[c] = beta[c] - mean[c] * scale[c]
    for r in prange(R):
        for c in range(C):
            y[r, c] = x[r, c] * scale[c] + bias[c]


@njit(parallel=True, fastmath=True)
def numba_backward_rows(dy, x, gamma, mean, var, eps, dx, dgamma, dbeta, threads):
    R, C = x.shape
    for t in prange(threads):
        low, high = C * t // threads, C * (t + 1) // threads
        width = high - low
        invstd = np.empty(width)
        sum_dy = np.zeros(width)
        sum_dy_xhat = np.zeros(width)
        for c in range(low, high):
            invstd[c - low] = 1.0 / np.sqrt(var[c] + eps)
        for r in range(R):
            for c in range(low, high):
                sum_dy[c - low] += dy[r, c]
                sum_dy_xhat[c - low] += dy[r, c] * ((x[r, c] - mean[c]) * invstd[c - low])
        for c in range(low, high):
            dgamma[c] = sum_dy_xhat[c - low]
            dbeta[c] = sum_dy[c - low]
        for r in range(R):
            for c in range(low, high):
                xhat = (x[r, c] - mean[c]) * invstd[c - low]
                centred = dy[r, c] - sum_dy[c - low] / R - xhat * sum_dy_xhat[c - low] / R
                dx[r, c] = gamma[c] * invstd[c - low] * centred
