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
from fastbn.cpu.memory import native
from fastbn.cpu.plan import CpuPlan as CpuPlan
from fastbn.cpu.threads import get_num_threads
from fastbn.cpu.weights import Weights, block_totals
from fastbn.cpu.weights import span as weight_range  # noqa: F401  (a backend's function)
from fastbn.kernels import rows
from fastbn.kernels.formulas import running_average

Array = NDArray[Any]

# What users of the library write it as, and whether weights can be looked at without waiting.
LIBRARY, COUNTS_WEIGHTS = "np", True
# Stands for a per-channel array, or a workspace, that is absent.
NOTHING = np.zeros(1)
ABSENT = NOTHING, 0, 0
# Places of two groups among the arguments of a forward's kernels.
OPTIONS, NUMBERS = 3, 4


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
                base = a
            elif type(base) is not np.ndarray or base.base is not None:
                return False
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


def _vectors(plan: CpuPlan, gamma: Array | None, beta: Array | None, mean: Array | None, var: Array | None) -> Any:
    """Per-channel arrays as kernels take them: (array, byte stride, itemsize) each."""
    if plan.copied_channels:
        gamma, beta, mean, var = (None if a is None else native(a) for a in (gamma, beta, mean, var))
    g, b, m, v = plan.channels
    return (
        (NOTHING if gamma is None else gamma, *g),
        (NOTHING if beta is None else beta, *b),
        (NOTHING if mean is None else mean, *m),
        (NOTHING if var is None else var, *v),
        ABSENT,
    )


def _weight_tensor(weights: Weights | None) -> Any:
    """Weights as kernels take them."""
    if weights is None:
        return None
    a = weights.array
    return (a, 1) if weights.kind == "row_weight" else (a, a.shape[1], 1)


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
    ctx = Context(x, plan, count, np.empty(plan.table_shape), plan.new_mask(), weights)
    vectors = _vectors(plan, gamma, beta, running_mean, running_var)
    if running_mean is None or running_var is None or not plan.moves:
        return _forward_program(plan, ctx.table, ctx.mask, x, vectors, residual, out, weights, eps), ctx
    before = running_mean.copy(), running_var.copy()
    try:
        y = _forward_program(plan, ctx.table, ctx.mask, x, vectors, residual, out, weights, eps, momentum, correction)
        if plan.copied_channels:
            running_mean[...], running_var[...] = vectors[2][0], vectors[3][0]
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
        given = ((a, 8, 8) for a in (moments.mean, moments.var(), moments.mean_lo))
        vectors = *_vectors(plan, gamma, beta, None, None)[:2], *given
        y = _forward_program(plan, ctx.table, ctx.mask, x, vectors, residual, out, None, eps)
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
    return _forward_program(plan, np.empty(plan.table_shape), None, x, _vectors(plan, gamma, beta, mean, var), residual, out, None, eps)


def _forward_program(
    plan: CpuPlan, table: Array, mask: Array | None, x: Array, vectors: Any, residual: Array | None, out: Array | None,
    weights: Weights | None, eps: float, momentum: float = 0.0, correction: float = 1.0,
) -> Array:  # fmt: skip
    """y, and what else the program of a forward writes: table, mask, running statistics."""
    frame, schedule = plan.frame, plan.schedule
    x_read = (x, *plan.x_at) if plan.x_at is not None else frame.copied(x)
    made: list[tuple[Array, Array]] = []
    if plan.fresh is not None:
        y = plan.fresh()
        y_written = y, *frame.fresh
    elif plan.operation == "moments":  # nothing is written in the place of y
        y, y_written = x, x_read
    else:
        y, y_written = frame.write(out, plan.out_at, plan.x_dtype, made)
    totals, places = None, plan.shift_places
    if weights is not None:
        totals, places = block_totals(weights, frame.layout, schedule), plan.places(weights.shift_places)
    residual_read = None
    if residual is not None:
        residual_read = (residual, *plan.residual_at) if plan.residual_at is not None else frame.copied(residual)
    data = x_read, y_written, residual_read, _weight_tensor(weights), totals, plan.masked(mask)
    streamed = frame.large and frame.streams(y_written, mask is not None)
    numbers = eps, momentum, correction, plan.limit, False, streamed, places
    threads = get_num_threads() if plan.parallel else 1
    partial, scratch = np.empty(plan.partial), np.empty((threads, *schedule.scratch))
    _run(plan, (data, vectors, schedule.shape, plan.options, numbers, table, partial, scratch), threads)
    for to, copy in made:
        to[...] = copy
    return y


