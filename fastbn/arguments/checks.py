"""What the functions accept, on either device. Errors say what arrived, what is allowed, what to do; each text stands here, once.

Checks see the facts of arrays (fastbn/common/facts.py), never the arrays: they are made once for all calls that are alike. What depends
on values is checked by `weight_values` and its neighbours, on addresses by overlaps.py, at each call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastbn.arguments import scalars
from fastbn.common.facts import DTYPES, Seen, dtype_name

ALLOWED = f"{', '.join(DTYPES[:-1])} and {DTYPES[-1]} (ml_dtypes)"


def cast_advice(dtype: np.dtype[Any], name: str) -> str:
    """What to do with an array of a dtype that is not taken: the end of an error's text."""
    if dtype.names:
        return f"pass one of its fields, {name}[{dtype.names[0]!r}]"
    if dtype.kind == "c":
        return f"pass its real part, {name}.real, or real and imaginary part as channels of their own"
    if dtype.kind in "OSUTmM" or dtype.type is np.void:
        return f"convert it to numbers, {name}.astype(np.float64)"
    wide = dtype.kind == "f" and dtype.itemsize > 8
    return f"cast with {name}.astype(np.{'float64' if wide else 'float32'})"


# ------------------------------------------------------------------------------------------------------- one array each


def data(a: Seen, name: str) -> str:
    """The name of the dtype of an array of data.

    Raises
    ------
    TypeError
        For another dtype.
    """
    dtype = dtype_name(a.dtype)
    if dtype is None:
        raise TypeError(f"{name} has dtype {a.dtype}; allowed are {ALLOWED}: {cast_advice(a.dtype, name)}")
    return dtype


def x_and_axis(x: Seen, axis: Any) -> tuple[str, int]:
    """The name of x's dtype, and axis counted from the front.

    Raises
    ------
    TypeError, ValueError
        For another dtype; fewer than two dimensions; an axis that x does not have.
    """
    dtype = data(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; at least 2 dimensions are needed, such as (N, C): use x[None] or x.reshape(-1, C)")
    axis = scalars.whole(axis, "axis")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for x with shape {x.shape}; allowed are {-x.ndim} to {x.ndim - 1}")
    return dtype, axis % x.ndim


def vector(a: Seen | None, name: str, x: Seen, axis: int) -> None:
    """A parameter or a statistic, if given: float32 or float64 of shape (C,).

    Raises
    ------
    TypeError, ValueError
        For another dtype; another shape.
    """
    if a is None:
        return
    if a.dtype.char not in "fd":
        raise TypeError(f"{name} has dtype {a.dtype}; allowed are float32 and float64: {cast_advice(a.dtype, name)}")
    C = x.shape[axis]
    if a.shape != (C,):
        raise ValueError(f"{name} has shape {a.shape}, but x has shape {x.shape} with {C} channels on axis {axis}: it must be ({C},)")


def running(mean: Seen | None, var: Seen | None, x: Seen, axis: int, written: bool) -> None:
    """Both running statistics or neither.

    Raises
    ------
    TypeError, ValueError
        As `vector`; one without the other; and if they are `written`, arrays that cannot be.
    """
    if (mean is None) != (var is None):
        here, missing = ("running_mean", "running_var") if var is None else ("running_var", "running_mean")
        raise ValueError(f"{here} was given without {missing}; pass both, or neither")
    for a, name in ((mean, "running_mean"), (var, "running_var")):
        vector(a, name, x, axis)
        if a is not None and written:
            if not a.writeable:
                raise ValueError(f"{name} is read-only, but training updates it in place; pass a writable copy: {name}.copy()")
            if a.strides[0] == 0 and a.shape[0] > 1:
                raise ValueError(f"{name} has stride 0: its elements share one address; pass {name}.copy()")


def like(a: Seen | None, name: str, x: Seen) -> None:
    """A residual or a gradient, if given: of x's shape and dtype, whatever its byte order.

    Raises
    ------
    TypeError, ValueError
        For another dtype; another shape.
    """
    if a is None:
        return
    dtype = data(a, name)
    if a.dtype != x.dtype and dtype != dtype_name(x.dtype):
        raise TypeError(f"{name} has dtype {a.dtype} and x has {x.dtype}; they must be equal: cast with {name}.astype(x.dtype)")
    if a.shape != x.shape:
        raise ValueError(f"{name} has shape {a.shape} and x has shape {x.shape}; they must be equal")


def output(out: Seen | None, x: Seen, library: str) -> None:
    """`out`, if given: of x's shape and dtype, writable, each element with an address of its own.

    Raises
    ------
    TypeError, ValueError
    """
    if out is None:
        return
    make = f"{library}.empty_like(x)"
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype} and x has {x.dtype}; they must be equal: {make}")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {out.shape} and x has shape {x.shape}; they must be equal: {make}")
    if not out.writeable:
        raise ValueError(f"out is read-only; pass a writable array: {make}")
    if out.overlaps_itself:
        raise ValueError(f"out has strides {out.strides}: several elements share one address; pass {make}")


