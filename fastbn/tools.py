"""What fastbn would do with an array, and compiling ahead: `explain` and `warmup`. Beside it: config.py, `show_config`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastbn.arguments import scalars
from fastbn.arguments.kinds import plain_array, refuse_gpu
from fastbn.arguments.plans import look
from fastbn.common.facts import DTYPES
from fastbn.cpu import dispatch
from fastbn.cpu.crew import what_threads_run
from fastbn.cpu.dispatch import TABLE
from fastbn.cpu.memory import Frame
from fastbn.cpu.plan import present_arguments
from fastbn.cpu.threads import get_num_threads
from fastbn.cpu.weights import WEIGHT_KINDS

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
        How the memory is crossed: ``"channels"``, ``"cached"``, ``"strips"`` or ``"sweeps"`` (see fastbn/cpu/dispatch.py).
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
    refuse_gpu("x", x, "explain", "fastbn.kernels.cuda.plan.plan says what a GPU would run (docs/gpu.md)")
    named = sample_weight is None or isinstance(sample_weight, (bool, np.bool_))
    x = plain_array(x, "x")
    if named:
        sample_weight = np.ones(x.shape[:1], bool) if sample_weight else None
    # The plans that the functions would make; a forward in training needs a second value, or has no plan.
    forward = _plan("moments", x, sample_weight, axis)
    axis, dtype = forward.axis, forward.dtype
    if forward.empty:
        nothing: dict[str, tuple[str, ...]] = {"training forward": (), "inference": (), "backward": ()}
        return Explanation(
            x.shape, dtype, axis, "empty", 0, x.shape[axis], 0, 1, "none", "none", 0, 0, nothing, 1, False, False, "x is empty"
        )
    frame, p = forward.frame, forward.frame.layout
    reason = _why_copied(x) or (_why_strides(x) if p.copied else "")
    training, backward = frame.schedule(1, False, True), frame.schedule(2, False, True)
    inference = Frame(forward.seen["x"], axis, dtype, inference=True).layout
    return Explanation(
        shape=x.shape,
        dtype=dtype,
        axis=axis,
        family=p.family,
        N=p.N,
        C=p.C,
        S=p.S,
        fold=p.folded,
        road=training.traversal,
        backward_road=backward.traversal,
        group=training.shape.group,
        blocks=training.shape.blocks,
        kernels={
            "training forward": _computing(TABLE["forward", p.family, training.traversal]),
            "inference": TABLE["inference", inference.family, "sweeps"],
            "backward": TABLE["backward", p.family, backward.traversal],
        },
        threads=min(get_num_threads(), dispatch.most_threads(x.size)),
        streamed=frame.streams(x, frame.fresh[0], False),  # y's strides; its address matters to masks alone
        copied=bool(reason),
        reason=reason or "the kernels read x where it is",
    )


def _plan(operation: str, *arrays_and_axis: Any) -> Any:
    """The plan of a call, without the call."""
    *arrays, axis = arrays_and_axis
    return look(operation, tuple(arrays), axis, False, None)[0]


def _computing(kernels: tuple[str, ...]) -> tuple[str, ...]:
    """The kernels of a line of the table that read or write values of x's shape, or finish channels."""
    return tuple(name for name in kernels if name != "update_running")


def _why_copied(x: Array) -> str:
    """Why x is copied before its strides are looked at, or ''."""
    if not x.dtype.isnative:
        foreign = "big" if sys.byteorder == "little" else "little"
        return f"its bytes are in {foreign}-endian order; store it as x.astype(x.dtype.newbyteorder('='))"
    if not x.flags.aligned:
        return f"its address or strides are no multiples of {x.dtype.alignment} bytes (unaligned); store it as x.copy()"
    return ""


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
    build a container image, or before workers are forked. GPU kernels are compiled by their first call. One program is left out: the
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
        Programs made ready: compiled, or loaded from the disk cache. 0 if all were.

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
        for run, traversal, present in _calls(features, dtype):
            for family in families:
                if (run, family, traversal) in TABLE:
                    dispatch.program(run, family, traversal, dtype, present)
    what_threads_run()
    return len(variants._compiled) - before


def _several(given: Any) -> tuple[Any, ...]:
    """What an iterable holds; whatever else was given, alone."""
    if isinstance(given, (str, bytes, type, np.dtype)) or not isinstance(given, Iterable):
        return (given,)
    return tuple(given)


def _dtype_name(dtype: Any) -> str:
    """A name in `DTYPES`: of itself, of a NumPy dtype, or of what NumPy makes one of."""
    name = dtype
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):  # None is float64 to NumPy
        with suppress(TypeError):
            name = np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(map(repr, DTYPES))}")
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


def _calls(features: tuple[str, ...], dtype: str) -> set[tuple[str, str, tuple[str, ...]]]:
    """(what runs, traversal, optional arguments) of every call with any of the features; as CpuPlan makes them."""
    found = set()
    for chosen in chain.from_iterable(combinations(features, n) for n in range(len(features) + 1)):
        relu, residual = "relu" in chosen, "residual" in chosen
        for weights in WEIGHT_KINDS if "weights" in chosen else (None,):
            calls: list[tuple[str, dict[str, Any]]] = [
                ("forward", {"residual": residual, "weights": weights, "mask": relu, "relu": relu}),
                ("moments", {"weights": weights}),
                ("inference", {"residual": residual, "relu": relu}),
                ("backward", {"weights": weights, "mask": relu, "dresidual": residual}),
                ("reduce", {"weights": weights, "mask": relu}),
                ("apply", {"weights": weights, "mask": relu, "dresidual": residual}),
                # With given statistics: the forward keeps a mask, which batch_norm_inference does not, and weights have no say.
                ("inference", {"residual": residual, "mask": relu, "relu": relu}),
                ("backward", {"mask": relu, "dresidual": residual, "frozen": True}),
            ]
            for run, given in calls:
                traversals = {"sweeps"} if "frozen" in given else {traversal for of, _, traversal in TABLE if of == run}
                found |= {(run, traversal, present_arguments(run, traversal, dtype, **given)) for traversal in traversals}
    return found
