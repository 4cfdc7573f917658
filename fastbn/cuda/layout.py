"""How kernels read and write the arrays of a GPU call: in place, or through contiguous, aligned copies on the GPU. Twin: memory.py.

What is decided here follows from shapes, strides, dtypes and addresses modulo 16, never from what lies in memory, so it is decided once
for calls that are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu import layout
from fastbn.kernels.cuda import host

Array = Any


class Seen(NamedTuple):
    """What can be known of an array without its memory. It holds no array and no address, so that caches may keep it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # the address modulo 16

    @property
    def plain(self) -> bool:
        """Whether kernels, CuPy's too, can read single elements: in native byte order, at multiples of their size."""
        size = self.dtype.itemsize
        return (
            self.dtype.isnative
            and self.offset % size == 0
            and not any(s % size for s, n in zip(self.strides, self.shape, strict=True) if n > 1)
        )

    @property
    def reach(self) -> tuple[int, int]:
        """The first byte and the one behind the last, counted from the address; nothing lies in an empty array."""
        if 0 in self.shape:
            return 0, 0
        steps = [(n - 1) * s for s, n in zip(self.strides, self.shape, strict=True)]
        return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0) + self.dtype.itemsize


def seen(a: Array) -> Seen:
    """What is seen of an array of CuPy's."""
    return Seen(a.shape, a.strides, a.dtype, a.data.ptr % 16)


def _bytes(xp: Any, a: Array) -> Array:
    """a's memory byte by byte, (..., itemsize), from the lowest to the highest: what can be copied from and to anywhere."""
    view = xp.ndarray((*a.shape, a.dtype.itemsize), np.uint8, a.data, strides=(*a.strides, 1))
    return view if a.dtype.isnative else view[..., ::-1]


def native_copy(xp: Any, a: Array) -> Array:
    """A C-contiguous copy, in native byte order.

    An element off its boundary is read byte by byte: CuPy's own kernels would stop at it with an error that no later call survives.
    """
    if seen(a).plain:
        return a.copy(order="C")
    return _bytes(xp, a).copy(order="C").view(a.dtype.newbyteorder("=")).reshape(a.shape)


def assign(xp: Any, to: Array, values: Array) -> None:
    """to[...] = values of the same kind, wherever `to` lies and in whatever byte order."""
    if seen(to).plain:
        to[...] = values
    else:
        _bytes(xp, to)[...] = _bytes(xp, values.astype(to.dtype.newbyteorder("="), copy=False))


class Layout:
    """How the kernels read data of a shape, strides and axis: as contiguous (N, C, S), in its order of axes in memory.

    Attributes
    ----------
    full, axis : tuple of int, int
        The array's shape and channel axis.
    order, inverse : tuple of int, or None
        The axes as they lie in memory, and how to transpose them back; None where they lie as they are counted.
    shape : (N, C, S)
        S == 1: rows of channels.
    stored : np.dtype
        What copies and results are made in: bfloat16 as uint16, all in native byte order.
    storage : str or None
        What kernels take elements as, if not as themselves.
    """

    def __init__(self, x: Seen, axis: int, dtype: str) -> None:
        self.full, self.axis = x.shape, axis
        self.order = layout.axis_order(x.shape, x.strides)
        at = self.order.index(axis)
        self.shape = prod(x.shape[a] for a in self.order[:at]), x.shape[axis], prod(x.shape[a] for a in self.order[at + 1 :])
        self.inverse = layout.inverse(self.order)
        self.in_memory = tuple(x.shape[a] for a in self.order)
        self.dtype = x.dtype
        self.bits = dtype == "bfloat16"
        self.stored = np.dtype(np.uint16) if self.bits else x.dtype.newbyteorder("=")
        self.storage = "uint16" if dtype in ("float16", "bfloat16") else None
        self._dense = layout.dense_strides(self.order, x.shape, x.dtype.itemsize)

    def fits(self, a: Seen) -> bool:
        """Whether kernels can read and write an array in place: without gaps, in this order, element by element."""
        return a.plain and all(s == dense for s, dense, n in zip(a.strides, self._dense, self.full, strict=True) if n > 1)

    def _in_order(self, a: Array) -> Array:
        """A view whose axes lie in memory in this layout's order, bfloat16 as uint16."""
        view = a if self.inverse is None else a.transpose(self.order)
        return view.view(np.uint16) if self.bits else view

    def read(self, xp: Any, a: Array, direct: bool) -> Any:
        """An input as kernels take it: itself if `direct`, which is what `fits` said, else a copy."""
        return host.flat(a if direct else native_copy(xp, self._in_order(a)), self.storage, dense=True)

    def written(self, xp: Any, out: Array | None, direct: bool) -> tuple[Array, Any, Callable[[], None]]:
        """(array to return, what the kernels write, what to call afterwards). `out` is written in place if `direct`."""
        if out is not None and direct:
            return out, host.flat(out, self.storage, dense=True), no_more
        made = xp.empty(self.in_memory, self.stored)
        flat = host.flat(made, self.storage, dense=True)
        if out is None and self.dtype.isnative:
            y = made.view(self.dtype) if self.bits else made
            return y if self.inverse is None else y.transpose(self.inverse), flat, no_more
        if out is None:  # y has x's dtype, byte order included
            out = xp.empty(self.in_memory, self.dtype)
            out = out if self.inverse is None else out.transpose(self.inverse)
        given = out
        return given, flat, lambda: assign(xp, self._in_order(given), made)

    def weight(self, xp: Any, w: Array | None) -> Array | None:
        """Weights of all N * S values, or of a whole number of rows each."""
        if w is None:
            return None
        w = w if seen(w).plain else native_copy(xp, w)
        N, _, S = self.shape
        by_sample = self.full[:1] if self.axis else self.full[1:2]
        if w.shape == by_sample and self.order[0] == 0 and (S == 1 or w.size == N):
            return w  # of runs of rows
        return xp.ascontiguousarray(layout.weights_in_order(xp, w, self.full, self.axis, self.order))


class Channels(NamedTuple):
    """How kernels take per-channel arrays, which are all of one dtype: those named in `direct` in place, others through a copy."""

    dtype: np.dtype[Any]
    direct: frozenset[str]

    def read(self, xp: Any, a: Array | None, name: str) -> Array | None:
        """An array as kernels take it."""
        if a is None or name in self.direct:
            return a
        return native_copy(xp, a).astype(self.dtype, copy=False)


def channels(vectors: dict[str, Seen]) -> Channels:
    """Per-channel arrays of one group, such as gamma and beta: float64 where they are of two dtypes."""
    found = {v.dtype.newbyteorder("=") for v in vectors.values()}
    dtype = np.dtype(np.float64) if len(found) > 1 else next(iter(found), np.dtype(np.float32))
    step = dtype.itemsize
    fitting = (name for name, v in vectors.items() if v.dtype == dtype and v.plain and (v.shape[0] <= 1 or v.strides[0] == step))
    return Channels(dtype, frozenset(fitting))


@lru_cache(maxsize=1024)
def face(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A NumPy array of that shape and dtype that shares one zero between all elements: for checks, which never read it."""
    made: np.ndarray[Any, Any] = np.ndarray(shape, dtype, bytes(32), 0, (0,) * len(shape))
    return made


def no_more() -> None:
    """Nothing is left to do after the kernels."""