def weights(w: Seen | None, x: Seen, axis: int) -> None:
    """sample_weight, if given: real or bool, (N,) or x's shape without the channel axis.

    Raises
    ------
    TypeError, ValueError
        For another dtype; another shape.
    """
    if w is None:
        return
    if w.dtype.kind not in "bfiu" and dtype_name(w.dtype) is None:
        advice = cast_advice(w.dtype, "sample_weight")
        raise TypeError(f"sample_weight has dtype {w.dtype}; allowed are bool and real numbers: {advice}")
    full = x.shape[:axis] + x.shape[axis + 1 :]
    if w.shape not in (full, full[:1]):
        raise ValueError(
            f"sample_weight has shape {w.shape}, x has shape {x.shape} with channels on axis {axis}: it must be {full[:1]} or {full}"
        )


# ------------------------------------------------------------------------------------------------------------ whole calls


def forward(seen: Mapping[str, Seen], axis: int, training: bool, library: str) -> None:
    """The arrays of a forward, or with given moments of a part of a batch, but for x."""
    x = seen["x"]
    for name in ("gamma", "beta"):
        vector(seen.get(name), name, x, axis)
    running(seen.get("running_mean"), seen.get("running_var"), x, axis, training)
    like(seen.get("residual"), "residual", x)
    weights(seen.get("sample_weight"), x, axis)
    output(seen.get("out"), x, library)
    if not training and "running_mean" not in seen:
        raise ValueError("training=False normalises with the running statistics; pass running_mean and running_var")


def inference(seen: Mapping[str, Seen], axis: int, library: str) -> None:
    """The arrays of an inference, but for x."""
    x = seen["x"]
    if "mean" not in seen or "var" not in seen:
        raise TypeError("mean and var must be arrays of shape (C,); use batch_norm_forward for the statistics of x")
    for name in ("gamma", "beta", "mean", "var"):
        vector(seen.get(name), name, x, axis)
    like(seen.get("residual"), "residual", x)
    output(seen.get("out"), x, library)


def backward(seen: Mapping[str, Seen], axis: int, library: str) -> None:
    """The arrays of a backward, or of a part of one, but for x."""
    x = seen["x"]
    like(seen.get("dy"), "dy", x)
    for name in ("sum_dy", "sum_dy_xmu"):
        vector(seen.get(name), name, x, axis)
    output(seen.get("out"), x, library)


# ----------------------------------------------------------------------------------------------------------------- values


def one_value_per_channel(x: Seen, axis: int) -> ValueError:
    """The error of training with an x whose channels hold one value each, to be raised."""
    return ValueError(
        f"x has shape {x.shape} with one value per channel on axis {axis}: its variance is 0 and says nothing; "
        "train with more values, or pass training=False"
    )


def weight_values(least: float, largest: float) -> None:
    """The smallest and the largest weight; of weights with a NaN both are NaN.

    Raises
    ------
    ValueError
        For negative, NaN or infinite weights.
    """
    if not (least >= 0 and largest < math.inf):
        raise ValueError("sample_weight has negative, NaN or infinite values; weights must be finite and >= 0")


def weight_total(total: float) -> None:
    """The sum of the weights.

    Raises
    ------
    ValueError
        Where it is infinite.
    """
    if not total < math.inf:
        raise ValueError("sample_weight has a sum beyond the range of float64; divide the weights by their largest")


def positive_weights(positive: int, x: Seen, axis: int) -> None:
    """How many weights are above 0.

    Raises
    ------
    ValueError
        For fewer than 2, in training.
    """
    if positive < 2:
        raise ValueError(
            f"sample_weight leaves {positive} of {math.prod(x.shape) // x.shape[axis]} positions per channel of x with shape {x.shape} "
            f"on axis {axis}; at least 2 must have a weight above 0"
        )
