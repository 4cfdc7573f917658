"""Calls on NumPy arrays: workspace, and the job that `dispatch` runs. Arguments have been checked when they come here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import dispatch, layout
from fastbn.cpu.dispatch import Job, Schedule
from fastbn.cpu.layout import Plan
from fastbn.cpu.memory import Frame, Tensor, Weights, block_totals, both_streamed, readable, streamed, writable
from fastbn.kernels import rows

Array = NDArray[Any]

# What running statistics can hold.
LARGEST = {name: float(np.finfo(name).max) for name in ("float32", "float64")}


@dataclass
class State:
    """What the backward needs of a forward, beside x."""

    frame: Frame
    table: Array
    mask: Array | None
    weights: Weights | None


# ---------------------------------------------------------------------------------------------------------------- jobs


def mask_shape(p: Plan) -> tuple[int, int, int]:
    """(words, row stride, channel stride) of the packed ReLU mask; one word more, as words are read in pairs."""
    if p.family == "planes":
        words = -(-p.S // layout.LANES)
        return p.N * p.C * words + 1, p.C * words, words
    words = -(-p.C * p.S * p.fold // layout.LANES)
    return (p.rows + 1) * words + 1, words, 1


def _mask_tensor(mask: Array | None, p: Plan) -> Tensor | None:
    return None if mask is None else (mask, *mask_shape(p)[1:])


def _job(s: Schedule, threads: int, weights: Weights | None) -> Job:
    """The arguments that depend on plan and schedule alone, and the workspace."""
    job = s.arguments.copy()
    if weights is not None:
        job["weight"] = (weights.array, 1) if weights.kind == "row_weight" else (weights.array, weights.array.shape[1], 1)
    job["scratch"] = np.empty((threads, *s.scratch))
    return job


def _prepare_moments(job: Job, f: Frame, s: Schedule, weights: Weights | None) -> None:
    """What a job needs for moments: workspace, offsets in a channel of the three values whose median is the shift, sums of weights."""
    job["partial"] = np.empty(s.partial)
    stride = job["x"][1] // f.plan.fold
    a, b, c = f.points if weights is None else weights.points
    job["points"] = a[0] * stride + a[1], b[0] * stride + b[1], c[0] * stride + c[1]
    if weights is not None:
        job["counts"] = block_totals(weights, f.plan, s)


def _kind(weights: Weights | None) -> str | None:
    return None if weights is None else weights.kind


def present_arguments(
    residual: object,
    weights: str | None,
    mask: object,
    relu: bool,
    dresidual: object = None,
    frozen: bool = False,
    wide: bool = False,
    brief: bool | None = None,
) -> tuple[str, ...]:
    """Names of the optional arguments that are there: they choose the kernel's variant."""
    if residual is weights is mask is dresidual is brief is None and not relu and not frozen and not wide:
        return ()
    given = {
        "residual": residual is not None,
        "mask": mask is not None,
        "relu": relu,
        "dresidual": dresidual is not None,
        "frozen": frozen,
        "wide": wide,
        "brief": brief is not None,
    }
    names = tuple(name for name, there in given.items() if there)
    return names if weights is None else (*names, weights)


def wide_lanes(dtype: str, residual: object) -> bool:
    """Whether y needs float64 lanes: for float64, and for the sum with a residual, which may cancel."""
    return dtype == "float64" or residual is not None


def brief_sums(dtype: str, weights: object, frozen: bool) -> bool | None:
    """True or None: whether a backward is computed in float32 lanes where they do (kernels/cpu/planes_backward.py)."""
    return True if dtype in ("float16", "bfloat16") and weights is None and not frozen else None


def parameter_table(C: int, gamma: Array | None, beta: Array | None) -> Array:
    """A forward's table with the parameters; zeros elsewhere."""
    table = np.zeros((rows.TABLE_ROWS, C))
    table[rows.GAMMA] = 1.0 if gamma is None else gamma
    if beta is not None:
        table[rows.BETA] = beta
    return table


def set_statistics(table: Array, mean: Array, var: Array, low: Array | None = None) -> None:
    """Put given statistics into a table of `parameter_table`; `low` is what rounding the mean has lost."""
    table[rows.MEAN], table[rows.VAR] = mean, var
    if low is not None:
        table[rows.LOW] = low


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
    s = f.schedules[1, residual is not None, not given]
    job = _job(s, threads, weights)
    job.update(
        x=x_tensor,
        y=y_tensor,
        residual=None if residual is None else readable(residual, f),
        mask=_mask_tensor(mask, p),
        relu=True if relu else None,
        table=table,
        eps=eps,
        streamed=f.large and streamed(y_tensor, f, with_mask),
    )
    wide = wide_lanes(f.dtype, residual)
    job["wide"] = True if wide else None
    present = present_arguments(residual, _kind(weights), mask, relu, wide=wide)
    if given:  # neither moments nor a shift for them
        dispatch.run("inference", p, s, "sweeps", f.dtype, present, job, threads)
    else:
        _prepare_moments(job, f, s, weights)
        dispatch.run("forward", p, s, s.road, f.dtype, present, job, threads)
    if made is not None:
        y[...] = made
    return y, mask


