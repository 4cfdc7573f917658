"""What the functions accept. Every check is made before anything is written, and says what arrived, what is allowed, what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import scalars

Array = NDArray[Any]

# What data may be, by name: bfloat16 is no dtype of NumPy's own.
DTYPES = ("float32", "float64", "float16", "bfloat16")
ALLOWED = f"{', '.join(DTYPES[:-1])} and {DTYPES[-1]} (ml_dtypes)"
# Native dtypes are looked up; bfloat16 and other byte orders are found by name on the first miss.
_DTYPES: dict[Any, str] = {np.dtype(name): name for name in DTYPES[:-1]}


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The dtype's name if the kernels know it, whatever its byte order."""
    name = _DTYPES.get(dtype)
    if name is None and dtype.kind in "fV" and dtype.names is None and dtype.name in DTYPES:
        name = _DTYPES[dtype] = dtype.name
    return name


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


# What to do with a masked array; for what is not listed, _UNMASKED.
_UNMASK = {
    "x": "pass x.data, and the mask as sample_weight=~mask if it covers whole positions",
    "sample_weight": "pass sample_weight.filled(0), which gives what is masked no weight",
    "out": "pass out.data",
}
_UNMASKED = "pass {0}.data, which ignores the mask, or {0}.filled(value)"


def array(a: Any, name: str) -> Array:
    """A NumPy array, with subclasses such as memory maps seen as plain arrays.

    Raises
    ------
    TypeError
        For anything else.
    """
    if type(a) is np.ndarray:
        return a
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fastbn takes plain arrays: {_UNMASK.get(name, _UNMASKED.format(name))}")
    if isinstance(a, np.ndarray):
        return a.view(np.ndarray)
    kind = "None" if a is None else f"a {type(a).__module__}.{type(a).__qualname__}".replace(" builtins.", " ")
    hint = f"np.asarray({name}, dtype=np.float32)" if isinstance(a, (list, tuple, int, float)) else f"{name} as a NumPy array"
    raise TypeError(f"{name} is {kind}; fastbn takes NumPy arrays, and CuPy arrays on a GPU, all of one kind: pass {hint}")


def data(a: Any, name: str) -> tuple[Array, str]:
    """An array of a dtype that data may have, and the dtype's name.

    Raises
    ------
    TypeError
        For another kind of object or dtype.
    """
    a = array(a, name)
    dtype = _DTYPES.get(a.dtype) or dtype_name(a.dtype)
    if dtype is None:
        raise TypeError(f"{name} has dtype {a.dtype}; allowed are {ALLOWED}: {cast_advice(a.dtype, name)}")
    return a, dtype


