"""GPU arrays on their way to the kernels: the functions of functional.py for arrays with ``__cuda_array_interface__``. Twin: cpu.py.

The same checks with the same errors, the same planning by strides, then `fastbn.cuda_backend`. Nothing here reads what is on the GPU,
so nothing waits for it. Arrays that the kernels cannot read in place are copied on the GPU, once. Importing this module imports neither
CuPy nor Numba.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import checks, cuda_backend
from fastbn.context import Context
from fastbn.gpu_arrays import Arrays, Layout, is_gpu_array, no_more
from fastbn.kernels import rows

if TYPE_CHECKING:
    from fastbn.statistics import Moments

Array = Any  # cupy.ndarray, or what gpu_arrays.py exchanges for one


class GpuContext(Context):
    """A context whose statistics are on the GPU. `count` is too, as an array of no dimensions, where there were sample weights."""

    def __repr__(self) -> str:
        mode = "training" if self.training else "frozen"
        return f"GpuContext({mode}, x: {self.x.dtype} {tuple(self.x.shape)}, axis={self.axis}, count={float(self.count):g})"


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    axis: int,
    unbiased: bool,
    activation: str | None,
    residual: Array | None,
    sample_weight: Array | None,
    out: Array | None,
) -> tuple[Array, Context]:
    """`fastbn.batch_norm_forward` on a GPU."""
    a = Arrays(
        x=x,
        gamma=gamma,
        beta=beta,
        running_mean=running_mean,
        running_var=running_var,
        residual=residual,
        sample_weight=sample_weight,
        out=out,
    )
    dtype, axis = a.data("x", axis)
    vectors = tuple(a.vector(name, axis) for name in ("gamma", "beta"))
    statistics = a.running(axis, bool(training))
    eps, momentum, relu = checks.eps(eps), checks.momentum(momentum), checks.activation(activation)
    a.like_x("residual")
    a.weight(axis)
    a.output(None, ("x", "residual", "gamma", "beta", "running_mean", "running_var", "sample_weight"))
    if not training and running_mean is None:
        raise ValueError("training=False normalises with the running statistics; pass running_mean and running_var")
    shape, xp = a.x.shape, a.xp
    count = prod(shape) // shape[axis] if shape[axis] else 0
    if training and count == 1:
        raise ValueError(
            f"x has shape {shape} with one value per channel on axis {axis}: its variance is 0 and says nothing; "
            "train with more values, or pass training=False"
        )
    gamma_dtype, beta_dtype = (None if v is None else v.dtype for v in vectors)
    context = partial(
        GpuContext,
        x=x,
        axis=axis,
        training=bool(training),
        has_residual=residual is not None,
        relu=relu,
        gamma_dtype=gamma_dtype,
        beta_dtype=beta_dtype,
    )
    with a.on_device():
        if a.x.size == 0:
            table = _table_of_nothing(a, shape[axis], training, eps)
            y = xp.empty_like(a.x) if out is None else a["out"]
            return a.back("out", y), context(count=0.0, table=table, state=None)
        layout = Layout(a.x, axis, dtype)
        y, y_read, finish = layout.written(xp, a["out"], a.x.dtype)
        live: tuple[Any, ...] = statistics
        held: tuple[Any, ...] = _alike(xp, statistics)
        if training and (finish is not no_more or a.exchanged):
            # What follows the kernels may fail: statistics are then moved last.
            held = tuple(v if v is None or v is not given else given.copy() for v, given in zip(held, live, strict=True))
        state = cuda_backend.forward(
            layout.read(a.x),
            y_read,
            layout.shape,
            **dict(zip(("gamma", "beta"), _alike(xp, vectors), strict=True)),
            running_mean=held[0],
            running_var=held[1],
            training=bool(training),
            momentum=momentum,
            eps=eps,
            unbiased=bool(unbiased),
            relu=relu,
            residual=layout.read(a["residual"]),
            sample_weight=layout.weight(xp, a["sample_weight"]) if training else None,
            dtype=dtype,
        )
        finish()
        result = a.back("out", y), context(count=state.count, table=state.table, state=(state, layout))
        if training:
            moved = [(g, u.astype(g.dtype, copy=False)) for g, u in zip(live, held, strict=True) if g is not None and u is not g]
            for given, used in moved:
                given[...] = used
    return result


def _table_of_nothing(a: Arrays, C: int, training: bool, eps: float) -> Array:
    """The context's table of an empty batch."""
    table = a.xp.zeros((rows.ANCHOR, C), np.float64)
    if not training:
        table[rows.MEAN], table[rows.VAR] = a["running_mean"], a["running_var"]
    table[rows.INVSTD] = 1.0 / a.xp.sqrt(table[rows.VAR] + eps)
    return table


