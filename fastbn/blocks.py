"""Batch normalisation in four steps, for a batch that lies in several places: processes, machines, chunks of a file.

    m = moments(part); merge with +         what PyTorch's `batch_norm_stats` and `batch_norm_gather_stats_with_counts` do
    batch_norm_forward_apply(part, m)       `batch_norm_elemt`
    batch_norm_backward_reduce(dy, ctx)     `batch_norm_backward_reduce`; add the sums over the parts
    batch_norm_backward_apply(dy, ctx, ...) `batch_norm_backward_elemt`

Between the steps the caller exchanges O(C) numbers with whatever it likes. Together they give what `batch_norm_forward` and
`batch_norm_backward` give for the whole batch. Arrays are NumPy's or CuPy's; a part's moments are on its device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import overlaps, scalars
from fastbn.arguments.plans import look, look_back
from fastbn.common.context import Context
from fastbn.common.plan import Plan
from fastbn.functional import context, weighed
from fastbn.statistics import Moments

Array = NDArray[Any]

_MADE_BY = "batch_norm_forward_apply or batch_norm_forward"


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
    arrays = x, gamma, beta, running_mean, running_var, residual, sample_weight, out
    plan, arrays, exchange = look("forward_apply", arrays, axis, True, activation)
    eps, momentum = scalars.eps(eps), scalars.momentum(momentum)
    backend: Any = plan.backend
    x_, gamma_, beta_, mean, var, residual_, weight, out_ = arrays
    if (plan.moves or out_ is not None) and not backend.separate(plan, arrays):
        overlaps.check_forward(plan, *arrays)
    _check_moments(moments, plan)
    n = moments.count if effective_count is None else scalars.number(effective_count, "effective_count")
    weights = None if weight is None else weighed(plan, weight)
    if not plan.empty:
        _check_count(moments, plan, weights)
    if plan.moves and unbiased and moments.count:
        if weights is not None and effective_count is None and not weights.are_a_mask():
            raise ValueError(
                "sample_weight has weights other than 0 and 1, for which the moments do not tell the n of n / (n - 1): pass "
                "effective_count=sum(w)**2 / sum(w**2) over all parts, or unbiased=False"
            )
        if not 1.0 < n < math.inf:
            raise ValueError(
                f"effective_count is {n}; the factor n / (n - 1) of running_var needs a finite n of more than 1: pass "
                "unbiased=False, or no running statistics"
            )
    correction = n / (n - 1.0) if plan.moves and unbiased and moments.count else 1.0
    y, ctx = backend.forward_apply(plan, x_, gamma_, beta_, mean, var, residual_, out_, weights, eps, momentum, correction, moments)
    if exchange is not None:
        ctx.x, y = x, exchange.back(y, mean, var)
    return y if out is None else out, ctx


def _check_moments(moments: Any, plan: Plan) -> None:
    """The moments are of x's number of channels, and on its device."""
    if not isinstance(moments, Moments):
        kind = type(moments).__name__
        raise TypeError(f"moments is a {kind}; pass the Moments of all parts: fastbn.moments(part), merged with +")
    if moments.count and (type(moments.mean) is np.ndarray) != (plan.backend.LIBRARY == "np"):
        raise TypeError("moments are on another device than x; make both of NumPy arrays, or both of CuPy arrays")
    if moments.mean.shape != (plan.C,):
        raise ValueError(
            f"moments are of {len(moments.mean)} channels, but x has shape {plan.shape} with {plan.C} channels on axis {plan.axis}"
        )


def _check_count(moments: Moments, plan: Plan, weights: Any) -> None:
    """Raise where the moments cannot be those of a batch that x is a part of. On a GPU the sum of x's weights is not waited for."""
    count = float(plan.count) if weights is None else weights.total
    # Sums of weights may have been rounded in another order.
    if count is not None and moments.count < count * (1.0 - 1e-9):
        raise ValueError(
            f"moments have count {moments.count:g}, but x of shape {plan.shape} alone has {count:g} on axis {plan.axis}: pass the moments "
            "of all parts, merged with +, taken with the same sample_weight"
        )
    if moments.count == 0.0 or (weights is None and moments.count == 1.0):
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
    plan, (x, dy), exchange = look_back("reduce", context(ctx, _MADE_BY), (dy,))
    sums: tuple[Array, Array] = plan.backend.backward_reduce(plan, x, dy, ctx)
    return sums if exchange is None else (exchange.back(sums[0]), exchange.back(sums[1]))


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
    if not context(ctx, _MADE_BY).training:
        raise ValueError("ctx is of a forward with given statistics, whose dx needs no sums: use batch_norm_backward")
    if sum_dy is None or sum_dy_xmu is None:
        raise TypeError("sum_dy and sum_dy_xmu must be arrays of shape (C,), from batch_norm_backward_reduce")
    plan, arrays, exchange = look_back("apply", ctx, (dy, sum_dy, sum_dy_xmu, out))
    x, dy, sum_dy_, sum_dy_xmu_, out_ = arrays
    n = ctx.count if count is None else scalars.number(count, "count")
    if count is not None and not plan.empty and not 0.0 < n < np.inf:
        raise ValueError(f"count is {n}; it must be the whole batch's: values per channel, or the sum of the weights")
    if out_ is not None and not plan.backend.separate(plan, arrays):
        named = (("dy", dy), ("x, which ctx holds", x), ("sum_dy", sum_dy_), ("sum_dy_xmu", sum_dy_xmu_))
        overlaps.check_out(plan.backend, out_, "dy", named)
    dx, dresidual = plan.backend.backward_apply(plan, x, dy, ctx, sum_dy_, sum_dy_xmu_, n, out_)
    if exchange is not None:
        dx, dresidual = exchange.back(dx), exchange.back(dresidual)
    if out is not None:
        dx = out
    return (dx, dresidual) if ctx.has_residual else dx
