"""From shape, strides and axis to one of two layouts, once: everything below works on (N, C, S).

Sort an array's axes by stride, and its memory reads: some outer axes, the channel axis, some inner axes. The outer ones collapse
to N rows, the inner ones to S contiguous values:

- **planes**: (N, C, S) with S long, the channels-first layouts; a run of S values belongs to one channel;
- **columns**: a matrix whose column j belongs to channel (j // S) % C. S = 1 is channels last and NC; a short S is channels first
  with short planes; rows narrower than a few vectors are folded, `fold` to one.

NCHW, NCDHW, channels-last views, ``axis=-1``, Fortran order, batch and channel slices all arrive at one of the two without a copy.
What does not (a spatial slice, a negative stride) is copied once into the same memory order, and `fastbn.explain` says so.

>>> p = plan((32, 64, 56, 56), (802816, 12544, 224, 4), 1, 4)
>>> p.family, p.N, p.C, p.S
('planes', 32, 64, 3136)
>>> p = plan((32, 56, 56, 64), (802816, 14336, 256, 4), 3, 4)
>>> p.family, p.N, p.C, p.S
('columns', 100352, 64, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd, prod
from typing import Any

LANES = 16
# Outputs from this size on are streamed around the cache; smaller ones are likely to be read again from it.
STREAM_FROM = 8 << 20
# Narrower matrices are folded until they have this many columns, so that a tile is long enough to stream.
NARROW = 256
# A folded row may not be wider than this: its constants would leave the L2 cache.
WIDEST_FOLD = 8192


@dataclass(frozen=True)
class Plan:
    """How the kernels see an array.

    Attributes
    ----------
    order : tuple of int
        The array's axes from the largest stride to the smallest.
    family : str
        ``"planes"`` or ``"columns"``.
    N, C, S : int
        Rows, channels, contiguous values of a channel.
    fold : int
        Columns only: how many rows are read as one. 1 unless rows are narrow or of odd width.
    copied : bool
        The array's own strides do not fit: it is copied into a contiguous array of the same axis order.
    """

    order: tuple[int, ...]
    family: str
    N: int
    C: int
    S: int
    fold: int
    copied: bool

    @cached_property
    def rows(self) -> int:
        """Rows of the folded matrix."""
        return self.N // self.fold

    @cached_property
    def rest(self) -> int:
        """Columns of the incomplete last row of the folded matrix."""
        return self.N % self.fold * self.C * self.S

    @cached_property
    def count(self) -> int:
        """Values in a channel."""
        return self.N * self.S


def axis_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Axes from the largest stride to the smallest; axes of length 1 keep their place, as their stride means nothing."""
    order = list(range(len(shape)))
    long = [a for a in order if shape[a] != 1]
    by_stride = sorted(long, key=lambda a: -abs(strides[a]))
    for place, a in zip(long, by_stride, strict=True):
        order[place] = a
    return tuple(order)


