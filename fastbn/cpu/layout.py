"""From shape, strides and axis to one of two layouts, once: everything below works on (N, C, S).

Sort an array's axes by stride, and its memory reads: some outer axes, the channel axis, some inner axes. The outer ones collapse
to N rows, the inner ones to S contiguous values:

- **planes**: (N, C, S) with S long, the channels-first layouts; a run of S values belongs to one channel;
- **columns**: a matrix whose column j belongs to channel (j // S) % C. S = 1 is channels last and NC; a short S is channels first
  with short planes; rows narrower than a few vectors are folded, `folded` to one.

NCHW, NCDHW, channels-last views, ``axis=-1``, Fortran order, batch and channel slices all arrive at one of the two without a copy.
What does not (a spatial slice, a negative stride) is copied once into the same memory order, and `fastbn.explain` says so.

>>> p = layout_of((32, 64, 56, 56), (802816, 12544, 224, 4), 1, 4)
>>> p.family, p.N, p.C, p.S
('planes', 32, 64, 3136)
>>> p = layout_of((32, 56, 56, 64), (802816, 14336, 256, 4), 3, 4)
>>> p.family, p.N, p.C, p.S
('columns', 100352, 64, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from fastbn.common.axes import axis_order, dense_strides, rows_channels_values, strides_in

LANES = 16
# Outputs from this size on are streamed around the cache; smaller ones are likely to be read again from it.
STREAM_FROM = 8 << 20
# Narrower matrices are folded until they have this many columns, so that a tile is long enough to stream.
NARROW = 256
# A folded row may not be wider than this: its constants would leave the L1 cache, which takes 1.2 to 1.5 times as long where x is in the
# cache (C = 129, 257 and 500; `python bench/paired.py --op inference --layout nc --shapes 2673x257 --threads 1`). Streamed rows may be
# eight times as wide: memory hides what comes from the L2 cache, and rows of whole vectors keep the alignment that streaming needs
# (inference of 20000x258 would take 1.5 times as long).
WIDEST_FOLDED = 1280


@dataclass(frozen=True)
class Layout:
    """How the kernels see an array.

    Attributes
    ----------
    order : tuple of int
        The array's axes from the largest stride to the smallest.
    family : str
        ``"planes"`` or ``"columns"``.
    N, C, S : int
        Rows, channels, contiguous values of a channel.
    folded : int
        Columns only: how many rows are read as one. 1 unless rows are narrow or of odd width.
    copied : bool
        The array's own strides do not fit: it is copied into a contiguous array of the same axis order.
    """

    order: tuple[int, ...]
    family: str
    N: int
    C: int
    S: int
    folded: int
    copied: bool

    @property
    def rows(self) -> int:
        """Rows of the folded matrix."""
        return self.N // self.folded

    @property
    def tail_columns(self) -> int:
        """Columns of the incomplete last row of the folded matrix."""
        return self.N % self.folded * self.C * self.S

    @property
    def count(self) -> int:
        """Values in a channel."""
        return self.N * self.S


def _rows_to_fold(N: int, C: int, S: int, streamed: bool) -> int:
    """How many rows to read as one, so that vectors are full and rows start aligned."""
    width = C * S
    folded = LANES // gcd(width, LANES)
    if width * folded < NARROW:
        folded *= -(-NARROW // (width * folded))
    widest = 8 * WIDEST_FOLDED if streamed else WIDEST_FOLDED
    return folded if width * folded <= widest and 4 * folded <= N else 1


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
def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int, itemsize: int, weighted: bool = False, inference: bool = False
) -> Layout:
    """The layout of an array; `axis` is the channel axis, counted from the front. No axis may have length 0.

    `inference` is for calls with given statistics that no backward follows.
    """
    order = axis_order(shape, strides)
    fitting = strides_in(order, axis, shape, strides, itemsize)
    copied = fitting is None
    if fitting is None:
        fitting = strides_in(order, axis, shape, dense_strides(order, shape, itemsize), itemsize)
    assert fitting is not None
    row_stride, channel_stride = fitting
    N, C, S = rows_channels_values(order, axis, shape)
    streamed = N * C * S * itemsize >= STREAM_FROM
    shortest = _shortest_planes(N, streamed, inference)
    columns = S == 1 or (shortest > S and channel_stride == S)
    dense = row_stride == C * S
    folded = _rows_to_fold(N, C, S, streamed) if columns and dense and not weighted else 1
    return Layout(order, "columns" if columns else "planes", N, C, S, folded, copied)


@lru_cache(maxsize=4096)
def tensor_strides(p: Layout, axis: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int] | None:
    """(row stride, channel stride) in elements with which the kernels read an array under layout `p`, or None: copy it first."""
    fitting = strides_in(p.order, axis, shape, strides, itemsize)
    if fitting is None:
        return None
    row_stride, channel_stride = fitting
    if p.family == "columns" and channel_stride != p.S and p.C > 1:
        return None
    if p.folded > 1:
        return (row_stride * p.folded, channel_stride) if row_stride == p.C * p.S else None
    return fitting
