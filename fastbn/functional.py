"""Batch normalisation as functions: forward, backward, inference, moments.

    y = (x - mean) / sqrt(var + eps) * gamma + beta

with mean and variance of each channel over all other axes (Ioffe and Szegedy 2015, algorithm 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbn import running
from fastbn.arguments import checks, scalars
from fastbn.common.context import Context
from fastbn.cpu import backend as cpu
from fastbn.cpu import memory
from fastbn.cuda import backend as gpu
from fastbn.kernels import rows

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
    if type(x) is not np.ndarray and gpu.is_gpu_array(x):
        return gpu.forward(
            x, gamma, beta, running_mean, running_var, training, momentum, eps, axis, unbiased, activation, residual, sample_weight, out
        )
    x, dtype, axis = checks.x_and_axis(x, axis)
    gamma_, beta_ = checks.vector(gamma, "gamma", x, axis), checks.vector(beta, "beta", x, axis)
    mean, var = checks.running(running_mean, running_var, x, axis, bool(training))
    eps, momentum, relu = scalars.eps(eps), scalars.momentum(momentum), scalars.activation(activation)
    if residual is not None:
        residual = checks.like(residual, "residual", x)
    weight = checks.weights(sample_weight, x, axis)
    written = None  # `out` as a plain array
    if out is not None:
        named = (("x", x), ("residual", residual), ("gamma", gamma_), ("beta", beta_), ("running_mean", mean), ("running_var", var))
        written = checks.output(out, x, None, (*named, ("sample_weight", weight)))
    if training and mean is not None and var is not None:
        read = (("x", x), ("gamma", gamma_), ("beta", beta_), ("residual", residual), ("sample_weight", weight))
        checks.apart(mean, var, read)
    if not training and mean is None:
        raise checks.no_running_statistics()

    table = cpu.parameter_table(x.shape[axis], gamma_, beta_)
    if not training and mean is not None and var is not None:
        cpu.set_statistics(table, mean, var)
    dtypes = (None if gamma_ is None else gamma_.dtype, None if beta_ is None else beta_.dtype)
    if x.size == 0:  # y is empty, and nothing is learnt
        with np.errstate(invalid="ignore", divide="ignore"):  # running_var may hold anything
            table[rows.INVSTD] = 1.0 / np.sqrt(table[rows.VAR] + eps)
        ctx = Context(x, axis, bool(training), 0.0, residual is not None, relu, *dtypes, table, None)
        return np.empty_like(x) if out is None else out, ctx
    x_native = memory.native(x)
    frame = memory.frame_of(x_native, axis, dtype, weight is not None)
    weights = None if weight is None else memory.weights_of(weight, frame)
    count = float(frame.plan.count)
    effective = count
    if training:
        if weights is not None:
            if weights.positive < 2:
                raise checks.too_few_weights(weights.positive, x, axis)
            count = weights.total
            effective = weights.effective if unbiased and mean is not None else count
        elif count == 1:
            raise checks.one_value_per_channel(x.shape, axis)
    y, mask = cpu.normalise(
        x_native, frame, table, eps, not training, relu, relu, residual, weights if training else None, written, x.dtype
    )
    state = cpu.State(frame, table, mask, weights if training else None)
    ctx = Context(x, axis, bool(training), count, residual is not None, relu, *dtypes, table, state)
    if training and mean is not None and var is not None:
        running.update(table, mean, var, momentum, running.correction(effective) if unbiased else 1.0)
    return y if out is None else out, ctx


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
    if not isinstance(ctx, Context):
        raise TypeError(f"ctx is a {type(ctx).__name__}; pass the second result of batch_norm_forward")
    x = ctx.x
    if type(x) is not np.ndarray and gpu.is_gpu_array(x):
        return gpu.backward(dy, ctx, out)
    dy = checks.like(dy, "dy", x)
    written = None if out is None else checks.output(out, x, dy, (("dy", dy), ("x, which ctx holds", x)))
    if x.size == 0:
        grads = np.zeros((rows.BACKWARD_ROWS, x.shape[ctx.axis]))
        dresidual: Array | None
        dx, dresidual = np.empty_like(x), np.empty_like(x)
    else:
        dx, grads, dresidual = cpu.backward(dy, x, ctx.state, not ctx.training, ctx.count, ctx.has_residual, written)
    if out is not None:
        dx = out
    dgamma = None if ctx.gamma_dtype is None else grads[rows.DGAMMA].astype(ctx.gamma_dtype)
    dbeta = None if ctx.beta_dtype is None else grads[rows.SUM_DY].astype(ctx.beta_dtype)
    return (dx, dgamma, dbeta, dresidual) if ctx.has_residual else (dx, dgamma, dbeta)


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
    if type(x) is not np.ndarray and gpu.is_gpu_array(x):
        return gpu.inference(x, gamma, beta, mean, var, eps, axis, activation, residual, out)  # type: ignore[no-any-return]
    x, dtype, axis = checks.x_and_axis(x, axis)
    gamma_, beta_ = checks.vector(gamma, "gamma", x, axis), checks.vector(beta, "beta", x, axis)
    mean_, var_ = checks.vector(mean, "mean", x, axis), checks.vector(var, "var", x, axis)
    if mean_ is None or var_ is None:
        raise TypeError("mean and var must be arrays of shape (C,); use batch_norm_forward for the statistics of x")
    eps, relu = scalars.eps(eps), scalars.activation(activation)
    if residual is not None:
        residual = checks.like(residual, "residual", x)
    written = None
    if out is not None:
        named = (("x", x), ("residual", residual), ("gamma", gamma_), ("beta", beta_), ("mean", mean_), ("var", var_))
        written = checks.output(out, x, x, named)
    if x.size == 0:
        return np.empty_like(x) if out is None else out
    table = cpu.parameter_table(x.shape[axis], gamma_, beta_)
    cpu.set_statistics(table, mean_, var_)
    x_native = memory.native(x)
    frame = memory.frame_of(x_native, axis, dtype, False, inference=True)
    y = cpu.normalise(x_native, frame, table, eps, True, relu, False, residual, None, written, x.dtype)[0]
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

    if type(x) is not np.ndarray and gpu.is_gpu_array(x):
        return gpu.moments(x, axis, sample_weight)
    x, dtype, axis = checks.x_and_axis(x, axis)
    weight = checks.weights(sample_weight, x, axis)
    if x.size == 0:
        return Moments.empty(x.shape[axis])
    x = memory.native(x)
    frame = memory.frame_of(x, axis, dtype, weight is not None)
    weights = None if weight is None else memory.weights_of(weight, frame)
    count = float(frame.plan.count) if weights is None else weights.total
    if count == 0.0:
        return Moments.empty(x.shape[axis])
    table = cpu.statistics(x, frame, weights)
    return Moments(count, table[rows.MEAN], table[rows.VAR] * count, table[rows.LOW])