def _alike(xp: Any, vectors: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """Per-channel arrays as kernels take them: contiguous, and all of one dtype. Themselves where they are."""
    common = {v.dtype for v in vectors if v is not None}
    dtype = np.dtype(np.float64) if len(common) > 1 else next(iter(common), None)

    def one(v: Array | None) -> Array | None:
        if v is None or (v.dtype == dtype and v.flags.c_contiguous):
            return v
        return xp.ascontiguousarray(v, dtype=dtype)

    return tuple(one(v) for v in vectors)


def backward(dy: Array, ctx: Context, out: Array | None) -> tuple[Array | None, ...]:
    """`fastbn.batch_norm_backward` on a GPU."""
    if dy is None:
        raise TypeError("dy is None; pass the gradient of y, an array of x's shape and dtype")
    a = Arrays(x=ctx.x, dy=dy, out=out)
    a.like_x("dy")
    a.output("dy", ("dy", "x"))
    xp, C = a.xp, a.x.shape[ctx.axis]
    with a.on_device():
        given = {ctx.gamma_dtype, ctx.beta_dtype} - {None}
        dtype = np.float64 if len(given) > 1 else next(iter(given), np.float32)
        dgamma = None if ctx.gamma_dtype is None else xp.zeros(C, dtype)
        dbeta = None if ctx.beta_dtype is None else xp.zeros(C, dtype)
        dresidual = None
        if a.x.size == 0:
            dx = xp.empty_like(a.x) if out is None else a["out"]
            dresidual = xp.empty_like(a.x)
        else:
            state, layout = ctx.state
            dx, dx_read, finish = layout.written(xp, a["out"], a.x.dtype)
            dresidual_read = None
            if ctx.has_residual:
                dresidual, dresidual_read, _ = layout.written(xp, None, a.x.dtype)
            cuda_backend.backward(layout.read(a["dy"]), dx_read, state, dgamma=dgamma, dbeta=dbeta, dresidual=dresidual_read)
            finish()
        dgamma = None if dgamma is None else dgamma.astype(ctx.gamma_dtype, copy=False)
        dbeta = None if dbeta is None else dbeta.astype(ctx.beta_dtype, copy=False)
    result = a.back("out", dx), a.back(None, dgamma), a.back(None, dbeta)
    return (*result, a.back(None, dresidual)) if ctx.has_residual else result


def inference(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    axis: int,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> Array:
    """`fastbn.batch_norm_inference` on a GPU."""
    if mean is None or var is None:
        raise TypeError("mean and var must be arrays of shape (C,); use batch_norm_forward for the statistics of x")
    a = Arrays(x=x, gamma=gamma, beta=beta, mean=mean, var=var, residual=residual, out=out)
    dtype, axis = a.data("x", axis)
    vectors = tuple(a.vector(name, axis) for name in ("gamma", "beta", "mean", "var"))
    eps, relu = checks.eps(eps), checks.activation(activation)
    a.like_x("residual")
    a.output("x", ("x", "residual", "gamma", "beta", "mean", "var"))
    with a.on_device():
        if a.x.size == 0:
            return a.back("out", a.xp.empty_like(a.x) if out is None else a["out"])
        layout = Layout(a.x, axis, dtype)
        y, y_read, finish = layout.written(a.xp, a["out"], a.x.dtype)
        cuda_backend.inference(
            layout.read(a.x),
            y_read,
            layout.shape,
            *_alike(a.xp, vectors[:2]),
            *_alike(a.xp, vectors[2:]),
            eps=eps,
            relu=relu,
            residual=layout.read(a["residual"]),
            dtype=dtype,
        )
        finish()
    return a.back("out", y)


def moments(x: Array, axis: int, sample_weight: Array | None) -> Moments:
    """`fastbn.moments` on a GPU. With sample weights it waits for their sum, which a Moments holds on the host."""
    from fastbn.statistics import Moments

    a = Arrays(x=x, sample_weight=sample_weight)
    dtype, axis = a.data("x", axis)
    a.weight(axis)
    C = a.x.shape[axis]
    if a.x.size == 0:
        return Moments.empty(C)
    with a.on_device():
        layout = Layout(a.x, axis, dtype)
        weight = layout.weight(a.xp, a["sample_weight"])
        count, mean, m2, low = cuda_backend.moments(layout.read(a.x), layout.shape, sample_weight=weight, dtype=dtype)
        count = float(count)
        return Moments.empty(C) if count == 0.0 else Moments(count, mean, m2, low)


__all__ = ["GpuContext", "backward", "forward", "inference", "is_gpu_array", "moments"]
