"""GPU arrays on their way to the kernels: the functions of functional.py for arrays with ``__cuda_array_interface__``. Twin: cpu.py.

The same checks with the same errors, the same planning by strides. Nothing here reads what is on the GPU,
so nothing waits for it. Arrays that the kernels cannot read in place are copied on the GPU, once. Importing this module imports neither
CuPy nor Numba.

Host time is most of a small call's time. So a call looks at each array once, and what follows from shapes, strides, dtypes and alignment
(most checks, the layout, what needs a copy) is worked out once for all calls that are alike: `_forward_plan` and its like. Such a plan
holds no array, no address and no value; what depends on those is checked each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from operator import and_
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn.arguments import checks, scalars
from fastbn.common.context import Context
from fastbn.cuda import kernels_backend as cuda_backend
from fastbn.cuda.arrays import Arrays, Facts, Shapes, is_gpu_array
from fastbn.cuda.layout import Channels, Layout, assign, channels, native_copy, no_more
from fastbn.kernels import rows

if TYPE_CHECKING:
    from fastbn.statistics import Moments

Array = Any  # cupy.ndarray, or what gpu_arrays.py exchanges for one


class GpuContext(Context):
    """A context whose statistics are on the GPU. `count` is too, as an array of no dimensions, where there were sample weights."""

    def __repr__(self) -> str:
        mode = "training" if self.training else "frozen"
        return f"GpuContext({mode}, x: {self.x.dtype} {tuple(self.x.shape)}, axis={self.axis}, count={float(self.count):g})"


@dataclass(frozen=True, eq=False)
class Plan:
    """What calls have in common whose arrays are alike.

    Attributes
    ----------
    dtype : str
        The name of x's.
    layout : Layout or None
        None where x is empty.
    direct : frozenset of str
        The arrays of x's shape that kernels read and write in place.
    reach : dict
        The memory of each array, counted from its address.
    parameters, statistics : Channels or None
        gamma and beta; running statistics, or mean and var.
    """

    dtype: str
    layout: Layout | None
    direct: frozenset[str]
    reach: dict[str, tuple[int, int]]
    parameters: Channels | None = None
    statistics: Channels | None = None


def _plan(
    s: Shapes, axis: int, dtype: str, layout: Layout | None = None, parameters: Channels | None = None, statistics: Channels | None = None
) -> Plan:
    if layout is None and 0 not in s.shape:
        layout = Layout(s.x, axis, dtype)
    direct = (name for name in ("x", "residual", "dy", "out") if layout is not None and name in s.of and layout.fits(s.of[name]))
    return Plan(dtype, layout, frozenset(direct), s.reach(), parameters, statistics)


@lru_cache(maxsize=1024)
def _forward_plan(facts: Facts, axis: int, training: bool) -> Plan:
    """The checks of a forward that need no address, and its plan."""
    s = Shapes(facts)
    dtype = s.data(axis)
    axis %= s.ndim
    parameters, statistics = channels(s.vectors(axis, "gamma", "beta")), channels(s.running(axis, training))
    s.like_x("residual")
    s.weight(axis)
    s.output()
    if not training and "running_mean" not in s.of:
        raise checks.no_running_statistics()
    count = prod(s.shape) // s.shape[axis] if s.shape[axis] else 0
    if training and count == 1:
        raise checks.one_value_per_channel(s.shape, axis)
    return _plan(s, axis, dtype, None, parameters, statistics)


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
    training = bool(training)
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
    axis = a.axis(axis)
    p = _forward_plan(a.facts, axis, training)
    axis %= a.x.ndim
    eps, momentum, relu = scalars.eps(eps), scalars.momentum(momentum), scalars.activation(activation)
    a.writable("out", *(("running_mean", "running_var") if training else ()))
    a.apart(p.reach, None, training)
    xp = a.xp

    gamma_dtype, beta_dtype = (None if v is None else v.dtype for v in (a["gamma"], a["beta"]))

    def context(count: Any, table: Array, state: Any) -> GpuContext:
        return GpuContext(x, axis, training, count, residual is not None, relu, gamma_dtype, beta_dtype, table, state)

    with a.on_device():
        if p.layout is None:
            table = _table_of_nothing(a, a.x.shape[axis], training, eps)
            y = xp.empty_like(a.x) if out is None else a["out"]
            return a.back("out", y), context(0.0, table, None)
        layout, direct = p.layout, p.direct
        y, y_flat, finish = layout.written(xp, a["out"], "out" in direct)
        live: tuple[Any, ...] = a["running_mean"], a["running_var"]
        assert p.statistics is not None
        held: tuple[Any, ...] = _read(p.statistics, a, "running_mean", "running_var")
        if training and (finish is not no_more or a.exchanged or len(p.statistics.direct) == 1):
            # What follows the kernels may fail, or leave a channel out: statistics are then moved last, both of them.
            held = tuple(v if v is None or v is not given else given.copy() for v, given in zip(held, live, strict=True))
        state = cuda_backend.forward(
            layout.read(xp, a.x, "x" in direct),
            y_flat,
            layout.shape,
            **dict(zip(("gamma", "beta"), _read(p.parameters, a, "gamma", "beta"), strict=True)),
            running_mean=held[0],
            running_var=held[1],
            training=training,
            momentum=momentum,
            eps=eps,
            unbiased=bool(unbiased),
            relu=relu,
            residual=None if residual is None else layout.read(xp, a["residual"], "residual" in direct),
            sample_weight=layout.weight(xp, a["sample_weight"]) if training else None,
            dtype=p.dtype,
        )
        finish()
        result = a.back("out", y), context(state.count, state.table, (state, layout))
        if training and live[0] is not None and (held[0] is not live[0] or held[1] is not live[1]):
            _move(a, live, held, state)
    return result


def _read(channels: Channels | None, a: Arrays, *names: str) -> tuple[Array | None, ...]:
    """Per-channel arrays as kernels take them."""
    assert channels is not None
    return tuple(channels.read(a.xp, a[name], name) for name in names)


def _move(a: Arrays, live: tuple[Array, ...], held: tuple[Array, ...], state: cuda_backend.State) -> None:
    """Put the running statistics that the kernels have moved into the arrays that were given.

    With two dtypes the kernels see float64. A channel whose statistics float32 cannot hold is then left out here, in both.
    """
    xp = a.xp
    moved = [used.astype(given.dtype.newbyteorder("="), copy=False) for given, used in zip(live, held, strict=True)]
    if moved[0].dtype != moved[1].dtype:
        single = (v.astype(np.float32) for v in (state.mean, state.var, *moved))
        fits = reduce(and_, (xp.isfinite(v) for v in single))
        moved = [xp.where(fits, new, native_copy(xp, given)) for new, given in zip(moved, live, strict=True)]
    for given, new in zip(live, moved, strict=True):
        assign(xp, given, new)
        a.back(None, given)  # for the waiting


def _table_of_nothing(a: Arrays, C: int, training: bool, eps: float) -> Array:
    """The context's table of an empty batch."""
    table = a.xp.zeros((rows.ANCHOR, C), np.float64)
    if not training:
        table[rows.MEAN], table[rows.VAR] = native_copy(a.xp, a["running_mean"]), native_copy(a.xp, a["running_var"])
    table[rows.INVSTD] = 1.0 / a.xp.sqrt(table[rows.VAR] + eps)
    return table


