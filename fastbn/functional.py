"""Batch normalisation as functions: forward, backward, inference, moments.

    y = (x - mean) / sqrt(var + eps) * gamma + beta

with mean and variance of each channel over all other axes (Ioffe and Szegedy 2015, algorithm 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fastbn.arguments import checks, overlaps, scalars
from fastbn.arguments.plans import look, look_back
from fastbn.common.context import Context
from fastbn.common.plan import Plan

if TYPE_CHECKING:
    from fastbn.statistics import Moments

Array = NDArray[Any]


def batch_norm_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    unbiased: bool = True,
    activation: str | None = None,
    residual: Array | None = None,
    sample_weight: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Context]:
    """Normalise each channel of x, and keep what the backward needs.

    Parameters
    ----------
    x : array, ndim >= 2
        NumPy or CuPy, float32, float64, float16 or bfloat16, of any strides. (N, C), (N, C, L), (N, C, H, W), ..., or channels last
        with ``axis=-1``. What the kernels cannot read in place is copied once; `fastbn.explain` tells.
    gamma, beta : array, (C,), optional
        Scale and shift, float32 or float64; 1 and 0 if None.
    running_mean, running_var : array, (C,), optional
        Both or neither. Training updates them in place, last of all: ``running = (1 - momentum) * running + momentum * batch``. A
        channel whose statistic is not finite (or not representable in their dtype) is left out, with a RuntimeWarning.
    training : bool
        True: statistics of x. False: the running statistics; the backward then treats them as constants.
    momentum : float
        Weight of the new batch, in [0, 1].
    eps : float
        Added to the variance, > 0.
    axis : int
        The channel axis.
    unbiased : bool
        Put the n / (n - 1) variance into running_var; y is always made with the biased one. With real weights, n is their effective
        number, ``sum(w)**2 / sum(w**2)``.
    activation : None or "relu"
        Applied last. The backward keeps one bit a value for it.
    residual : array, optional
        Of x's shape and dtype, added before the activation.
    sample_weight : array, optional
        bool or real, >= 0, (N,) or x's shape without the channel axis. Weighs the statistics; what weighs 0 is still normalised, and may
        be NaN.
    out : array, optional
        Where y goes, of x's shape and dtype. It may not overlap any other argument.

    Returns
    -------
    y : array
        Of x's shape, dtype and memory order.
    ctx : Context
        For `batch_norm_backward`.

    Raises
    ------
    TypeError
        For a kind of array or dtype that is not listed above.
    ValueError
        For shapes that do not fit, an axis out of range, a parameter out of range, one value per channel in training, `out` that cannot
        be written or overlaps. Nothing has been written then.

    References
    ----------
    S. Ioffe and C. Szegedy (2015), "Batch Normalization", arXiv:1502.03167, algorithm 1.
    T. F. Chan, G. H. Golub and R. J. LeVeque (1983), "Algorithms for Computing the Sample Variance", eq. 2.1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    >>> y, ctx = fastbn.batch_norm_forward(x)
    >>> y.shape, ctx.mean.tolist(), ctx.count
    ((2, 3, 2), [3.5, 5.5, 7.5], 4.0)
    >>> y[:, 0].round(3).tolist()
    [[-1.151, -0.822], [0.822, 1.151]]
    """
    arrays = x, gamma, beta, running_mean, running_var, residual, sample_weight, out
    plan, arrays, exchange = look("forward", arrays, axis, bool(training), activation)
    eps, momentum = scalars.eps(eps), scalars.momentum(momentum)
    backend: Any = plan.backend
    x_, gamma_, beta_, mean, var, residual_, weight, out_ = arrays
    if (plan.moves or out_ is not None) and not backend.separate(plan, arrays):
        overlaps.check_forward(plan, *arrays)
    weights = None if weight is None else weighed(plan, weight)
    y, ctx = backend.forward(plan, x_, gamma_, beta_, mean, var, residual_, out_, weights, eps, momentum, unbiased)
    if exchange is not None:
        ctx.x, y = x, exchange.back(y, mean, var)
    return y if out is None else out, ctx


def weighed(plan: Plan, weight: Array) -> Any:
    """Sample weights as the backend's kernels read them, checked as far as their values can be known without waiting; None if x is empty.

    Raises
    ------
    ValueError
        For weights that are not finite and >= 0, or of which training finds fewer than two above 0.
    """
    backend = plan.backend
    span = backend.weight_range(weight)
    if span is not None:
        checks.weight_values(*span)
    if plan.empty:
        return None
    weights = backend.weigh(plan, weight)
    if weights.positive is not None:
        checks.weight_total(weights.total)
        if plan.training and plan.operation == "forward":
            checks.positive_weights(weights.positive, plan.seen["x"], plan.axis)
    return weights


def batch_norm_backward(dy: Array, ctx: Context, *, out: Array | None = None) -> tuple[Array | None, ...]:
    """Gradients of a forward.

    With g = dy where the ReLU passed (all of dy without one) and n = ctx.count, summed over a channel:

        dgamma = sum(g * (x - mean)) * invstd,   dbeta = sum(g),
        dx = gamma * invstd * (g - dbeta / n - (x - mean) * invstd * dgamma / n),

    the gradients of Ioffe and Szegedy (2015, section 3) collected. After a frozen forward dx = gamma * invstd * g. With
    sample weights w, the two terms that stem from the statistics are multiplied by w.

    Parameters
    ----------
    dy : array
        Gradient of y, of x's shape and dtype.
    ctx : Context
        From `batch_norm_forward`. It can be used again.
    out : array, optional
        Where dx goes, of x's shape and dtype. It may be dy itself.

    Returns
    -------
    dx : array
        Of x's shape, dtype and memory order.
    dgamma, dbeta : array, (C,), or None
        In the dtypes of gamma and beta; None for what was None.
    dresidual : array
        Only if the forward had a residual: g, as a new array.

    Raises
    ------
    TypeError, ValueError
        For dy or out of another kind, dtype or shape; `out` that cannot be written, or overlaps other than dy. Nothing has been written
        then.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> y, ctx = fastbn.batch_norm_forward(x, gamma=np.ones(1), eps=1e-12)
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.array([[1.0], [0.0]]), ctx)
    >>> dgamma.round(6).tolist(), dbeta
    ([-1.0], None)
    """
    plan, arrays, exchange = look_back("backward", context(ctx), (dy, out))
    x, dy, out_ = arrays
    if out_ is not None and not plan.backend.separate(plan, arrays):
        overlaps.check_out(plan.backend, out_, "dy", (("dy", dy), ("x, which ctx holds", x)))
    results: tuple[Array | None, ...] = plan.backend.backward(plan, x, dy, ctx, out_)
    if exchange is not None:
        results = tuple(exchange.back(a) for a in results)
    return results if out is None else (out, *results[1:])


def context(ctx: object, made_by: str = "batch_norm_forward") -> Context:
    """A forward's context.

    Raises
    ------
    TypeError
        For anything else.
    """
    if type(ctx) is not Context:
        raise TypeError(f"ctx is a {type(ctx).__name__}; pass the second result of {made_by}")
    return ctx


def batch_norm_inference(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise with given statistics; no context is kept.

    Parameters
    ----------
    x, gamma, beta, eps, axis, activation, residual
        As in `batch_norm_forward`.
    mean, var : array, (C,)
        float32 or float64.
    out : array, optional
        Where y goes, of x's shape and dtype. It may be x itself.

    Returns
    -------
    y : array
        Of x's shape, dtype and memory order.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_forward`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> fastbn.batch_norm_inference(x, None, None, np.array([1.0, 2.0]), np.ones(2), eps=1e-12).round(6).tolist()
    [[0.0, 0.0], [2.0, 2.0]]
    """
    arrays = x, gamma, beta, mean, var, residual, out
    plan, arrays, exchange = look("inference", arrays, axis, False, activation)
    eps = scalars.eps(eps)
    backend: Any = plan.backend
    x_, gamma_, beta_, mean_, var_, residual_, out_ = arrays
    if out_ is not None and not backend.separate(plan, arrays):
        others = (("x", x_), ("residual", residual_), ("gamma", gamma_), ("beta", beta_), ("mean", mean_), ("var", var_))
        overlaps.check_out(backend, out_, "x", others)
    y = backend.inference(plan, x_, gamma_, beta_, mean_, var_, residual_, out_, eps)
    if exchange is not None:
        y = exchange.back(y)
    return y if out is None else out


def moments(x: Array, *, axis: int = 1, sample_weight: Array | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, mergeable with ``+``.

    Parameters
    ----------
    x, axis, sample_weight
        As in `batch_norm_forward`. One value per channel, or none, is allowed.

    Returns
    -------
    Moments
        ``count``, ``mean``, ``m2``, ``var(ddof)``; ``a + b`` are the moments of both data sets together.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm_forward`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(4, 3)
    >>> total = fastbn.moments(x[:3]) + fastbn.moments(x[3:])
    >>> total.count, total.mean.tolist(), total.var(ddof=0).tolist()
    (4.0, [4.5, 5.5, 6.5], [11.25, 11.25, 11.25])
    """
    from fastbn.statistics import Moments

    plan, (x_, weight), _ = look("moments", (x, sample_weight), axis, False, None)
    weights = None if weight is None else weighed(plan, weight)
    count, mean, m2, low = plan.backend.moments(plan, x_, weights)
    return Moments.empty(plan.C) if count == 0.0 else Moments(count, mean, m2, low)
