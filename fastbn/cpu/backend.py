"""Calls on NumPy arrays: workspace and outputs, one program of kernels, what is left to do after it. Twin: fastbn/cuda/backend.py.

Arguments have been checked and planned when they come here. A small call is one call of machine code: parameters are read, and running
statistics moved, by the same program that normalises.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.common.context import Context
from fastbn.common.facts import seen_by_numpy as seen  # noqa: F401  (a backend's function)
from fastbn.cpu import weights as sample_weights
from fastbn.cpu.dispatch import run
from fastbn.cpu.memory import native, workspace
from fastbn.cpu.plan import CpuPlan as CpuPlan
from fastbn.cpu.threads import get_num_threads
from fastbn.cpu.weights import Weights, block_totals
from fastbn.cpu.weights import span as weight_range  # noqa: F401  (a backend's function)
from fastbn.kernels import rows
from fastbn.kernels.cpu.arguments import whole_lines
from fastbn.kernels.formulas import running_average

Array = NDArray[Any]

# What users of the library write it as, and whether weights can be looked at without waiting.
LIBRARY, COUNTS_WEIGHTS = "np", True
# Stands for a per-channel array that is absent.
NOTHING = np.zeros(1)


# ----------------------------------------------------------------------------------------------------------- what is shared


def separate(plan: CpuPlan, arrays: tuple[Any, ...]) -> bool:
    """Whether what is written shares no memory with anything else for certain; False where that takes a closer look.

    Two arrays that own their memory share none, nor do views of two such arrays. This takes a tenth of the time of np.may_share_memory.
    """
    owners = []
    for a in arrays:
        if a is not None:
            base = a.base
            if base is None:
                owners.append(id(a))
            elif type(base) is not np.ndarray or base.base is not None:
                return False
            else:
                owners.append(id(base))
    return len(owners) == len(set(owners))


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; True if that cannot be told quickly."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # any work bound is allowed, the stub knows two
    except np.exceptions.TooHardError:
        return True


def same_place(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides and a.shape == b.shape


def weigh(plan: CpuPlan, weight: Array) -> Weights:
    """Sample weights as kernels read them, with their sum and how many are above 0."""
    return sample_weights.weigh(weight, plan.seen["sample_weight"], plan.frame)


# ------------------------------------------------------------------------------------------------------------------ forward


def _move(plan: CpuPlan, table: Array, mean: Array, var: Array, momentum: float, correction: float) -> None:
    """Move running statistics towards those in a table, all channels but those that are not finite, after a warning of these."""
    new = table[rows.MEAN], table[rows.VAR] * correction
    fits = (abs(new[0]) <= plan.limit) & (new[1] <= plan.limit)
    if not fits.all():
        _warn(plan, plan.C - int(fits.sum()), correction)
    before = mean.copy(), var.copy()
    moved = [
        np.where(fits, running_average(old.astype(np.float64), v, momentum), old)  # type: ignore[no-untyped-call]
        for old, v in zip(before, new, strict=True)
    ]
    try:
        mean[...], var[...] = moved
    except BaseException:  # Ctrl-C among them
        mean[...], var[...] = before
        raise


def _of_nothing(plan: CpuPlan, x: Array, out: Array | None, eps: float, mean: Any, var: Any, count: float = 0.0) -> tuple[Array, Context]:
    """y and context of an empty batch, which learns nothing."""
    table = np.zeros((rows.TABLE_ROWS, plan.C))
    if mean is not None:
        table[rows.MEAN], table[rows.VAR] = mean, var
    with np.errstate(invalid="ignore", divide="ignore"):  # running_var may hold anything
        table[rows.INVSTD] = 1.0 / np.sqrt(table[rows.VAR] + eps)
    return np.empty_like(x) if out is None else out, Context(x, plan, count, table)


def forward(
    plan: CpuPlan, x: Array, gamma: Array | None, beta: Array | None, running_mean: Array | None, running_var: Array | None,
    residual: Array | None, out: Array | None, weights: Weights | None, eps: float, momentum: float, unbiased: bool,
) -> tuple[Array, Context]:  # fmt: skip
    """y, and the context of a training or frozen forward; running statistics move last."""
    if plan.empty:
        return _of_nothing(plan, x, out, eps, None if plan.training else running_mean, None if plan.training else running_var)
    if not plan.training:
        weights = None
    count = plan.values if weights is None else weights.total
    correction = 1.0
    if unbiased and plan.moves:
        n = count if weights is None else weights.effective
        correction = n / (n - 1.0) if n > 1.0 else np.inf  # infinite: running_var is left alone
    ctx = Context(x, plan, count, np.empty(plan.table_shape), None if plan.mask is None else plan.new_mask(), weights)
    vectors = gamma, beta, running_mean, running_var, None
    if running_mean is None or running_var is None or not plan.moves:
        return _run_forward(plan, ctx.table, ctx.mask, x, vectors, residual, out, weights, eps), ctx
    before = running_mean.copy(), running_var.copy()
    try:
        y = _run_forward(plan, ctx.table, ctx.mask, x, vectors, residual, out, weights, eps, momentum, correction)
    except BaseException:  # Ctrl-C among them, which may strike after the kernels have returned
        running_mean[...], running_var[...] = before
        raise
    return y, ctx


def forward_apply(
    plan: CpuPlan, x: Array, gamma: Array | None, beta: Array | None, running_mean: Array | None, running_var: Array | None,
    residual: Array | None, out: Array | None, weights: Weights | None, eps: float, momentum: float, correction: float, moments: Any,
) -> tuple[Array, Context]:  # fmt: skip
    """The forward of a part of a batch, with the moments of all of it; running statistics move by those."""
    if plan.empty:
        mean, var = (moments.mean, moments.var()) if moments.count else (None, None)
        y, ctx = _of_nothing(plan, x, out, eps, mean, var, moments.count)
    else:
        ctx = Context(x, plan, moments.count, np.empty(plan.table_shape), plan.new_mask(), weights)
        vectors = gamma, beta, moments.mean, moments.var(), moments.mean_lo
        y = _run_forward(plan, ctx.table, ctx.mask, x, vectors, residual, out, None, eps)
    if running_mean is not None and running_var is not None and moments.count:
        _move(plan, ctx.table, running_mean, running_var, momentum, correction)
    return y, ctx


def inference(
    plan: CpuPlan, x: Array, gamma: Array | None, beta: Array | None, mean: Array, var: Array, residual: Array | None,
    out: Array | None, eps: float,
) -> Array:  # fmt: skip
    """y with given statistics."""
    if plan.empty:
        return np.empty_like(x) if out is None else out
    return _run_forward(plan, np.empty(plan.table_shape), None, x, (gamma, beta, mean, var, None), residual, out, None, eps)


def _run_forward(
    plan: CpuPlan, table: Array, mask: Array | None, x: Array, vectors: tuple[Array | None, ...], residual: Array | None,
    out: Array | None, weights: Weights | None, eps: float, momentum: float = 0.0, correction: float = 1.0,
) -> Array:  # fmt: skip
    """y, and what else the program of a forward writes: table, mask, running statistics."""
    frame = plan.frame
    if plan.fresh is not None:
        y = written = plan.fresh()
    elif plan.operation == "moments":  # nothing is written in the place of y
        y = written = x
    else:
        y, written = frame.write(out, plan.out_at, plan.x_dtype)
    x_read = x if plan.x_at is not None else frame.copied(x)
    residual_read = residual if residual is None or plan.residual_at is not None else frame.copied(residual)
    weight, totals, constants = None, None, plan.constants
    if weights is not None:
        weight, totals = weights.array, block_totals(weights, frame.layout, plan.schedule)
        constants = plan.constants_at(weights.shift_places)
    if plan.copied_channels:
        given, vectors = vectors, tuple(None if a is None else native(a) for a in vectors)
    gamma, beta, mean, var, low = vectors
    threads = min(get_num_threads(), plan.most_threads) if plan.most_threads > 1 else 1
    arrays = (
        x_read, written, residual_read, weight, totals, mask,
        NOTHING if gamma is None else gamma, NOTHING if beta is None else beta, NOTHING if mean is None else mean,
        NOTHING if var is None else var, NOTHING if low is None else low,
        table, workspace(plan.one_call, plan.workspace + threads * plan.scratch),
    )  # fmt: skip
    streamed = frame.large and frame.streams(written, plan.written[0], mask is not None)
    numbers = eps, momentum, correction, plan.limit, False, streamed
    arguments = arrays, plan.options, numbers, constants
    found = run(plan.program or plan.compiled(), plan.schedule, arguments, threads)
    if found:
        _see_to(plan, found, arguments, threads)
    if written is not y:
        y[...] = written
    if plan.copied_channels and plan.run == "forward":
        for running, new in zip(given[2:4], vectors[2:4], strict=True):
            if running is not None and new is not None:
                running[...] = new
    return y


def _see_to(plan: CpuPlan, found: int, arguments: tuple[Any, ...], threads: int) -> None:
    """See to what a phase of a forward found: channels that float32 lanes cannot do, statistics that are not finite; then go on."""
    program, (arrays, options, numbers, constants) = plan.compiled(), arguments
    while found and plan.operation != "moments":  # which want no y
        channels, phase = divmod(found, rows.PHASES)
        if program.names[phase] == "update_running":
            eps, momentum, correction, limit, _, streamed = numbers
            _warn(plan, channels, correction)
            forced = eps, momentum, correction, limit, True, streamed
            run(program, plan.schedule, (arrays, options, forced, constants), threads, phase)
            return
        # In float64 lanes, before or after the others: each channel is written once.
        run(plan.of_leftovers(), plan.schedule, (arrays, (options[0], True, True), numbers, constants), threads)
        found = run(program, plan.schedule, arguments, threads, phase + 1)


def _warn(plan: CpuPlan, skipped: int, correction: float) -> None:
    """Warn of channels whose running statistics stay as they were."""
    if correction < np.inf:
        dtype = "float32" if plan.limit < 1e40 else "float64"
        reason = f"{skipped} of {plan.C} channels have statistics that are not finite in {dtype}; their"
    else:
        reason = "all but one of the sample weights are vanishingly small, which leaves no unbiased variance;"
    warnings.warn(f"{reason} running statistics stay as they were", RuntimeWarning, stacklevel=_outside())


def _outside() -> int:
    """The stacklevel of the first caller that is not fastbn, for a warning in the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastbn":
        frame, level = frame.f_back, level + 1
    return level


