"""NumPy arrays on their way to the kernels: memory, workspace, and the job that `dispatch` runs.

Arguments have been checked when they come here. Nothing of x's size is made, but for the outputs and for inputs whose strides or byte
order the kernels cannot take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import dispatch, layout
from fastbn.dispatch import Job, Schedule
from fastbn.layout import Plan

Array = NDArray[Any]
Tensor = tuple[Array, int, int]

# Rows of the tables, as in kernels/channels.py, which is not imported before it is needed: it imports Numba.
GAMMA, VAR, INVSTD, MEAN, LOW, SCALE, BETA, ANCHOR = range(8)
SUM_DY, SUM_DY_XMU, COEF_A, COEF_B, COEF_C = range(5)

# Outputs from this size on are streamed around the cache; smaller ones are likely to be read again from it.
STREAM_FROM = 8 << 20
LINE = 64
# What running statistics can hold.
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


class Frame:
    """How the arrays of one kind of call are read: the plan, and what follows from it. Made once for a shape, strides and axis.

    Attributes
    ----------
    shape, axis, dtype, itemsize, plan
        What it was made for, and `layout.plan` of it.
    size : int
        Values in an array.
    pieces : int
        Kernel calls an operation is cut into at least, so that Ctrl-C is noticed.
    schedules : tuple of Schedule
        For the forward and for the backward.
    """

    def __init__(self, shape: tuple[int, ...], axis: int, dtype: str, itemsize: int, plan: Plan) -> None:
        self.shape, self.axis, self.dtype, self.itemsize, self.plan = shape, axis, dtype, itemsize, plan
        self.size = plan.count * plan.C
        self.pieces = 1 + self.size * itemsize // dispatch.PIECE
        self.schedules = dispatch.schedule(plan, itemsize, 1), dispatch.schedule(plan, itemsize, 2)
        self._strides: dict[tuple[int, ...], tuple[int, int] | None] = {}

    def strides(self, a: Array) -> tuple[int, int] | None:
        """(row stride, channel stride) of an array of this shape, or None where it must be copied first."""
        known = self._strides
        if a.strides not in known:
            known[a.strides] = layout.tensor_strides(self.plan, self.axis, a.shape, a.strides, a.itemsize)
        return known[a.strides]


@dataclass(frozen=True)
class Weights:
    """Sample weights as the kernels read them: float64 (N, S), or (N,) where they are the same for all S positions.

    For columns the S positions of a row are followed by their first sixteen (again and again, if there are fewer).

    And their sum over all positions, how many are positive, their effective number sum(w)**2 / sum(w**2), and three places (n, s)
    where they are positive. `kind` is the name of the optional argument that they are.
    """

    array: Array
    kind: str
    total: float
    positive: int
    effective: float
    points: tuple[tuple[int, int], ...]


@dataclass
class State:
    """What the backward needs of a forward, beside x."""

    frame: Frame
    table: Array
    mask: Array | None
    weights: Weights | None


# ------------------------------------------------------------------------------------------------------------- memory


def address(a: Array) -> int:
    """The address of a[0, 0, ...]."""
    return a.__array_interface__["data"][0]  # type: ignore[no-any-return]


def native(x: Array) -> Array:
    """x itself, or a copy in native byte order at an aligned address."""
    if x.dtype.isnative and x.flags.aligned:
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="K")


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], order: tuple[int, ...]) -> Array:
    """An uninitialised array whose axes lie in memory in `order`; large ones start at a cache line, so that they can be streamed."""
    in_memory = tuple(shape[a] for a in order)
    size = dtype.itemsize
    for n in in_memory:
        size *= n
    if size < STREAM_FROM:
        a = np.empty(in_memory, dtype)
    else:
        raw = np.empty(size + LINE, np.uint8)
        offset = -address(raw) % LINE
        a = raw[offset : offset + size].view(dtype).reshape(in_memory)
    return a if order == tuple(range(len(order))) else a.transpose(_inverse(order))


@lru_cache(maxsize=256)
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(a) for a in range(len(order)))


@lru_cache(maxsize=1024)
def _frame(shape: tuple[int, ...], strides: tuple[int, ...], axis: int, dtype: str, itemsize: int, weighted: bool) -> Frame:
    return Frame(shape, axis, dtype, itemsize, layout.plan(shape, strides, axis, itemsize, weighted))


def frame_of(x: Array, axis: int, dtype: str, weighted: bool) -> Frame:
    """The frame for x, which is native."""
    return _frame(x.shape, x.strides, axis, dtype, x.itemsize, weighted)


def readable(a: Array, f: Frame) -> Tensor:
    """A tensor the kernels can read under the frame's plan: `a` itself if possible."""
    a = native(a)
    strides = f.strides(a)
    if strides is None:
        copy = empty(a.shape, a.dtype, f.plan.order)
        copy[...] = a
        a, strides = copy, f.strides(copy)
        assert strides is not None
    return a, strides[0], strides[1]


