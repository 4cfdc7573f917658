"""What fastbn would do with an array, and compiling ahead: `explain` and `warmup`. Twin: config.py, `show_config`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.arguments import checks, scalars
from fastbn.cpu import backend as cpu
from fastbn.cpu import dispatch, layout, memory
from fastbn.cpu.dispatch import TABLE
from fastbn.cuda import arrays as gpu_arrays

Array = NDArray[Any]

# The features that `warmup` knows.
FEATURES = ("relu", "residual", "weights")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out about an array; printing it gives the text.

    Attributes
    ----------
    shape, dtype, axis
        The array's; axis counts from the front.
    family : str
        How the kernels of training see it: ``"planes"`` or ``"columns"`` (see fastbn/cpu/layout.py), or ``"empty"``.
    N, C, S : int
        Rows, channels, contiguous values of a channel.
    fold : int
        Columns: rows that are read as one.
    road, backward_road : str
        How the memory is crossed: ``"channels"``, ``"strips"`` or ``"sweeps"`` (see fastbn/cpu/dispatch.py).
    group, blocks : int
        Channels that are worked on together; blocks of a channel that are summed apart and then merged.
    kernels : mapping of str to tuple of str
        For ``"training forward"``, ``"inference"`` and ``"backward"``: the kernels that run, in order.
    threads : int
        How many this array would use.
    streamed : bool
        Whether y is written around the caches.
    copied : bool
        Whether x is copied first, whole, in every call.
    reason : str
        Why it is, and what to do about it; or why not.
    """

    shape: tuple[int, ...]
    dtype: str
    axis: int
    family: str
    N: int
    C: int
    S: int
    fold: int
    road: str
    backward_road: str
    group: int
    blocks: int
    kernels: Mapping[str, tuple[str, ...]]
    threads: int
    streamed: bool
    copied: bool
    reason: str

    def __str__(self) -> str:
        if self.family == "empty":
            return f"x: {self.dtype} {self.shape}, channels on axis {self.axis}\nempty: no kernel runs, nothing is copied"
        folded = f", {self.fold} rows read as one" if self.fold > 1 else ""
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        lines = {
            "x": f"{self.dtype} {self.shape}, channels on axis {self.axis}",
            "layout": f"{self.family}, N={self.N} C={self.C} S={self.S}{folded}",
            "road": f"{self.road} forward, {self.backward_road} backward; groups of {self.group}, {self.blocks} blocks a channel",
            "threads": f"{threads}; y is {'streamed past the caches' if self.streamed else 'written through the caches'}",
            **{name: " -> ".join(names) for name, names in self.kernels.items()},
            "copied": f"{'yes' if self.copied else 'no'}: {self.reason}",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def explain(x: Array, axis: int = 1, *, sample_weight: Array | bool | None = None) -> Explanation:
    """Say what the functions would do with x: layout, kernels, threads, and whether x would be copied. Computes nothing.

    Parameters
    ----------
    x : array
        As in `batch_norm_forward`. Residuals and gradients are copied for the same reasons, or where their axes lie in another
        order in memory than those of x.
    axis : int
        The channel axis.
    sample_weight : array or bool, optional
        The weights that there would be, or whether there would be any.

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError
        For an array that the functions would not take either.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.zeros((32, 64, 56, 56), np.float32)
    >>> e = fastbn.explain(x)
    >>> e.family, e.N, e.C, e.S, e.copied
    ('planes', 32, 64, 3136, False)
    >>> fastbn.explain(x[..., :-1]).copied
    True
    """
    gpu_arrays.refuse("x", x, "explain", "fastbn.kernels.cuda.plan.plan says what a GPU would run (docs/gpu.md)")
    x, dtype, axis = checks.x_and_axis(x, axis)
    weighted = sample_weight if isinstance(sample_weight, (bool, np.bool_)) else checks.weights(sample_weight, x, axis) is not None
    if x.size == 0:
        nothing: dict[str, tuple[str, ...]] = {"training forward": (), "inference": (), "backward": ()}
        return Explanation(
            x.shape, dtype, axis, "empty", 0, x.shape[axis], 0, 1, "none", "none", 0, 0, nothing, 1, False, False, "x is empty"
        )
    as_read, reason = _as_read(x)
    p = layout.plan(x.shape, as_read, axis, x.itemsize, bool(weighted))
    frame = memory.Frame(x.shape, axis, dtype, x.itemsize, p)
    if not reason and p.copied:
        reason = _why_strides(x)
    forward, backward = dispatch.schedule(p, x.itemsize, 1), dispatch.schedule(p, x.itemsize, 2)
    inference = layout.plan(x.shape, as_read, axis, x.itemsize, inference=True)
    dense = layout.dense_strides(p.order, x.shape, x.itemsize)
    y = layout.tensor_strides(p, axis, x.shape, dense, x.itemsize)
    assert y is not None
    return Explanation(
        shape=x.shape,
        dtype=dtype,
        axis=axis,
        family=p.family,
        N=p.N,
        C=p.C,
        S=p.S,
        fold=p.fold,
        road=forward.road,
        backward_road=backward.road,
        group=forward.group,
        blocks=forward.blocks,
        kernels={
            "training forward": TABLE["forward", p.family, forward.road],
            "inference": TABLE["inference", inference.family, "sweeps"],
            "backward": TABLE["backward", p.family, backward.road],
        },
        threads=dispatch.threads_for(x.size),
        streamed=frame.large and memory.streamed((x, *y), frame, False),  # y's strides; its address matters to masks alone
        copied=bool(reason),
        reason=reason or "the kernels read x where it is",
    )


def _as_read(x: Array) -> tuple[tuple[int, ...], str]:
    """The strides with which x reaches the layout, and why it is copied before, or ''. The copy is what `memory.native` makes."""
    if x.dtype.isnative and x.flags.aligned:
        return x.strides, ""
    if not x.dtype.isnative:
        foreign = "big" if sys.byteorder == "little" else "little"
        reason = f"its bytes are in {foreign}-endian order; store it as x.astype(x.dtype.newbyteorder('='))"
    else:
        reason = f"its address or strides are no multiples of {x.dtype.alignment} bytes (unaligned); store it as x.copy()"
    # Like ndarray.astype(order="K"), which keeps the order of the axes: layout.axis_order says in which order they lie.
    return layout.dense_strides(layout.axis_order(x.shape, x.strides), x.shape, x.itemsize), reason


def _why_strides(x: Array) -> str:
    long = [(n, s) for n, s in zip(x.shape, x.strides, strict=True) if n > 1]
    if any(s == 0 for _, s in long):
        what = "have a zero (a broadcast array)"
    elif any(s < 0 for _, s in long):
        what = "have a negative one (a reversed array)"
    else:
        what = "leave gaps inside a channel's values"
    return f"its strides {x.strides} {what}; store it as numpy.ascontiguousarray(x)"


# ------------------------------------------------------------------------------------------------------------- warmup


def warmup(
    dtypes: Iterable[DTypeLike] | DTypeLike = ("float32",),
    ndim: Iterable[int] | int = (4,),
    axis: Iterable[int] | int = (1,),
    *,
    features: Iterable[str] | str = (),
) -> int:
    """Compile now what calls with such arrays will need, so that the first of them does not wait.

    With the disk cache on (it is, unless ``FASTBN_CACHE=0``) later processes load the kernels from there: run this once when you
    build a container image, or before workers are forked. GPU kernels are compiled by their first call. One kernel is left out: the
    one that normalises, in float64 lanes, a channel for which float32 lanes do not do (docs/numerics.md).

    Parameters
    ----------
    dtypes : dtype, str, or iterable of them
        Of x: "float32", "float64", "float16", "bfloat16", or what NumPy takes for them, such as ``np.float32``.
    ndim : int or iterable of int
        2 for (N, C), 3 for (N, C, L), 4 for (N, C, H, W), and so on.
    axis : int or iterable of int
        1 for channels first, -1 for channels last.
    features : str or iterable of str
        "relu", "residual", "weights": each combination of those listed is compiled, plain calls too.

    Returns
    -------
    int
        Kernels made ready: compiled, or loaded from the disk cache. 0 if all were.

    Raises
    ------
    ValueError, TypeError
        For an unknown dtype or feature, fewer than 2 dimensions, an axis out of range, numbers that are not whole.

    Examples
    --------
    >>> import fastbn
    >>> n = fastbn.warmup(ndim=[2])
    >>> fastbn.warmup(ndim=[2])
    0
    """
    names = [_dtype_name(dtype) for dtype in _several(dtypes)]
    features = _several(features)
    for feature in features:
        if feature not in FEATURES:
            raise ValueError(f"unknown feature {feature!r}; known are {', '.join(map(repr, FEATURES))}")
    ndims = [scalars.whole(n, "ndim") for n in _several(ndim)]
    families = _families(ndims, [scalars.whole(a, "axis") for a in _several(axis)])

    from fastbn.kernels.cpu import variants

    before = len(variants._compiled)
    for dtype in names:
        for operation, present, frozen in _calls(features, dtype):
            for of, family, road in TABLE:
                if of == operation and family in families and (road == "sweeps" or not frozen):
                    dispatch.program(operation, family, road, dtype, present)
        for running in ("float32", "float64") if dtype == "float64" else ("float32",):
            dispatch.step("update_running", running, ())
    return len(variants._compiled) - before


def _several(given: Any) -> tuple[Any, ...]:
    """What an iterable holds; whatever else was given, alone."""
    if isinstance(given, (str, bytes, type, np.dtype)) or not isinstance(given, Iterable):
        return (given,)
    return tuple(given)


def _dtype_name(dtype: Any) -> str:
    """A name in `checks.DTYPES`: of itself, of a NumPy dtype, or of what NumPy makes one of."""
    name = dtype
    if dtype is not None and not (isinstance(dtype, str) and dtype in checks.DTYPES):  # None is float64 to NumPy
        with suppress(TypeError):
            name = np.dtype(dtype).name
    if name not in checks.DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(map(repr, checks.DTYPES))}")
    return str(name)