def moments(plan: CpuPlan, x: Array, weights: Weights | None) -> tuple[float, Array, Array, Array]:
    """Count, mean, sum of squared deviations, and what rounding the mean has lost; a count of 0 where there is nothing."""
    nothing = np.zeros(plan.C)
    count = 0.0 if plan.empty else plan.values if weights is None else weights.total
    if count == 0.0:
        return 0.0, nothing, nothing, nothing
    table = np.empty(plan.table_shape)
    _run_forward(plan, table, None, x, (None,) * 5, None, None, weights, 1.0)
    return count, table[rows.MEAN], table[rows.VAR] * count, table[rows.LOW]


# ----------------------------------------------------------------------------------------------------------------- backward


def _run_backward(
    plan: CpuPlan, x: Array, dy: Array, ctx: Context, out: Array | None, dgamma: Array | None, dbeta: Array | None, count: float,
    sums: Any = None,
) -> tuple[Array, Array | None, Array]:  # fmt: skip
    """dx, dresidual and the workspace, which begins with the sums over each channel. `sums` are given ones, in place of x's own."""
    frame, dresidual, dresidual_written, streamed = plan.frame, None, None, False
    if plan.fresh is not None:
        dx = written = plan.fresh()
    elif plan.operation == "reduce":  # nothing is written in the place of dx
        dx = written = x
    else:
        dx, written = frame.write(out, plan.out_at, plan.x_dtype)
    x_read = x if plan.x_at is not None else frame.copied(x)
    dy_read = dy if plan.dy_at is not None else frame.copied(dy)
    if plan.operation != "reduce":
        if plan.has_residual:
            dresidual, dresidual_written = frame.write(None, None, plan.x_dtype)
        streamed = frame.large and frame.streams_both(written, plan.written[0], dresidual_written)
    weight = None if plan.frozen or ctx.weights is None else ctx.weights.array
    threads = min(get_num_threads(), plan.most_threads) if plan.most_threads > 1 else 1
    own = workspace(plan.one_call, plan.workspace + threads * plan.scratch)
    if sums is not None:  # as if of one block
        partial = own[whole_lines(rows.BACKWARD_ROWS * plan.C) :][: 4 * plan.C]
        partial.reshape(4, plan.C)[...] = [*sums, *sums]
    arrays = (
        x_read, dy_read, written, dresidual_written, weight, ctx.mask,
        NOTHING if dgamma is None else dgamma, NOTHING if dbeta is None else dbeta, ctx.table, own,
    )  # fmt: skip
    numbers = count, plan.constant, streamed
    program = plan.program or plan.compiled()
    found = run(program, plan.schedule, (arrays, plan.options, numbers, plan.constants), threads)
    if found:  # channels do not suit sums in float32, and nothing has been written
        run(plan.in_float64(), plan.schedule, (arrays, (None, None), numbers, plan.constants), threads)
    if written is not dx:
        dx[...] = written
    if dresidual is not None and dresidual is not dresidual_written:
        dresidual[...] = dresidual_written
    return dx, dresidual, own