def _run(plan: CpuPlan, arguments: tuple[Any, ...], threads: int) -> None:
    """Run the program of a forward, and see to what it finds: channels that float32 lanes cannot do, statistics that are not finite."""
    program, schedule = plan.program or plan.compiled(), plan.schedule
    phase, found = run(program, schedule, arguments, threads)
    while found and plan.operation != "moments":  # which want no y
        if program.names[phase] == "update_running":
            eps, momentum, correction, limit, _, *rest = arguments[NUMBERS]
            _warn(plan, found, correction)
            numbers = eps, momentum, correction, limit, True, *rest
            run(program, schedule, (*arguments[:NUMBERS], numbers, *arguments[NUMBERS + 1 :]), threads, phase)
            return
        # In float64 lanes, before or after the others: each channel is written once.
        run(plan.of_leftovers(), schedule, (*arguments[:OPTIONS], (plan.options[0], True, True), *arguments[OPTIONS + 1 :]), threads)
        phase, found = run(program, schedule, arguments, threads, phase + 1)


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
    _forward_program(plan, table, None, x, (ABSENT,) * 5, None, None, weights, 1.0)
    return count, table[rows.MEAN], table[rows.VAR] * count, table[rows.LOW]


# ----------------------------------------------------------------------------------------------------------------- backward


def _gradients(
    plan: CpuPlan, x: Array, dy: Array, ctx: Context, out: Array | None, vectors: Any, count: float, partial: Array | None = None
) -> tuple[Any, Array]:
    """(dx, dresidual), and the table of sums, from the program of a backward. Sums alone write nothing: dx is None."""
    frame, schedule = plan.frame, plan.schedule
    x_read = (x, *plan.x_at) if plan.x_at is not None else frame.copied(x)
    made: list[tuple[Array, Array]] = []
    dx, dresidual, dx_written, dresidual_written, streamed = None, None, x_read, None, False
    if plan.operation != "reduce":
        if plan.fresh is not None:
            dx = plan.fresh()
            dx_written = dx, *frame.fresh
        else:
            dx, dx_written = frame.write(out, plan.out_at, plan.x_dtype, made)
        if plan.has_residual:
            dresidual, dresidual_written = frame.write(None, None, plan.x_dtype, made)
        streamed = frame.large and frame.streams_both(dx_written, dresidual_written)
    dy_read = (dy, *plan.dy_at) if plan.dy_at is not None else frame.copied(dy)
    weights = None if plan.frozen else ctx.weights
    gradients = x_read, dy_read, dx_written, dresidual_written, _weight_tensor(weights), plan.masked(ctx.mask)
    threads = get_num_threads() if plan.parallel else 1
    partial = np.empty(schedule.partial) if partial is None else partial
    grads, scratch = np.empty(plan.grads_shape), np.empty((threads, *schedule.scratch))
    numbers = count, plan.constant, streamed
    program, workspace = plan.program or plan.compiled(), (ctx.table, grads, partial, scratch)
    _, found = run(program, schedule, (gradients, vectors, schedule.shape, plan.options, numbers, *workspace), threads)
    if found:  # channels do not suit sums in float32, and nothing has been written
        run(plan.in_float64(), schedule, (gradients, vectors, schedule.shape, (None, None), numbers, *workspace), threads)
    for to, copy in made:
        to[...] = copy
    return (dx, dresidual), grads


def backward(plan: CpuPlan, x: Array, dy: Array, ctx: Context, out: Array | None) -> tuple[Array | None, ...]:
    """dx, dgamma and dbeta, and dresidual where the forward had a residual."""
    gamma, beta = plan.parameters
    new = np.zeros if plan.empty else np.empty
    dgamma, dbeta = None if gamma is None else new(plan.C, gamma), None if beta is None else new(plan.C, beta)
    if plan.empty:
        dx, dresidual = np.empty_like(x), np.empty_like(x)
    else:
        size_gamma, size_beta = plan.parameter_sizes
        vectors = (NOTHING if dgamma is None else dgamma, *size_gamma), (NOTHING if dbeta is None else dbeta, *size_beta)
        (dx, dresidual), _ = _gradients(plan, x, dy, ctx, out, vectors, ctx.count)
        if plan.foreign:  # made in native byte order
            dgamma, dbeta = (None if d is None else d.astype(d.dtype.newbyteorder("S")) for d in (dgamma, dbeta))
    return (dx, dgamma, dbeta, dresidual) if plan.has_residual else (dx, dgamma, dbeta)


def backward_reduce(plan: CpuPlan, x: Array, dy: Array, ctx: Context) -> tuple[Array, Array]:
    """The sums over a part of a batch of g, and of g * (x - mean)."""
    if plan.empty:
        return np.zeros(plan.C), np.zeros(plan.C)
    _, grads = _gradients(plan, x, dy, ctx, None, (ABSENT, ABSENT), 1.0)
    return grads[rows.SUM_DY].copy(), grads[rows.SUM_DY_XMU].copy()


def backward_apply(
    plan: CpuPlan, x: Array, dy: Array, ctx: Context, sum_dy: Array, sum_dy_xmu: Array, count: float, out: Array | None
) -> tuple[Array, Array | None]:
    """dx and dresidual of a part of a batch, from the sums over all of it."""
    if plan.empty:
        return np.empty_like(x), np.empty_like(x)
    sums = [s.astype(np.float64) for s in (sum_dy, sum_dy_xmu)]
    partial = np.stack([*sums, *sums], axis=1)[:, None, :].copy()  # as if of one block
    written: tuple[Array, Array | None] = _gradients(plan, x, dy, ctx, out, (ABSENT, ABSENT), count, partial)[0]
    return written


CpuPlan.backend = sys.modules[__name__]