def x_and_axis(x: Any, axis: Any) -> tuple[Array, str, int]:
    """x, the name of its dtype, and axis counted from the front.

    Raises
    ------
    TypeError, ValueError
        For another kind of object or dtype; fewer than two dimensions; an axis that x does not have.
    """
    x, dtype = data(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; at least 2 dimensions are needed, such as (N, C): use x[None] or x.reshape(-1, C)")
    if type(axis) is not int:
        axis = scalars.whole(axis, "axis")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for x with shape {x.shape}; allowed are {-x.ndim} to {x.ndim - 1}")
    return x, dtype, axis % x.ndim


def vector(a: Any, name: str, x: Array, axis: int) -> Array | None:
    """A parameter or a statistic: None, or float32 or float64 of shape (C,).

    Raises
    ------
    TypeError, ValueError
        For another kind of object or dtype; another shape.
    """
    if a is None:
        return None
    known: Array = a if type(a) is np.ndarray else array(a, name)
    if known.dtype.char in "fd" and known.shape == (x.shape[axis],):
        return known
    if known.dtype.char not in "fd":
        raise TypeError(f"{name} has dtype {known.dtype}; allowed are float32 and float64: {cast_advice(known.dtype, name)}")
    C = x.shape[axis]
    raise ValueError(f"{name} has shape {known.shape}, but x has shape {x.shape} with {C} channels on axis {axis}: it must be ({C},)")


def running(mean: Any, var: Any, x: Array, axis: int, written: bool) -> tuple[Array | None, Array | None]:
    """Both running statistics or neither.

    Raises
    ------
    TypeError, ValueError
        As `vector`; one without the other; dtypes that differ; and if they are `written`: read-only or overlapping arrays.
    """
    if mean is None and var is None:
        return None, None
    if mean is None or var is None:
        here, missing = ("running_mean", "running_var") if var is None else ("running_var", "running_mean")
        raise ValueError(f"{here} was given without {missing}; pass both, or neither")
    mean, var = vector(mean, "running_mean", x, axis), vector(var, "running_var", x, axis)
    assert mean is not None
    assert var is not None
    if written:
        for a, name in ((mean, "running_mean"), (var, "running_var")):
            if not a.flags.writeable:
                raise ValueError(f"{name} is read-only, but training updates it in place; pass a writable copy: {name}.copy()")
            if a.strides[0] == 0 and len(a) > 1:
                raise ValueError(f"{name} has stride 0: its elements share one address; pass {name}.copy()")
        if _may_overlap(mean, var) and overlap(mean, var):
            raise ValueError("running_mean and running_var share memory, but each is updated in place; pass two arrays")
    return mean, var


def apart(mean: Array, var: Array, read: tuple[tuple[str, Array | None], ...]) -> None:
    """Check that the running statistics, which are updated in place, share no memory with what is only read.

    Raises
    ------
    ValueError
    """
    own = mean.base is None and var.base is None
    for name, a in read:
        if a is None or (own and a.base is None and a is not mean and a is not var):  # each has memory of its own
            continue
        for ours, statistic in (("running_mean", mean), ("running_var", var)):
            if _may_overlap(statistic, a) and overlap(statistic, a):
                raise ValueError(f"{ours} shares memory with {name}, but training updates it in place; pass {ours}.copy()")


def _may_overlap(a: Array, b: Array) -> bool:
    """Whether two arrays' memory may overlap. Two that own theirs are told apart in a tenth of the time of may_share_memory."""
    if a.base is None and b.base is None:
        return a is b
    return np.may_share_memory(a, b)


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; True if that cannot be told quickly."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # any work bound is allowed, the stub knows two
    except np.exceptions.TooHardError:
        return True


def same_place(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides and a.shape == b.shape


def like(a: Any, name: str, x: Array) -> Array:
    """A residual, a gradient: of x's shape and dtype.

    Raises
    ------
    TypeError, ValueError
        For another kind of object or dtype; another shape.
    """
    known, dtype = data(a, name)
    if known.dtype != x.dtype and dtype != dtype_name(x.dtype):
        raise TypeError(f"{name} has dtype {known.dtype} and x has {x.dtype}; they must be equal: cast with {name}.astype(x.dtype)")
    if known.shape != x.shape:
        raise ValueError(f"{name} has shape {known.shape} and x has shape {x.shape}; they must be equal")
    return known


def output(out: Any, x: Array, may_be: Array | None, others: tuple[tuple[str, Array | None], ...]) -> Array | None:
    """None, or an array that can be written.

    Parameters
    ----------
    may_be : array or None
        The one input that `out` may be, element for element.
    others : tuple of (name, array)
        What it must not overlap.

    Raises
    ------
    TypeError, ValueError
        As `like`; a read-only or self-overlapping array; overlap with an input.
    """
    if out is None:
        return None
    known: Array = array(out, "out")
    if known.dtype != x.dtype:
        raise TypeError(f"out has dtype {known.dtype} and x has {x.dtype}; they must be equal: np.empty_like(x)")
    if known.shape != x.shape:
        raise ValueError(f"out has shape {known.shape} and x has shape {x.shape}; they must be equal: np.empty_like(x)")
    if not known.flags.writeable:
        raise ValueError("out is read-only; pass a writable array: np.empty_like(x)")
    if known.size and _overlaps_itself(known):
        raise ValueError(f"out has strides {known.strides}: several elements share one address; pass np.empty_like(x)")
    for name, a in others:
        if a is None or not np.may_share_memory(known, a) or (may_be is a and same_place(known, a)) or not overlap(known, a):
            continue
        allowed = "out may be that array itself, element for element" if may_be is a else "they must not share memory"
        raise ValueError(f"out overlaps {name}; {allowed}: pass np.empty_like(x)")
    return known


def _overlaps_itself(a: Array) -> bool:
    """Whether axes, from the smallest stride up, reach into each other. True for zero strides."""
    reach = a.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (n - 1) + reach
    return False


def weights(sample_weight: Any, x: Array, axis: int) -> Array | None:
    """None, or real weights >= 0 of shape (N,) or x's shape without the channel axis.

    Raises
    ------
    TypeError, ValueError
        For another kind of object or dtype; another shape; negative, NaN or infinite weights.
    """
    if sample_weight is None:
        return None
    w = array(sample_weight, "sample_weight")
    if w.dtype.kind not in "bfiu" and dtype_name(w.dtype) is None:
        advice = cast_advice(w.dtype, "sample_weight")
        raise TypeError(f"sample_weight has dtype {w.dtype}; allowed are bool and real numbers: {advice}")
    full = x.shape[:axis] + x.shape[axis + 1 :]
    if w.shape != full and w.shape != full[:1]:
        raise ValueError(
            f"sample_weight has shape {w.shape}, x has shape {x.shape} with channels on axis {axis}: it must be {full[:1]} or {full}"
        )
    # Of weights with a NaN both are NaN. Three arrays of 32x56x56 weights, as a test of each would make, cost more than the test.
    if w.dtype.kind != "b" and w.size:
        with np.errstate(invalid="ignore"):  # bfloat16's minimum warns of NaN
            least, largest = float(w.min()), float(w.max())
        if not (least >= 0 and largest < math.inf):
            raise ValueError("sample_weight has negative, NaN or infinite values; weights must be finite and >= 0")
    return w


def no_running_statistics() -> ValueError:
    """The error of a frozen forward without statistics, to be raised."""
    return ValueError("training=False normalises with the running statistics; pass running_mean and running_var")


def one_value_per_channel(shape: tuple[int, ...], axis: int) -> ValueError:
    """The error of training with an x of this shape, whose channels hold one value each, to be raised."""
    return ValueError(
        f"x has shape {shape} with one value per channel on axis {axis}: its variance is 0 and says nothing; "
        "train with more values, or pass training=False"
    )


def too_few_weights(positive: int, x: Array, axis: int) -> ValueError:
    """The error of training with so many positive weights, to be raised."""
    return ValueError(
        f"sample_weight leaves {positive} of {x.size // x.shape[axis]} positions per channel of x with shape {x.shape} on axis "
        f"{axis}; at least 2 must have a weight above 0"
    )
