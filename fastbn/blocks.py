"""Batch normalisation in four steps, for a batch that lies in several places: processes, machines, chunks of a file.

    m = moments(part); merge with +         what PyTorch's `batch_norm_stats` and `batch_norm_gather_stats_with_counts` do
    batch_norm_forward_apply(part, m)       `batch_norm_elemt`
    batch_norm_backward_reduce(dy, ctx)     `batch_norm_backward_reduce`; add the sums over the parts
    batch_norm_backward_apply(dy, ctx, ...) `batch_norm_backward_elemt`

Between the steps the caller exchanges O(C) numbers with whatever it likes. Together they give what `batch_norm_forward` and
`batch_norm_backward` give for the whole batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import running
from fastbn.arguments import checks, scalars
from fastbn.common.context import Context
from fastbn.cpu import backend as cpu
from fastbn.cpu import memory
from fastbn.cuda import arrays as gpu_arrays
from fastbn.kernels import rows
from fastbn.statistics import Moments

Array = NDArray[Any]

_ON_HOST = "pass cupy.asnumpy({0}); for a batch that is all on one GPU use batch_norm_forward and batch_norm_backward"


def batch_norm_forward_apply(
    x: Array,
    moments: Moments,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    unbiased: bool = True,
    activation: str | None = None,
    residual: Array | None = None,
    sample_weight: Array | None = None,
    effective_count: float | None = None,
    out: Array | None = None,
) -> tuple[Array, Context]:
    """The training forward of one part of a batch, with the moments of the whole batch.

    Parameters
    ----------
    x : array, ndim >= 2
        This part; it may be empty. As in `batch_norm_forward`.
    moments : Moments
        Of all parts together: ``fastbn.moments(part)`` of each, merged with ``+``.
    gamma, beta, momentum, eps, axis, activation, residual, out
        As in `batch_norm_forward`.
    running_mean, running_var : array, (C,), optional
        Both or neither; updated in place from `moments`, so that every part's copy stays the same as the others'.
    unbiased : bool
        Put the n / (n - 1) variance into running_var; n is `effective_count`.
    sample_weight : array, optional
        This part's weights, with which its moments were taken. They enter the backward here.
    effective_count : float, optional
        The n of `unbiased`: ``moments.count`` if not given, which is right without weights and for masks. For other weights it is
        ``sum(w)**2 / sum(w**2)`` over all parts.

    Returns
    -------
    y : array
        Of x's shape, dtype and memory order.
    ctx : Context
        For `batch_norm_backward_reduce` and `batch_norm_backward_apply`; ``ctx.count`` is that of the whole batch.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_forward`; moments of another number of channels, of one value per channel, or of fewer values than x
        alone has; no effective_count where one is needed. Nothing has been written then.

    References
    ----------
    T. F. Chan, G. H. Golub and R. J. LeVeque (1983), "Algorithms for Computing the Sample Variance", eq. 2.1: the merge.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> whole = np.arange(8.0).reshape(4, 2)
    >>> parts = whole[:1], whole[1:]
    >>> m = sum(fastbn.moments(part) for part in parts)
    >>> y = [fastbn.batch_norm_forward_apply(part, m)[0] for part in parts]
    >>> np.allclose(np.concatenate(y), fastbn.batch_norm_forward(whole)[0], rtol=0, atol=1e-13)
    True
    """
    for name, a in (("x", x), ("moments.mean", getattr(moments, "mean", None))):
        gpu_arrays.refuse(name, a, "batch_norm_forward_apply", _ON_HOST)
    x, dtype, axis = checks.x_and_axis(x, axis)
    gamma_, beta_ = checks.vector(gamma, "gamma", x, axis), checks.vector(beta, "beta", x, axis)
    mean, var = checks.running(running_mean, running_var, x, axis, True)
    eps, momentum, relu = scalars.eps(eps), scalars.momentum(momentum), scalars.activation(activation)
    if residual is not None:
        residual = checks.like(residual, "residual", x)
    weight = checks.weights(sample_weight, x, axis)
    written = None  # `out` as a plain array
    if out is not None:
        named = (("x", x), ("residual", residual), ("gamma", gamma_), ("beta", beta_), ("running_mean", mean), ("running_var", var))
        written = checks.output(out, x, None, (*named, ("sample_weight", weight)))
    _check_moments(moments, x, axis)
    n = moments.count if effective_count is None else scalars.number(effective_count, "effective_count")

    table = cpu.parameter_table(x.shape[axis], gamma_, beta_)
    state = None
    if moments.count:  # any part has a value
        cpu.set_statistics(table, moments.mean, moments.var(), moments.mean_lo)
    if x.size:
        x_native = memory.native(x)
        frame = memory.frame_of(x_native, axis, dtype, weight is not None)
        weights = None if weight is None else memory.weights_of(weight, frame)
        _check_count(moments, float(frame.plan.count) if weights is None else weights.total, weights is None, x, axis)
        if weights is not None and mean is not None and unbiased and effective_count is None and weights.total != weights.effective:
            raise ValueError(
                "sample_weight has weights other than 0 and 1, for which the moments do not tell the n of n / (n - 1): pass "
                "effective_count=sum(w)**2 / sum(w**2) over all parts, or unbiased=False"
            )
    if mean is not None and unbiased and moments.count and not 1.0 < n < math.inf:
        raise ValueError(
            f"effective_count is {n}; the factor n / (n - 1) of running_var needs a finite n of more than 1: pass "
            "unbiased=False, or no running statistics"
        )
    if x.size:
        y, mask = cpu.normalise(x_native, frame, table, eps, True, relu, relu, residual, None, written, x.dtype)
        state = cpu.State(frame, table, mask, weights)
    else:
        table[rows.INVSTD] = 1.0 / np.sqrt(table[rows.VAR] + eps)
        y = np.empty_like(x)
    if mean is not None and var is not None and moments.count:
        running.update(table, mean, var, momentum, running.correction(n) if unbiased else 1.0)
    dtypes = (None if gamma_ is None else gamma_.dtype, None if beta_ is None else beta_.dtype)
    return y if out is None else out, Context(x, axis, True, moments.count, residual is not None, relu, *dtypes, table, state)


def _check_moments(moments: Any, x: Array, axis: int) -> None:
    if not isinstance(moments, Moments):
        kind = type(moments).__name__
        raise TypeError(f"moments is a {kind}; pass the Moments of all parts: fastbn.moments(part), merged with +")
    if not isinstance(moments.mean, np.ndarray):
        raise TypeError("moments are on another device than x; make both of NumPy arrays, or both of CuPy arrays")
    C = x.shape[axis]
    if moments.mean.shape != (C,):
        raise ValueError(f"moments are of {len(moments.mean)} channels, but x has shape {x.shape} with {C} channels on axis {axis}")


def _check_count(moments: Moments, count: float, whole: bool, x: Array, axis: int) -> None:
    """Raise where the moments cannot be those of a batch that x is a part of; `count` is x's own."""
    # Sums of weights may have been rounded in another order.
    if moments.count < count * (1.0 - 1e-9):
        raise ValueError(
            f"moments have count {moments.count:g}, but x of shape {x.shape} alone has {count:g} on axis {axis}: pass the moments "
            "of all parts, merged with +, taken with the same sample_weight"
        )
    if moments.count == 0.0 or (whole and moments.count == 1.0):
        raise ValueError(
            f"moments have count {moments.count:g}: the variance of one value is 0 and says nothing; train with more values, or "
            "normalise with batch_norm_inference"
        )


def batch_norm_backward_reduce(dy: Array, ctx: Context) -> tuple[Array, Array]:
    """The two sums over this part of a batch that its backward needs of the whole batch.

    With g = dy where the ReLU passed (all of dy without one):

        sum_dy = sum(g),   sum_dy_xmu = sum(g * (x - mean)).

    Added over all parts they are dbeta and dgamma: ``dbeta = sum_dy``, ``dgamma = sum_dy_xmu * ctx.invstd``.

    Parameters
    ----------
    dy : array
        Gradient of this part's y, of x's shape and dtype.
    ctx : Context
        From `batch_norm_forward_apply`, or `batch_norm_forward`.

    Returns
    -------
    sum_dy, sum_dy_xmu : array, (C,), float64
        Zeros for an empty part.

    Raises
    ------
    TypeError, ValueError
        For dy of another kind, dtype or shape than x; anything but a Context.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, ctx = fastbn.batch_norm_forward(np.array([[1.0], [3.0]]))
    >>> sum_dy, sum_dy_xmu = fastbn.batch_norm_backward_reduce(np.array([[1.0], [0.5]]), ctx)
    >>> sum_dy.tolist(), sum_dy_xmu.tolist()
    ([1.5], [-0.5])
    """
    x, dy = _arguments(dy, ctx)
    if x.size == 0:
        return np.zeros(x.shape[ctx.axis]), np.zeros(x.shape[ctx.axis])
    grads = cpu.reduce(dy, x, ctx.state)
    return grads[rows.SUM_DY].copy(), grads[rows.SUM_DY_XMU].copy()


def batch_norm_backward_apply(
    dy: Array, ctx: Context, sum_dy: Array, sum_dy_xmu: Array, count: float | None = None, *, out: Array | None = None
) -> Any:
    """dx of one part of a batch, from the sums over the whole batch.

        dx = gamma * invstd * (g - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n),

    g as in `batch_norm_backward_reduce`, n = `count`. With sample weights w the two terms that stem from the statistics are
    multiplied by w.

    Parameters
    ----------
    dy : array
        Gradient of this part's y, of x's shape and dtype.
    ctx : Context
        This part's, from `batch_norm_forward_apply`.
    sum_dy, sum_dy_xmu : array, (C,), float32 or float64
        What `batch_norm_backward_reduce` returned, added over all parts.
    count : float, optional
        Values per channel, or the sum of the weights, of the whole batch; ``ctx.count`` if not given.
    out : array, optional
        Where dx goes, of x's shape and dtype. It may be dy itself.

    Returns
    -------
    dx : array
        Of x's shape, dtype and memory order; or the pair (dx, dresidual) if the forward had a residual.

    Raises
    ------
    TypeError, ValueError
        For dy or out as in `batch_norm_backward`; sums that are not (C,); a count that is not > 0; the context of a frozen forward.
        Nothing has been written then.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.array([[1.0], [3.0], [8.0]]), np.array([[1.0], [0.5], [-2.0]])
    >>> y, ctx = fastbn.batch_norm_forward(x)
    >>> dx = fastbn.batch_norm_backward_apply(dy, ctx, *fastbn.batch_norm_backward_reduce(dy, ctx))
    >>> np.allclose(dx, fastbn.batch_norm_backward(dy, ctx)[0], rtol=0, atol=1e-13)
    True
    """
    x, dy = _arguments(dy, ctx)
    if not ctx.training:
        raise ValueError("ctx is of a forward with given statistics, whose dx needs no sums: use batch_norm_backward")
    sums = checks.vector(sum_dy, "sum_dy", x, ctx.axis), checks.vector(sum_dy_xmu, "sum_dy_xmu", x, ctx.axis)
    if sums[0] is None or sums[1] is None:
        raise TypeError("sum_dy and sum_dy_xmu must be arrays of shape (C,), from batch_norm_backward_reduce")
    n = ctx.count if count is None else scalars.number(count, "count")
    if x.size and not 0.0 < n < np.inf:
        raise ValueError(f"count is {n}; it must be the whole batch's: values per channel, or the sum of the weights")
    written = None
    if out is not None:
        named = (("dy", dy), ("x, which ctx holds", x), ("sum_dy", sums[0]), ("sum_dy_xmu", sums[1]))
        written = checks.output(out, x, dy, named)
    dx: Array
    dresidual: Array | None
    if x.size == 0:
        dx, dresidual = np.empty_like(x), np.empty_like(x)
    else:
        as_float64 = sums[0].astype(np.float64), sums[1].astype(np.float64)
        dx, dresidual = cpu.apply(dy, x, ctx.state, as_float64, n, ctx.has_residual, written)
    if out is not None:
        dx = out
    return (dx, dresidual) if ctx.has_residual else dx


def _arguments(dy: Any, ctx: Any) -> tuple[Array, Array]:
    """x and dy."""
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx is a {type(ctx).__name__}; pass the second result of batch_norm_forward_apply or batch_norm_forward")
    for name, a in (("ctx.x", ctx.x), ("dy", dy)):
        gpu_arrays.refuse(name, a, "the backward in two steps", _ON_HOST)
    return ctx.x, checks.like(dy, "dy", ctx.x)