@lru_cache(maxsize=1024)
def _backward_plan(facts: Facts, axis: int, layout: Layout | None) -> Plan:
    """The checks of a backward that need no address, and its plan."""
    s = Shapes(facts)
    s.like_x("dy")
    s.output()
    return _plan(s, axis, s.data(axis), layout)


def backward(dy: Array, ctx: Context, out: Array | None) -> tuple[Array | None, ...]:
    """`fastbn.batch_norm_backward` on a GPU."""
    if dy is None:
        raise TypeError("dy is None; pass the gradient of y, an array of x's shape and dtype")
    a = Arrays(x=ctx.x, dy=dy, out=out)
    state, layout = (None, None) if ctx.state is None else ctx.state
    p = _backward_plan(a.facts, ctx.axis, layout)
    a.writable("out")
    a.apart(p.reach, "dy", False)
    xp, C = a.xp, a.x.shape[ctx.axis]
    with a.on_device():
        given = [None if d is None else d.newbyteorder("=") for d in (ctx.gamma_dtype, ctx.beta_dtype)]
        found = {d for d in given if d is not None}
        common = np.dtype(np.float64) if len(found) > 1 else next(iter(found), None)
        empty = xp.zeros if state is None else xp.empty  # the kernels write every channel
        dgamma, dbeta = (None if dtype is None else empty(C, common) for dtype in given)
        dresidual = None
        if state is None or layout is None:
            dx = xp.empty_like(a.x) if out is None else a["out"]
            dresidual = xp.empty_like(a.x)
        else:
            dx, dx_flat, finish = layout.written(xp, a["out"], "out" in p.direct)
            dresidual_flat, finish_dresidual = None, no_more
            if ctx.has_residual:
                dresidual, dresidual_flat, finish_dresidual = layout.written(xp, None, False)
            dy_flat = layout.read(xp, a["dy"], "dy" in p.direct)
            cuda_backend.backward(dy_flat, dx_flat, state, dgamma=dgamma, dbeta=dbeta, dresidual=dresidual_flat)
            finish()
            finish_dresidual()
        dgamma = None if dgamma is None else dgamma.astype(given[0], copy=False)
        dbeta = None if dbeta is None else dbeta.astype(given[1], copy=False)
    result = a.back("out", dx), a.back(None, dgamma), a.back(None, dbeta)
    return (*result, a.back(None, dresidual)) if ctx.has_residual else result


