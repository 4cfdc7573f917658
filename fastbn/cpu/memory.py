"""NumPy arrays as the kernels read and write them: strides under a layout, copies where there must be one, outputs.

Twin: fastbn/cuda/layout.py, which has no choice of families to make.

Nothing of x's size is made, but for the outputs and for inputs whose strides or byte order the kernels cannot take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.common.axes import axis_order, dense_strides, inverse
from fastbn.common.facts import Seen
from fastbn.cpu import dispatch, layout
from fastbn.cpu.dispatch import Schedule

Array = NDArray[Any]
Strides = tuple[int, int]  # of rows and of channels, in elements

LINE = 64
# Bytes of a plane that is streamed although it ends off a line of memory, which is then written in two parts. Of 14x14 (784 bytes) in
# float32, around the cache and through it, 1 and 2 threads: inference of 32x512x14x14 1.49 and 1.01 ms, 0.62 and 0.63; the forward of
# 8x2048x14x14 2.8 and 1.2 ms, 1.5 and 0.8. From 18x18 on the first is faster, but for inference on one thread up to 22x22.
SHORTEST_STREAMED = 1024
# Where in a channel the three values lie whose median is the shift of its moments, as shares of its length. They are irregular, as data is
# not: the first, middle and last value of an image are its border and its centre.
PLACES = np.array([0.303, 0.917, 0.539])


def strides_read(a: Seen) -> tuple[int, ...]:
    """The strides with which an array reaches the layout: its own, or those of the copy that `native` makes."""
    return a.strides if a.plain else dense_strides(axis_order(a.shape, a.strides), a.shape, a.dtype.itemsize)


class Frame:
    """How the arrays of x's shape are read and written: x's layout, and what follows from it.

    Attributes
    ----------
    shape, axis, dtype, layout
        What it was made for, and `layout.layout_of` it.
    itemsize, size : int
        Bytes of a value; values in an array.
    large : bool
        Whether an array is large enough to be streamed.
    in_memory, inverse : tuple of int
        The shape in memory's order, and how an array of it is transposed to `shape`; None if it need not be.
    fresh : (int, int)
        The strides of what `empty` makes.
    """

    def __init__(self, x: Seen, axis: int, dtype: str, weighted: bool = False, inference: bool = False) -> None:
        self.shape, self.axis, self.dtype, self.itemsize = x.shape, axis, dtype, x.dtype.itemsize
        self.layout = p = layout.layout_of(x.shape, strides_read(x), axis, self.itemsize, weighted, inference)
        self.size = p.count * p.C
        self.large = self.size * self.itemsize >= layout.STREAM_FROM
        self.in_memory = tuple(x.shape[a] for a in p.order)
        self.inverse = inverse(p.order)
        fresh = layout.tensor_strides(p, axis, x.shape, dense_strides(p.order, x.shape, self.itemsize), self.itemsize)
        assert fresh is not None
        self.fresh = fresh

    def schedule(self, tensors: int, residual: bool, training: bool) -> Schedule:
        """How work on the arrays is cut."""
        return dispatch.schedule(self.layout, self.itemsize, tensors, residual, training)

    def strides(self, a: Seen | None) -> Strides | None:
        """The strides with which the kernels reach an array of this shape, or None where it must be copied first (or is absent)."""
        if a is None or not a.plain:
            return None
        return layout.tensor_strides(self.layout, self.axis, a.shape, a.strides, self.itemsize)

    @property
    def shift_places(self) -> tuple[tuple[int, int], ...]:
        """Three places (n, s) in a channel, from which its shift is chosen."""
        p = self.layout
        return tuple(divmod(int(share * p.count), p.S) for share in PLACES)

    def empty(self, dtype: np.dtype[Any]) -> Array:
        """An uninitialised array in x's memory order; a large one starts at a cache line, so that it can be streamed."""
        if self.large:
            size = self.size * dtype.itemsize
            raw = np.empty(size + LINE, np.uint8)
            offset = -address(raw) % LINE
            a = raw[offset : offset + size].view(dtype).reshape(self.in_memory)
        else:
            a = np.empty(self.in_memory, dtype)
        return a if self.inverse is None else a.transpose(self.inverse)

    def maker(self, dtype: np.dtype[Any]) -> Callable[[], Array]:
        """What makes such an array, in the shortest way."""
        return partial(self.empty, dtype) if self.large or self.inverse is not None else partial(np.empty, self.in_memory, dtype)

    def copied(self, a: Array) -> Array:
        """A copy, with the strides `fresh`, of an array that the kernels cannot read where it is."""
        copy = self.empty(a.dtype.newbyteorder("="))
        copy[...] = a
        return copy

    def write(self, out: Array | None, strides: Strides | None, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """The array to return, and the one that kernels write, which is to be copied to it where they are two.

        Without `out` a new array of `dtype` in x's memory order; kernels write another where they cannot write `out` directly.
        """
        if out is not None and strides is not None:
            return out, out
        if out is None:
            out = self.empty(dtype)  # y has x's dtype, byte order included
            if dtype.isnative:
                return out, out
        return out, self.empty(dtype.newbyteorder("="))

    def streams(self, y: Array, row: int, with_mask: bool) -> bool:
        """Whether output is written around the cache: it is large, and its rows, `row` values apart, keep the alignment that this needs."""
        p = self.layout
        if not self.large:
            return False
        if p.family == "planes":
            plane = p.S * self.itemsize
            return plane % LINE == 0 or plane >= SHORTEST_STREAMED
        boundary = min(LINE, layout.LANES * self.itemsize)
        return row * self.itemsize % boundary == 0 and not (with_mask and address(y) % boundary)

    def streams_both(self, dx: Array, row: int, dresidual: Array | None) -> bool:
        """The same of dx and dresidual: where one vector is aligned, so must be the other."""
        if not self.streams(dx, row, False):
            return False
        return dresidual is None or (row == self.fresh[0] and (address(dx) - address(dresidual)) % LINE == 0)


# Float64 values that a thread keeps as workspace for small calls: 256 kB.
KEPT = 1 << 15


class _OfThread(threading.local):
    """The workspace of a thread. Nothing in it outlives the call of machine code that it is for, which nothing interrupts."""

    workspace = np.empty(0)


_mine = _OfThread()


def new_workspace(size: int) -> Array:
    """Uninitialised float64 memory that starts at a cache line, as all vectors in it then do."""
    raw = np.empty(size + LINE // 8)
    start = -address(raw) % LINE // 8
    return raw[start : start + size]


def workspace(one_call: bool, size: int) -> Array:
    """Memory for `size` float64 values; that of the thread for one call of machine code, which takes a quarter of the time."""
    if not one_call or size > KEPT:
        return new_workspace(size)
    mine: Array = _mine.workspace
    if mine.size == 0:
        mine = _mine.workspace = new_workspace(KEPT)
    return mine


def address(a: Array) -> int:
    """The address of a[0, 0, ...]."""
    return a.__array_interface__["data"][0]  # type: ignore[no-any-return]


def native(a: Array) -> Array:
    """a itself, or a contiguous copy in native byte order at an aligned address."""
    return np.require(a, a.dtype.newbyteorder("="), ["A", "C"])
