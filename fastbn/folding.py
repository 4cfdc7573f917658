"""Fold a frozen batch normalisation into the convolution or linear layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.arguments import checks, scalars
from fastbn.arguments.kinds import plain_array
from fastbn.common.facts import DTYPES
from fastbn.statistics import Array, namespace_of


def fold_batch_norm(
    weight: Array, bias: Array | None, gamma: Array | None, beta: Array | None, mean: Array, var: Array, *, eps: float = 1e-5, axis: int = 0
) -> tuple[Array, Array]:
    """Weight and bias of the one layer that does what ``batch_norm_inference(layer(x), ...)`` does.

    With scale = gamma / sqrt(var + eps) per output channel, the layer w * x + b followed by normalisation is
    (scale * w) * x + (scale * (b - mean) + beta) (Jacob et al. 2018, "Quantization and training of neural networks for
    efficient integer-arithmetic-only inference", eq. 14, with the bias term).

    Parameters
    ----------
    weight : array, any shape with C output channels along `axis`; float16, bfloat16, float32 or float64
        Of a convolution or a linear layer.
    bias : array, (C,), or None
        None is 0.
    gamma, beta : array, (C,), or None
        None is 1 and 0.
    mean, var : array, (C,)
        Running statistics; var >= 0.
    eps : float
        What the normalisation adds to var; finite and > 0.
    axis : int
        Output-channel axis of `weight`: 0 for PyTorch's layers and for ONNX, 1 for PyTorch's transposed convolutions
        and for linear weights stored (in, out), -1 for Keras and Flax.

    Returns
    -------
    weight, bias : array, weight's shape and (C,)
        New arrays of weight's dtype, computed in float64 and rounded once.

    Raises
    ------
    ValueError
        For a vector that is not (C,), an axis out of range, a negative variance, an eps that is not > 0, or finite values whose
        result weight's dtype cannot hold: float16 ends at 65504. NaN and infinities among the inputs stay in their channel.
    TypeError
        For arrays that are not floating (weight) or not real (the rest), lists, masked arrays, or a mix of NumPy and CuPy arrays.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> weight, mean, var = np.ones((2, 3)), np.array([1.0, 2.0]), np.array([4.0, 0.25])
    >>> w, b = fastbn.fold_batch_norm(weight, None, None, None, mean, var, eps=1e-12)
    >>> w.round(6).tolist(), b.round(6).tolist()
    ([[0.5, 0.5, 0.5], [2.0, 2.0, 2.0]], [-0.5, -4.0])
    """
    xp = namespace_of(weight)
    weight = _array(xp, "weight", weight)
    if weight.dtype.name not in DTYPES:
        advice = checks.cast_advice(weight.dtype, "weight")
        raise TypeError(f"weight has dtype {weight.dtype}; allowed are {checks.ALLOWED}: {advice}")
    if weight.ndim == 0:
        raise ValueError("weight has shape (); it needs an axis of output channels: pass weight.reshape(1)")
    axis = scalars.whole(axis, "axis")
    if not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis is {axis}; weight of shape {weight.shape} has axes {-weight.ndim} to {weight.ndim - 1}")
    eps = scalars.eps(eps)
    channels = weight.shape[axis]

    mean = _vector(xp, "mean", mean, weight, axis)
    var = _vector(xp, "var", var, weight, axis)
    if bool((var < 0).any()):
        raise ValueError(f"var has negative values (smallest: {float(var.min())}); a variance is >= 0")
    gamma = xp.ones(channels) if gamma is None else _vector(xp, "gamma", gamma, weight, axis)
    beta = xp.zeros(channels) if beta is None else _vector(xp, "beta", beta, weight, axis)
    bias = xp.zeros(channels) if bias is None else _vector(xp, "bias", bias, weight, axis)

    along_axis = [1] * weight.ndim
    along_axis[axis] = channels
    with np.errstate(all="ignore"):  # NaN and inf stay in their channel, silently
        scale = gamma / xp.sqrt(var + eps)
        folded = weight.astype(xp.float64) * scale.reshape(along_axis)
        shift = (bias - mean) * scale + beta
        new_weight, new_bias = folded.astype(weight.dtype), shift.astype(weight.dtype)
    # Given finite numbers, a result that is not finite has overflowed: in the cast, or in float64.
    finite = xp.isfinite(gamma) & xp.isfinite(beta) & xp.isfinite(mean) & xp.isfinite(var) & xp.isfinite(bias)
    _check_overflow(xp, "weight", folded, new_weight, finite.reshape(along_axis) & xp.isfinite(weight))
    _check_overflow(xp, "bias", shift, new_bias, finite)
    return new_weight, new_bias


def _check_overflow(xp: Any, name: str, exact: Array, rounded: Array, finite: Array) -> None:
    """ValueError where `rounded` is not finite, although what it was made of is."""
    lost = finite & ~xp.isfinite(rounded)
    if bool(lost.any()):
        wider = {2: "pass weight.astype(np.float32)", 4: "pass weight.astype(np.float64)"}.get(rounded.dtype.itemsize)
        raise ValueError(
            f"the folded {name} has values as large as {float(abs(exact[lost]).max()):.3g}, which {rounded.dtype.name} cannot hold: "
            f"{wider + ', or ' if wider else ''}look for channels of huge gamma or tiny var"
        )


def _array(xp: Any, name: str, a: Any) -> Array:
    """An array of the namespace; of NumPy's subclasses, np.matrix among them, as a plain one."""
    if xp is np:
        return plain_array(a, name)
    if not isinstance(a, xp.ndarray):
        raise TypeError(f"{name} is a {type(a).__name__}, but weight is a {xp.__name__} array: pass {xp.__name__}.asarray({name})")
    return a


def _vector(xp: Any, name: str, values: Array, weight: Array, axis: int) -> Array:
    """`values` as float64 (C,) of weight's namespace, C being weight's length along `axis`."""
    values = _array(xp, name, values)
    if values.dtype.kind not in "iu" and values.dtype.name not in DTYPES:
        raise TypeError(f"{name} has dtype {values.dtype}; it must hold real numbers: {checks.cast_advice(values.dtype, name)}")
    if values.shape != (weight.shape[axis],):
        raise ValueError(
            f"{name} has shape {values.shape}, but weight of shape {weight.shape} has {weight.shape[axis]} output "
            f"channels along axis {axis}; {name} must be ({weight.shape[axis]},). Is axis the output-channel axis?"
        )
    return values.astype(xp.float64)
