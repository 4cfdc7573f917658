"""Calls on GPU arrays: outputs, jobs for the kernels, launches on CuPy's current stream. Twin: fastbn/cpu/backend.py.

Nothing here reads what is on the GPU, so nothing waits for it, but for the sum of the weights in `moments`. Nothing is allocated but
results, O(C) of tables, the activation's bits, and copies of what kernels cannot read in place. Importing this imports neither CuPy nor
Numba.

What has been checked, and what waits for a GPU, is in docs/gpu.md: nothing here has run on one yet.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn.common.context import Context
from fastbn.cuda import loading
from fastbn.cuda.addresses import overlap, same_place, separate  # noqa: F401  (a backend's functions)
from fastbn.cuda.arrays import check_device
from fastbn.cuda.dispatch import Steps, run
from fastbn.cuda.layout import assign, native_copy, no_more, seen  # noqa: F401  (`seen` is a backend's function)
from fastbn.cuda.loading import on_device
from fastbn.cuda.memory import extra_rows, flat, tables
from fastbn.cuda.plan import GpuPlan as GpuPlan
from fastbn.cuda.weights import UNWEIGHTED, Weights
from fastbn.kernels import rows
from fastbn.kernels.formulas import backward_coefficients, running_average

Array = Any  # cupy.ndarray
Job = dict[str, Any]

# What users of the library write it as, and whether weights can be looked at without waiting.
LIBRARY, COUNTS_WEIGHTS = "cupy", False


@dataclass
class State:
    """What a forward leaves for its backward's kernels, as they take it: the GPU's part of a context, its `mask`.

    Attributes
    ----------
    x : array
        x, or the copy of it that the kernels have read.
    table, coefs : array
        ``ctx.table``, and what kernels read of it, in the type of arithmetic.
    bits : array or None
        The activation's, in the order of the forward's ``plan.setting``.
    """

    x: Any
    table: Any
    coefs: Any
    bits: Any


def weight_range(weight: Array) -> None:
    """The smallest and the largest weight, for which the GPU would have to be waited for."""


@on_device
def weigh(plan: GpuPlan, weight: Array) -> Weights:
    """Sample weights as kernels read them."""
    return Weights(weight, plan.seen["sample_weight"].plain, plan.layout, plan.axis, plan.setting.compute)


# ------------------------------------------------------------------------------------------------------------------ forward


def _job(plan: GpuPlan, x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, **more: Any) -> Job:
    """A forward's arguments, but for what it writes."""
    return {
        **plan.setting.constants,
        **UNWEIGHTED,
        "x": plan.layout.read(x, "x" in plan.direct),
        "residual_x": None if residual is None else plan.layout.read(residual, "residual" in plan.direct),
        "gamma": plan.parameters.read(gamma, "gamma"),
        "beta": plan.parameters.read(beta, "beta"),
        **more,
    }


def _tables(plan: GpuPlan, job: Job) -> Array:
    """The forward's tables, as a part of the job; gives the one for the context."""
    table, job["table"], job["coefs"] = tables(rows.ANCHOR, plan.C, loading.kernels().channels.COEF_ROWS, plan.setting.compute)
    return table


def _context(plan: GpuPlan, x: Array, count: Any, table: Array, job: Job, weights: Weights | None) -> Context:
    """The context of a forward whose job this was."""
    return Context(x, plan, count, table, State(job["x"], job["table"], job["coefs"], job["mask"]), weights)


def _bits(plan: GpuPlan) -> Any:
    """Room for the activation's bits, if there is one."""
    return flat(loading.kernels().arrays.empty(plan.setting.plan.words, np.uint32)) if plan.relu else None


def _of_nothing(
    plan: GpuPlan, x: Array, out: Array | None, eps: float, mean: Any = None, var: Any = None, count: float = 0.0
) -> tuple[Array, Context]:
    """y and context of an empty batch, which learns nothing."""
    arrays = loading.kernels().arrays
    table = arrays.zeros((rows.ANCHOR, plan.C), np.float64)
    if mean is not None:
        table[rows.MEAN], table[rows.VAR] = native_copy(mean), native_copy(var)
    table[rows.INVSTD] = 1.0 / arrays.sqrt(table[rows.VAR] + eps)
    return arrays.empty_like(x) if out is None else out, Context(x, plan, count, table)


def _move(running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float) -> None:
    """Move running statistics towards a batch's, which are float64, but in channels that the narrower of their dtypes cannot hold."""
    arrays = loading.kernels().arrays
    narrow = min((a.dtype.newbyteorder("=") for a in (running_mean, running_var)), key=lambda dtype: dtype.itemsize)
    fits = arrays.isfinite(mean.astype(narrow)) & arrays.isfinite(var.astype(narrow))
    before = native_copy(running_mean), native_copy(running_var)
    moved = [
        arrays.where(fits, running_average(old.astype(np.float64), new, momentum).astype(old.dtype), old)  # type: ignore[no-untyped-call]
        for old, new in zip(before, (mean, var), strict=True)
    ]
    assign(running_mean, moved[0])
    assign(running_var, moved[1])