@lru_cache(maxsize=1024)
def _inference_plan(facts: Facts, axis: int) -> Plan:
    """The checks of an inference that need no address, and its plan."""
    s = Shapes(facts)
    dtype = s.data(axis)
    axis %= s.ndim
    parameters, statistics = channels(s.vectors(axis, "gamma", "beta")), channels(s.vectors(axis, "mean", "var"))
    s.like_x("residual")
    s.output()
    return _plan(s, axis, dtype, None, parameters, statistics)


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
    p = _inference_plan(a.facts, a.axis(axis))
    eps, relu = scalars.eps(eps), scalars.activation(activation)
    a.writable("out")
    a.apart(p.reach, "x", False)
    with a.on_device():
        if p.layout is None:
            return a.back("out", a.xp.empty_like(a.x) if out is None else a["out"])
        y, y_flat, finish = p.layout.written(a.xp, a["out"], "out" in p.direct)
        cuda_backend.inference(
            p.layout.read(a.xp, a.x, "x" in p.direct),
            y_flat,
            p.layout.shape,
            *_read(p.parameters, a, "gamma", "beta"),
            *_read(p.statistics, a, "mean", "var"),
            eps=eps,
            relu=relu,
            residual=None if residual is None else p.layout.read(a.xp, a["residual"], "residual" in p.direct),
            dtype=p.dtype,
        )
        finish()
    return a.back("out", y)


@lru_cache(maxsize=1024)
def _moments_plan(facts: Facts, axis: int) -> Plan:
    """The checks of moments, and their plan."""
    s = Shapes(facts)
    dtype = s.data(axis)
    s.weight(axis % s.ndim)
    return _plan(s, axis % s.ndim, dtype)


def moments(x: Array, axis: int, sample_weight: Array | None) -> Moments:
    """`fastbn.moments` on a GPU. With sample weights it waits for their sum, which a Moments holds on the host."""
    from fastbn.statistics import Moments

    a = Arrays(x=x, sample_weight=sample_weight)
    axis = a.axis(axis)
    p = _moments_plan(a.facts, axis)
    C = a.x.shape[axis]
    if p.layout is None:
        return Moments.empty(C)
    with a.on_device():
        x_flat, weight = p.layout.read(a.xp, a.x, "x" in p.direct), p.layout.weight(a.xp, a["sample_weight"])
        count, mean, m2, low = cuda_backend.moments(x_flat, p.layout.shape, sample_weight=weight, dtype=p.dtype)
        count = float(count)
        return Moments.empty(C) if count == 0.0 else Moments(count, mean, m2, low)


__all__ = ["GpuContext", "backward", "forward", "inference", "is_gpu_array", "moments"]