def backward(plan: CpuPlan, x: Array, dy: Array, ctx: Context, out: Array | None) -> tuple[Array | None, ...]:
    """dx, dgamma and dbeta, and dresidual where the forward had a residual."""
    gamma, beta = plan.parameters
    new = np.zeros if plan.empty else np.empty
    dgamma, dbeta = None if gamma is None else new(plan.C, gamma), None if beta is None else new(plan.C, beta)
    dresidual: Array | None
    if plan.empty:
        dx, dresidual = np.empty_like(x), np.empty_like(x)
    else:
        dx, dresidual, _ = _run_backward(plan, x, dy, ctx, out, dgamma, dbeta, ctx.count)
        if plan.foreign:  # made in native byte order
            dgamma, dbeta = (None if d is None else d.astype(d.dtype.newbyteorder("S")) for d in (dgamma, dbeta))
    return (dx, dgamma, dbeta, dresidual) if plan.has_residual else (dx, dgamma, dbeta)


def backward_reduce(plan: CpuPlan, x: Array, dy: Array, ctx: Context) -> tuple[Array, Array]:
    """The sums over a part of a batch of g, and of g * (x - mean)."""
    if plan.empty:
        return np.zeros(plan.C), np.zeros(plan.C)
    _, _, own = _run_backward(plan, x, dy, ctx, None, None, None, 1.0)
    sums = own[: rows.BACKWARD_ROWS * plan.C].reshape(-1, plan.C)
    return sums[rows.SUM_DY].copy(), sums[rows.SUM_DY_XMU].copy()


def backward_apply(
    plan: CpuPlan, x: Array, dy: Array, ctx: Context, sum_dy: Array, sum_dy_xmu: Array, count: float, out: Array | None
) -> tuple[Array, Array | None]:
    """dx and dresidual of a part of a batch, from the sums over all of it."""
    if plan.empty:
        return np.empty_like(x), np.empty_like(x)
    written: tuple[Array, Array | None, Array] = _run_backward(plan, x, dy, ctx, out, None, None, count, (sum_dy, sum_dy_xmu))
    return written[:2]


CpuPlan.backend = sys.modules[__name__]