def _families(ndims: Iterable[int], axes: Iterable[int]) -> tuple[str, ...]:
    """Families that contiguous arrays belong to: with axes behind the channel axis planes, and columns where these are short."""
    families = set()
    for ndim in ndims:
        if ndim < 2:
            raise ValueError(f"ndim is {ndim}; arrays have at least 2 dimensions, such as (N, C)")
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axis {axis} is out of range for {ndim} dimensions; allowed are {-ndim} to {ndim - 1}")
            families |= {"columns"} if axis % ndim == ndim - 1 else {"planes", "columns"}
    return tuple(sorted(families))


def _calls(features: tuple[str, ...], dtype: str) -> set[tuple[str, tuple[str, ...], bool]]:
    """(operation, its optional arguments, frozen) of every call with any of the features; as cpu.py makes them."""
    found = set()
    for chosen in chain.from_iterable(combinations(features, n) for n in range(len(features) + 1)):
        relu = "relu" in chosen
        mask, residual = (True if name in chosen else None for name in ("relu", "residual"))
        wide = cpu.wide_lanes(dtype, residual)
        for weights in memory.WEIGHT_KINDS if "weights" in chosen else (None,):
            brief = cpu.brief_sums(dtype, weights, False)
            found |= {
                ("forward", cpu.present_arguments(residual, weights, mask, relu, wide=wide), False),
                ("moments", cpu.present_arguments(None, weights, None, False), False),
                ("inference", cpu.present_arguments(residual, None, None, relu, wide=wide), False),
                ("backward", cpu.present_arguments(None, weights, mask, False, residual, brief=brief), False),
                ("reduce", cpu.present_arguments(None, weights, mask, False), False),
                ("apply", cpu.present_arguments(None, weights, mask, False, residual), False),
                # With given statistics: the forward keeps a mask, which batch_norm_inference does not, and weights have no say.
                ("inference", cpu.present_arguments(residual, None, mask, relu, wide=wide), False),
                ("backward", cpu.present_arguments(None, None, mask, False, residual, True), True),
            }
    return found