def _collapse(axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """(length, stride in bytes) of several axes read as one, or None where they are not evenly spaced."""
    length, stride = 1, 0
    for a in reversed(axes):
        if shape[a] == 1:
            continue
        if length == 1:
            stride = strides[a]
        elif strides[a] != length * stride:
            return None
        length *= shape[a]
    return length, stride


def strides_in(
    order: tuple[int, ...], axis: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, int] | None:
    """Strides of rows and channels, in elements, of an array read in `order`; None if it cannot be read so without a copy."""
    at = order.index(axis)
    rows = _collapse(order[:at], shape, strides)
    inner = _collapse(order[at + 1 :], shape, strides)
    if rows is None or inner is None:
        return None
    (N, row_stride), (S, inner_stride), C = rows, inner, shape[axis]
    channel_stride = strides[axis] if C > 1 else S * itemsize
    if N == 1:
        row_stride = channel_stride * C
    if S > 1 and inner_stride != itemsize:
        return None
    # One value after another: S values of a channel, channels apart by S or more, rows apart by all their channels or more.
    if channel_stride < S * itemsize or channel_stride % itemsize or row_stride % itemsize:
        return None
    if row_stride < channel_stride * (C - 1) + S * itemsize or (S == 1 and C > 1 and channel_stride != itemsize):
        return None
    return row_stride // itemsize, channel_stride // itemsize


def dense_strides(order: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a contiguous array whose axes lie in memory in `order`."""
    strides = [0] * len(shape)
    step = itemsize
    for a in reversed(order):
        strides[a] = step
        step *= max(shape[a], 1)
    return tuple(strides)


def inverse(order: tuple[int, ...]) -> tuple[int, ...] | None:
    """How an array whose axes lie in this order is transposed to their own; None if it need not be."""
    straight = tuple(range(len(order)))
    return None if order == straight else tuple(order.index(a) for a in straight)


def weights_in_order(xp: Any, weight: Any, shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> Any:
    """Weights for data of a shape, (N,) or that shape without the channel axis, one for each position, axes as they lie in memory.

    `xp` is the arrays' module, NumPy or CuPy.
    """
    positions = shape[:axis] + shape[axis + 1 :]
    if weight.shape != positions:
        weight = xp.broadcast_to(weight.reshape(weight.shape + (1,) * (len(positions) - 1)), positions)
    return weight.transpose(tuple(a - (a > axis) for a in order if a != axis))


def _fold(N: int, C: int, S: int) -> int:
    """How many rows to read as one, so that vectors are full and rows start aligned."""
    width = C * S
    fold = LANES // gcd(width, LANES)
    if width * fold < NARROW:
        fold *= -(-NARROW // (width * fold))
    return fold if width * fold <= WIDEST_FOLD and 4 * fold <= N else 1


def _shortest_planes(N: int, streamed: bool, inference: bool) -> int:
    """From which S on a channel's values are read as planes, and not as columns.

    Columns spread each channel's constants over its columns, which few rows do not repay. Planes have a start and an end, which short ones
    do not repay, most of all where output is streamed, as each end leaves a line of memory in two parts. Time as columns over time as
    planes, float32, 2 threads, forward and backward: 1.2 and 1.45 for 8x256x14x14, 1.05 and 1.25 for 8x512x10x10, 1.3 and 1.1 for
    32x64x14x14, 0.8 and 0.85 for 32x1200x7x7; streamed 1.2 and 1.4 for 4x8160x14x14, 0.95 and 0.85 for 32x1008x14x14. Inference, which
    reads memory once, would jump from strip to strip for nothing: 1.25 for 32x1024x14x14, 1.7 for 8x1024x14x14, 0.85 for 32x2048x8x8.
    """
    if inference:
        return 32 if N < 8 and not streamed else 128
    if streamed:
        return 128 if N < 8 else 192 if N < 16 else 256
    return 32 if N < 8 else 64 if N < 32 else 128


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int, itemsize: int, weighted: bool = False, inference: bool = False
) -> Plan:
    """The plan for an array; `axis` is the channel axis, counted from the front. No axis may have length 0.

    `inference` is for calls with given statistics that no backward follows.
    """
    order = axis_order(shape, strides)
    fitting = strides_in(order, axis, shape, strides, itemsize)
    copied = fitting is None
    if fitting is None:
        fitting = strides_in(order, axis, shape, dense_strides(order, shape, itemsize), itemsize)
    assert fitting is not None
    row_stride, channel_stride = fitting
    at = order.index(axis)
    N, C, S = prod(shape[a] for a in order[:at]), shape[axis], prod(shape[a] for a in order[at + 1 :])
    shortest = _shortest_planes(N, N * C * S * itemsize >= STREAM_FROM, inference)
    columns = S == 1 or (shortest > S and channel_stride == S)
    dense = row_stride == C * S
    fold = _fold(N, C, S) if columns and dense and not weighted else 1
    return Plan(order, "columns" if columns else "planes", N, C, S, fold, copied)


@lru_cache(maxsize=4096)
def tensor_strides(
    p: Plan, axis: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, int] | None:
    """(row stride, channel stride) in elements with which the kernels read an array under plan `p`, or None: copy it first."""
    fitting = strides_in(p.order, axis, shape, strides, itemsize)
    if fitting is None:
        return None
    row_stride, channel_stride = fitting
    if p.family == "columns" and channel_stride != p.S and p.C > 1:
        return None
    if p.fold > 1:
        return (row_stride * p.fold, channel_stride) if row_stride == p.C * p.S else None
    return fitting