def statistics(x: Array, f: Frame, weights: Weights | None) -> Array:
    """A table with x's MEAN, LOW and VAR."""
    p = f.plan
    x_tensor = readable(x, f)
    table = parameter_table(p.C, None, None)
    threads = dispatch.threads_for(f.size)
    s = f.schedules[1, False, False]
    job = _job(s, threads, weights)
    job.update(x=x_tensor, table=table, eps=1.0)
    _prepare_moments(job, f, s, weights)
    dispatch.run("moments", p, s, "sweeps", f.dtype, present_arguments(None, _kind(weights), None, False), job, threads)
    return table


def update_running(table: Array, mean: Array, var: Array, momentum: float, correction: float, limit: float, force: bool) -> int:
    """Move the running statistics; how many channels exceed the limit. With any, nothing is written unless `force`."""
    strides = mean.strides[0] // mean.itemsize, var.strides[0] // var.itemsize
    dtype = "float32" if mean.itemsize == 4 else "float64"
    return dispatch.call("update_running", dtype, table, mean, var, len(mean), *strides, momentum, correction, limit, force)


# ------------------------------------------------------------------------------------------------------------- backward


def _backward_job(dy: Array, x: Array, state: State, threads: int, s: Schedule) -> tuple[Job, Array]:
    """The job's inputs, and the backward's table."""
    f = state.frame
    grads = np.empty((rows.BACKWARD_ROWS, f.plan.C))
    job = _job(s, threads, state.weights)
    job.update(x=readable(x, f), dy=readable(dy, f), mask=_mask_tensor(state.mask, f.plan), table=state.table, grads=grads)
    job["partial"] = np.empty(s.partial)
    return job, grads


def _gradients(
    job: Job, out: Array | None, dtype: np.dtype[Any], f: Frame, with_residual: bool
) -> tuple[Array, Array | None, list[tuple[Array, Array]]]:
    """dx and dresidual, which the job is to write, and (array, what it is copied from afterwards) for those it cannot write."""
    dx, dx_tensor, made = writable(out, dtype, f)
    unfinished = [] if made is None else [(dx, made)]
    dresidual, dresidual_tensor = None, None
    if with_residual:
        dresidual, dresidual_tensor, made = writable(None, dtype, f)
        if made is not None:
            unfinished.append((dresidual, made))
    job.update(dx=dx_tensor, dresidual=dresidual_tensor, streamed=f.large and both_streamed(dx_tensor, dresidual_tensor, f))
    return dx, dresidual, unfinished


def backward(
    dy: Array, x: Array, state: State, frozen: bool, count: float, with_residual: bool, out: Array | None
) -> tuple[Array, Array, Array | None]:
    """(dx, the backward's table, dresidual or None)."""
    f, p = state.frame, state.frame.plan
    threads = dispatch.threads_for(f.size)
    s = f.schedules[2, False, not frozen]
    weights = None if frozen else state.weights
    state = State(f, state.table, state.mask, weights)
    job, grads = _backward_job(dy, x, state, threads, s)
    dx, dresidual, unfinished = _gradients(job, out, x.dtype, f, with_residual)
    job.update(count=count, constant=frozen, frozen=True if frozen else None)
    job["brief"] = brief = brief_sums(f.dtype, weights, frozen)
    present = present_arguments(None, _kind(weights), state.mask, False, dresidual, frozen, brief=brief)
    road = "sweeps" if frozen else s.road
    dispatch.run("backward", p, s, road, f.dtype, present, job, threads)
    for gradient, made in unfinished:
        gradient[...] = made
    return dx, grads, dresidual


def reduce(dy: Array, x: Array, state: State) -> Array:
    """The backward's table with SUM_DY and SUM_DY_XMU of this part of a batch."""
    f, p = state.frame, state.frame.plan
    threads = dispatch.threads_for(f.size)
    s = f.schedules[2, False, False]
    job, grads = _backward_job(dy, x, state, threads, s)
    job.update(count=1.0, constant=True)
    dispatch.run("reduce", p, s, "sweeps", f.dtype, present_arguments(None, _kind(state.weights), state.mask, False), job, threads)
    return grads


def apply(
    dy: Array, x: Array, state: State, sums: tuple[Array, Array], count: float, with_residual: bool, out: Array | None
) -> tuple[Array, Array | None]:
    """dx and dresidual from sums over the whole batch, of which this is a part."""
    f, p = state.frame, state.frame.plan
    threads = dispatch.threads_for(f.size)
    s = f.schedules[2, False, False]
    job, grads = _backward_job(dy, x, state, threads, s)
    job["partial"] = np.stack([*sums, *sums], axis=1)[:, None, :].copy()
    dx, dresidual, unfinished = _gradients(job, out, x.dtype, f, with_residual)
    job.update(count=count, constant=False, frozen=None)
    dispatch.call("finish_backward", "float64", state.table, grads, job["partial"], p.C, count, False, None)
    present = present_arguments(None, _kind(state.weights), state.mask, False, dresidual)
    dispatch.run("apply", p, s, "sweeps", f.dtype, present, job, threads)
    for gradient, made in unfinished:
        gradient[...] = made
    return dx, dresidual