@on_device
def forward(
    plan: GpuPlan, x: Array, gamma: Array | None, beta: Array | None, running_mean: Array | None, running_var: Array | None,
    residual: Array | None, out: Array | None, weights: Weights | None, eps: float, momentum: float, unbiased: bool,
) -> tuple[Array, Context]:  # fmt: skip
    """y, and the context of a training or frozen forward; running statistics move last.

    The kernels move them where nothing is left to do afterwards that may fail, and where they can reach both of them.
    """
    training = plan.training
    if plan.empty:
        return _of_nothing(plan, x, out, eps, *((None, None) if training else (running_mean, running_var)))
    count = float(plan.count)
    correction = count / (count - 1.0) if unbiased and count > 1.0 else 1.0
    y, written, finish = plan.layout.written(out, "out" in plan.direct)
    job = _job(plan, x, gamma, beta, residual, y=written, momentum=momentum, eps=eps, correction=correction, mask=_bits(plan))
    moved_here = plan.moves and (finish is not no_more or len(plan.statistics.direct) < 2)
    if not moved_here:
        job["running_mean"] = plan.statistics.read(running_mean, "running_mean")
        job["running_var"] = plan.statistics.read(running_var, "running_var")
    weights = weights if training else None
    if weights is not None:
        job |= weights.arguments(bool(unbiased))
    table = _tables(plan, job)
    run(plan.setting, plan.steps, job)
    finish()
    if moved_here:
        factor = correction if weights is None else weights.correction(bool(unbiased))
        _move(running_mean, running_var, table[rows.MEAN], table[rows.VAR] * factor, momentum)
    return y, _context(plan, x, count if weights is None else weights.count, table, job, weights)


@on_device
def inference(
    plan: GpuPlan, x: Array, gamma: Array | None, beta: Array | None, mean: Array, var: Array, residual: Array | None,
    out: Array | None, eps: float,
) -> Array:  # fmt: skip
    """y with given statistics."""
    if plan.empty:
        return loading.kernels().arrays.empty_like(x) if out is None else out
    y, written, finish = plan.layout.written(out, "out" in plan.direct)
    given = {"running_mean": plan.statistics.read(mean, "mean"), "running_var": plan.statistics.read(var, "var")}
    run(plan.setting, plan.steps, _job(plan, x, gamma, beta, residual, y=written, eps=eps, **given))
    finish()
    return y


@on_device
def moments(plan: GpuPlan, x: Array, weights: Weights | None) -> tuple[float, Array, Array, Array]:
    """Count, mean, sum of squared deviations, and what rounding the mean has lost; a count of 0 where there is nothing.

    With sample weights it waits for their sum, which a Moments holds on the host.
    """
    if plan.empty:
        nothing = loading.kernels().arrays.zeros(plan.C)
        return 0.0, nothing, nothing, nothing
    job = _job(plan, x, None, None, None, momentum=0.0, eps=1.0, correction=1.0)
    if weights is not None:
        job |= weights.arguments()
    table = _tables(plan, job)
    run(plan.setting, plan.steps, job)
    count = float(plan.count if weights is None else weights.count)
    return count, table[rows.MEAN], table[rows.VAR] * count, table[rows.LOW]


@on_device
def forward_apply(
    plan: GpuPlan, x: Array, gamma: Array | None, beta: Array | None, running_mean: Array | None, running_var: Array | None,
    residual: Array | None, out: Array | None, weights: Weights | None, eps: float, momentum: float, correction: float, moments: Any,
) -> tuple[Array, Context]:  # fmt: skip
    """The forward of a part of a batch, with the moments of all of it; running statistics move by those."""
    mean: Any = None
    var: Any = None
    if moments.count:
        mean, var = moments.mean, moments.var()
        check_device("moments", mean, "x", x.data.device_id)
    if plan.empty:
        y, ctx = _of_nothing(plan, x, out, eps, mean, var, moments.count)
    else:
        y, written, finish = plan.layout.written(out, "out" in plan.direct)
        given = {"running_mean": flat(mean), "running_var": flat(var)}
        job = _job(plan, x, gamma, beta, residual, y=written, eps=eps, mask=_bits(plan), **given)
        table = _tables(plan, job)
        run(plan.setting, plan.steps[:1], job)
        _put_low(plan, table, mean, moments.mean_lo)
        run(plan.setting, plan.steps[1:], job)
        finish()
        ctx = _context(plan, x, moments.count, table, job, weights)
    if plan.moves and moments.count:
        _move(running_mean, running_var, mean, var * correction, momentum)
    return y, ctx


def _put_low(plan: GpuPlan, table: Array, mean: Array, low: Array) -> None:
    """Put the low word of the mean, which given statistics have none of, into the tables; float32 constants hold a part of it too."""
    known, compute = loading.kernels().channels, plan.setting.compute
    coefs = extra_rows(table, rows.ANCHOR, known.COEF_ROWS, compute)
    table[rows.LOW] = low
    coefs[known.LO] = (mean - coefs[known.HI].astype(np.float64)) + low