def writable(out: Array | None, dtype: np.dtype[Any], f: Frame) -> tuple[Array, Tensor, Array | None]:
    """(array to return, tensor to write, array to copy from afterwards or None).

    Without `out` a new array of `dtype` in x's memory order; a new one too where the kernels cannot write `out` directly.
    """
    if out is not None and out.dtype.isnative and out.flags.aligned:
        strides = f.strides(out)
        if strides is not None:
            return out, (out, *strides), None
    made = empty(f.shape, dtype if dtype.isnative else dtype.newbyteorder("="), f.plan.order)
    strides = f.strides(made)
    assert strides is not None
    if out is None and not dtype.isnative:  # y has x's dtype, byte order included
        out = empty(f.shape, dtype, f.plan.order)
    return (made, (made, *strides), None) if out is None else (out, (made, *strides), made)


def finish_output(out: Array, made: Array | None) -> None:
    """Copy to an `out` that the kernels could not write."""
    if made is not None:
        out[...] = made


def weights_of(sample_weight: Array, f: Frame) -> Weights:
    """Checked weights, (N,) or x's shape without the channel axis, in the order of the plan."""
    p = f.plan
    shape = tuple(n for a, n in enumerate(f.shape) if a != f.axis)
    by_sample = sample_weight.shape != shape
    if by_sample and (f.axis == 0 or p.order[0] != 0):  # a sample's positions do not lie side by side
        sample_weight = np.broadcast_to(sample_weight.reshape(sample_weight.shape + (1,) * (len(shape) - 1)), shape)
        by_sample = False
    if not by_sample:
        sample_weight = sample_weight.transpose([a - (a > f.axis) for a in p.order if a != f.axis])
    array: Array = np.ascontiguousarray(sample_weight, dtype=np.float64).reshape(-1)
    times = math.prod(shape[1:]) if by_sample else 1  # positions that share a weight
    where = np.flatnonzero(array)
    chosen = where[[0, len(where) // 2, -1]] if len(where) else np.zeros(3, np.intp)
    points = tuple(divmod(int(k) * times, max(p.S, 1)) for k in chosen)
    total = times * float(array.sum())
    part = array / (array.max(initial=0.0) or 1.0)  # of the largest: squares of these neither overflow nor vanish
    effective = times * float(part.sum()) ** 2 / (float(np.square(part).sum()) or 1.0)
    if by_sample:
        array = np.repeat(array, p.N // max(array.size, 1))
    elif p.S > 1:
        array = array.reshape(p.N, p.S)
        if p.family == "columns":
            array = np.take(array, np.arange(p.S + layout.LANES) % p.S, axis=1)
    return Weights(array, "weight" if array.ndim == 2 else "row_weight", total, times * len(where), effective, points)


# ---------------------------------------------------------------------------------------------------------------- jobs


def _streamed(y: Tensor, f: Frame, with_mask: bool) -> bool:
    """Whether the output is written around the cache: it is large, and rows keep the alignment that this needs."""
    p = f.plan
    if f.size * f.itemsize < STREAM_FROM:
        return False
    if p.family == "planes":
        return True
    boundary = min(LINE, layout.LANES * f.itemsize)
    return y[1] * f.itemsize % boundary == 0 and not (with_mask and address(y[0]) % boundary)


def _both_streamed(dx: Tensor, dresidual: Tensor | None, f: Frame) -> bool:
    """Whether dx and dresidual are written around the cache: where one vector is aligned, so is the other."""
    if not _streamed(dx, f, False):
        return False
    return dresidual is None or (dx[1] == dresidual[1] and (address(dx[0]) - address(dresidual[0])) % LINE == 0)


def _points(p: Plan, x: Tensor, weights: Weights | None) -> tuple[int, int, int]:
    """Offsets in a channel of the three values whose median is the shift."""
    stride = x[1] // p.fold
    if weights is not None:
        a, b, c = (n * stride + s for n, s in weights.points)
        return a, b, c
    return 0, p.N // 2 * stride + p.S // 2, (p.N - 1) * stride + p.S - 1


def mask_shape(p: Plan) -> tuple[int, int, int]:
    """(words, row stride, channel stride) of the packed ReLU mask; one word more, as words are read in pairs."""
    if p.family == "planes":
        words = -(-p.S // layout.LANES)
        return p.N * p.C * words + 1, p.C * words, words
    words = -(-p.C * p.S * p.fold // layout.LANES)
    return (p.rows + 1) * words + 1, words, 1


def _mask_tensor(mask: Array | None, p: Plan) -> Tensor | None:
    return None if mask is None else (mask, *mask_shape(p)[1:])


def _job(f: Frame, s: Schedule, threads: int, weights: Weights | None) -> Job:
    """The arguments that depend on plan and schedule alone, and the workspace."""
    job = s.arguments.copy()
    job["pieces"] = f.pieces
    job["weight"] = None
    if weights is not None:
        job["weight"] = (weights.array, 1) if weights.kind == "row_weight" else (weights.array, weights.array.shape[1], 1)
    job["partial"] = np.empty(s.partial)
    job["scratch"] = np.empty((threads, *s.scratch))
    return job


def _kind(weights: Weights | None) -> str | None:
    return None if weights is None else weights.kind


def _present(
    residual: object, weights: str | None, mask: object, relu: bool, dresidual: object = None, frozen: bool = False, wide: bool = False
) -> tuple[str, ...]:
    """Names of the optional arguments that are there: they choose the kernel's variant."""
    if residual is weights is mask is dresidual is None and not relu and not frozen and not wide:
        return ()
    given = {
        "residual": residual is not None,
        "weight": weights == "weight",
        "row_weight": weights == "row_weight",
        "mask": mask is not None,
        "relu": relu,
        "dresidual": dresidual is not None,
        "frozen": frozen,
        "wide": wide,
    }
    return tuple(name for name, there in given.items() if there)


def wide_lanes(dtype: str, residual: object) -> bool:
    """Whether y needs float64 lanes: for float64, and for the sum with a residual, which may cancel."""
    return dtype == "float64" or residual is not None


def parameter_table(C: int, gamma: Array | None, beta: Array | None) -> Array:
    table = np.empty((8, C))
    table[GAMMA] = 1.0 if gamma is None else gamma
    table[BETA] = 0.0 if beta is None else beta
    return table


def normalise(
    x: Array,
    f: Frame,
    table: Array,
    eps: float,
    given: bool,
    relu: bool,
    with_mask: bool,
    residual: Array | None,
    weights: Weights | None,
    out: Array | None,
    dtype: np.dtype[Any],
) -> tuple[Array, Array | None]:
    """y, of `dtype`, and the packed mask. Statistics are those in the table if `given`, else x's own, which are put there."""
    p = f.plan
    x_tensor = readable(x, f)
    y, y_tensor, made = writable(out, dtype, f)
    mask = np.empty(mask_shape(p)[0], np.uint16) if with_mask else None
    threads = dispatch.threads_for(f.size)
    s = f.schedules[0]
    job = _job(f, s, threads, weights)
    job.update(
        x=x_tensor,
        y=y_tensor,
        residual=None if residual is None else readable(residual, f),
        mask=_mask_tensor(mask, p),
        relu=True if relu else None,
        table=table,
        eps=eps,
        points=_points(p, x_tensor, weights),
        streamed=_streamed(y_tensor, f, with_mask),
    )
    wide = wide_lanes(f.dtype, residual)
    job["wide"] = True if wide else None
    present = _present(residual, _kind(weights), mask, relu, wide=wide)
    if given:
        dispatch.run("inference", p, s, "sweeps", f.dtype, present, job, threads)
    else:
        dispatch.run("forward", p, s, s.road, f.dtype, present, job, threads)
    finish_output(y, made)
    return y, mask


def statistics(x: Array, f: Frame, weights: Weights | None) -> Array:
    """A table with x's MEAN, LOW and VAR."""
    p = f.plan
    x_tensor = readable(x, f)
    table = parameter_table(p.C, None, None)
    threads = dispatch.threads_for(f.size)
    s = f.schedules[0]
    job = _job(f, s, threads, weights)
    job.update(x=x_tensor, table=table, eps=1.0, points=_points(p, x_tensor, weights))
    dispatch.run("moments", p, s, "sweeps", f.dtype, _present(None, _kind(weights), None, False), job, threads)
    return table


def update_running(table: Array, mean: Array, var: Array, momentum: float, correction: float, limit: float, force: bool) -> int:
    """Move the running statistics; how many channels exceed the limit. With any, nothing is written unless `force`."""
    job: Job = {
        "table": table,
        "running_mean": mean,
        "running_var": var,
        "C": len(mean),
        "mean_stride": mean.strides[0] // mean.itemsize,
        "var_stride": var.strides[0] // var.itemsize,
        "momentum": momentum,
        "correction": correction,
        "force": force,
        "limit": limit,
    }
    return dispatch.call("update_running", "float32" if mean.itemsize == 4 else "float64", job)


# ------------------------------------------------------------------------------------------------------------- backward


def _backward_job(dy: Array, x: Array, state: State, threads: int, s: Schedule) -> tuple[Job, Array]:
    """The job's inputs, and the backward's table."""
    f = state.frame
    grads = np.empty((5, f.plan.C))
    job = _job(f, s, threads, state.weights)
    job.update(x=readable(x, f), dy=readable(dy, f), mask=_mask_tensor(state.mask, f.plan), table=state.table, grads=grads)
    return job, grads


def backward(
    dy: Array, x: Array, state: State, frozen: bool, count: float, with_residual: bool, out: Array | None
) -> tuple[Array, Array, Array | None]:
    """(dx, the backward's table, dresidual or None)."""
    f, p, dtype = state.frame, state.frame.plan, x.dtype
    threads = dispatch.threads_for(f.size)
    s = f.schedules[1]
    weights = None if frozen else state.weights
    state = State(f, state.table, state.mask, weights)
    job, grads = _backward_job(dy, x, state, threads, s)
    dx, dx_tensor, made = writable(out, dtype, f)
    dresidual, dresidual_tensor, dresidual_made = writable(None, dtype, f) if with_residual else (None, None, None)
    job.update(
        dx=dx_tensor,
        dresidual=dresidual_tensor,
        count=count,
        constant=frozen,
        frozen=True if frozen else None,
        streamed=_both_streamed(dx_tensor, dresidual_tensor, f),
    )
    present = _present(None, _kind(weights), state.mask, False, dresidual, frozen)
    road = "sweeps" if frozen else s.road
    dispatch.run("backward", p, s, road, f.dtype, present, job, threads)
    finish_output(dx, made)
    if dresidual is not None:
        finish_output(dresidual, dresidual_made)
    return dx, grads, dresidual


def reduce(dy: Array, x: Array, state: State) -> Array:
    """The backward's table with SUM_DY and SUM_DY_XMU of this part of a batch."""
    f, p = state.frame, state.frame.plan
    threads = dispatch.threads_for(f.size)
    s = f.schedules[1]
    job, grads = _backward_job(dy, x, state, threads, s)
    job.update(count=1.0, constant=True)
    dispatch.run("reduce", p, s, "sweeps", f.dtype, _present(None, _kind(state.weights), state.mask, False), job, threads)
    return grads


def apply(
    dy: Array, x: Array, state: State, sums: tuple[Array, Array], count: float, with_residual: bool, out: Array | None
) -> tuple[Array, Array | None]:
    """dx and dresidual from sums over the whole batch, of which this is a part."""
    f, p, dtype = state.frame, state.frame.plan, x.dtype
    threads = dispatch.threads_for(f.size)
    s = f.schedules[1]
    job, _ = _backward_job(dy, x, state, threads, s)
    job["partial"] = np.stack([*sums, *sums], axis=1)[:, None, :].copy()
    dx, dx_tensor, made = writable(out, dtype, f)
    dresidual, dresidual_tensor, dresidual_made = writable(None, dtype, f) if with_residual else (None, None, None)
    streamed = _both_streamed(dx_tensor, dresidual_tensor, f)
    job.update(dx=dx_tensor, dresidual=dresidual_tensor, count=count, constant=False, frozen=None, streamed=streamed)
    dispatch.call("finish_backward", "float64", job)
    present = _present(None, _kind(state.weights), state.mask, False, dresidual)
    dispatch.run("apply", p, s, "sweeps", f.dtype, present, job, threads)
    finish_output(dx, made)
    if dresidual is not None:
        finish_output(dresidual, dresidual_made)
    return dx, dresidual