# ----------------------------------------------------------------------------------------------------------------- backward


class _Gradients:
    """What a backward writes of x's shape, as its kernels take it, and as it is returned."""

    def __init__(self, plan: GpuPlan, out: Array | None) -> None:
        self.dx, dx, finish_dx = plan.layout.written(out, "out" in plan.direct)
        self.dresidual, dresidual, finish_dresidual = None, None, no_more
        if plan.has_residual:
            self.dresidual, dresidual, finish_dresidual = plan.layout.written(None, False)
        self.job, self._finish = {"dx": dx, "dresidual": dresidual}, (finish_dx, finish_dresidual)

    def finish(self) -> tuple[Array, Array | None]:
        """dx and dresidual, once the kernels are queued."""
        for finish in self._finish:
            finish()
        return self.dx, self.dresidual


def _run_backward(plan: GpuPlan, steps: Steps, dy: Array, ctx: Context, tables_: Job, **written: Any) -> None:
    """Run kernels of a backward."""
    state: State = ctx.mask
    job = {**plan.setting.constants, **UNWEIGHTED, **tables_, **written, "frozen": int(not ctx.training)}
    job |= {"x": state.x, "table": state.table, "coefs": state.coefs, "mask": state.bits}
    job["dy"] = plan.layout.read(dy, "dy" in plan.direct)
    if ctx.weights is not None:
        job |= ctx.weights.arguments()
    run(plan.setting, steps, job)


def _gradient_tables(plan: GpuPlan) -> tuple[Array, Job]:
    """The backward's tables: all rows as one array, and as a part of the job."""
    grads, whole, coefs = tables(rows.BACKWARD_ROWS, plan.C, loading.kernels().channels.GRAD_ROWS, plan.setting.compute)
    return grads, {"grads": whole, "grad_coefs": coefs}


@on_device
def backward(plan: GpuPlan, x: Array, dy: Array, ctx: Context, out: Array | None) -> tuple[Array | None, ...]:
    """dx, dgamma and dbeta, and dresidual where the forward had a residual."""
    arrays, common = loading.kernels().arrays, plan.parameters.dtype
    made = arrays.zeros if plan.empty else arrays.empty  # the kernels write every channel
    given = ctx.plan.dtype_of("gamma"), ctx.plan.dtype_of("beta")
    vectors = [None if dtype is None else made(plan.C, common) for dtype in given]
    if plan.empty:
        dx, dresidual = arrays.empty_like(x) if out is None else out, arrays.empty_like(x)
    else:
        to, (_, found) = _Gradients(plan, out), _gradient_tables(plan)
        dgamma, dbeta = (None if v is None else flat(v, dense=True) for v in vectors)
        _run_backward(plan, plan.steps, dy, ctx, found, dgamma=dgamma, dbeta=dbeta, **to.job)
        dx, dresidual = to.finish()
    parameters = [
        None if v is None or dtype is None else v.astype(dtype.newbyteorder("="), copy=False)
        for v, dtype in zip(vectors, given, strict=True)
    ]
    return (dx, *parameters, dresidual) if ctx.has_residual else (dx, *parameters)


@on_device
def backward_reduce(plan: GpuPlan, x: Array, dy: Array, ctx: Context) -> tuple[Array, Array]:
    """The sums over a part of a batch of g, and of g * (x - mean)."""
    if plan.empty:
        zeros = loading.kernels().arrays.zeros
        return zeros(plan.C), zeros(plan.C)
    grads, found = _gradient_tables(plan)
    _run_backward(plan, plan.steps, dy, ctx, found)
    return grads[rows.SUM_DY].copy(), grads[rows.SUM_DY_XMU].copy()


@on_device
def backward_apply(
    plan: GpuPlan, x: Array, dy: Array, ctx: Context, sum_dy: Array, sum_dy_xmu: Array, count: Any, out: Array | None
) -> tuple[Array, Array | None]:
    """dx and dresidual of a part of a batch, from the sums over all of it."""
    if plan.empty:
        empty_like = loading.kernels().arrays.empty_like
        return empty_like(x) if out is None else out, empty_like(x)
    known, compute, table = loading.kernels().channels, plan.setting.compute, ctx.table
    sums = [native_copy(a).astype(np.float64, copy=False) for a in (sum_dy, sum_dy_xmu)]
    a, b, c = backward_coefficients(table[rows.GAMMA], table[rows.INVSTD], sums[0], sums[1], count)  # type: ignore[no-untyped-call]
    grads, found = _gradient_tables(plan)
    coefs = extra_rows(grads, rows.BACKWARD_ROWS, known.GRAD_ROWS, compute)
    coefs[known.DA], coefs[known.DB], coefs[known.DC] = a, b / table[rows.INVSTD], c
    to = _Gradients(plan, out)
    _run_backward(plan, plan.steps, dy, ctx, found, **to.job)
    return to.finish()


GpuPlan.backend = sys.modules[__name__]
