"""How kernels read and write the arrays of a GPU call: in place, or through contiguous, aligned copies on the GPU.

Twin: fastbn/cpu/memory.py. What is decided here follows from shapes, strides, dtypes and addresses modulo 16, never from what lies in
memory, so a plan decides it once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastbn.common import axes
from fastbn.common.facts import BOUNDARY, Seen
from fastbn.cuda import loading
from fastbn.cuda.memory import flat

Array = Any


def seen(facts: tuple[Any, ...]) -> Seen:
    """The facts of a CuPy array, from its (shape, strides, dtype, address modulo 16, whether it can be written)."""
    return Seen(*facts)


def _plain(a: Array) -> bool:
    """Whether kernels, CuPy's too, can read an array's single elements."""
    return Seen(a.shape, a.strides, a.dtype, a.data.ptr % BOUNDARY).plain


def _bytes(a: Array) -> Array:
    """a's memory byte by byte, (..., itemsize), from the lowest to the highest: what can be copied from and to anywhere."""
    arrays = loading.kernels().arrays
    view = arrays.ndarray((*a.shape, a.dtype.itemsize), np.uint8, a.data, strides=(*a.strides, 1))
    return view if a.dtype.isnative else view[..., ::-1]


def native_copy(a: Array) -> Array:
    """A C-contiguous copy, in native byte order.

    An element off its boundary is read byte by byte: CuPy's own kernels would stop at it with an error that no later call survives.
    """
    if _plain(a):
        return a.copy(order="C")
    return _bytes(a).copy(order="C").view(a.dtype.newbyteorder("=")).reshape(a.shape)


def assign(to: Array, values: Array) -> None:
    """to[...] = values of the same kind, wherever `to` lies and in whatever byte order."""
    if _plain(to):
        to[...] = values
    else:
        _bytes(to)[...] = _bytes(values.astype(to.dtype.newbyteorder("="), copy=False))


class Layout:
    """How the kernels read data of a shape, strides and axis: as contiguous (N, C, S), in its order of axes in memory.

    Attributes
    ----------
    order, inverse : tuple of int, or None
        The axes as they lie in memory, and how to transpose them back; None where they lie as they are counted.
    shape : (N, C, S)
        S == 1: rows of channels.
    stored : np.dtype
        What copies and results are made in: bfloat16 as uint16, all in native byte order.
    storage : str or None
        What kernels take elements as, if not as themselves.

    Raises
    ------
    ValueError
        For more values than kernels can count.
    """

    def __init__(self, x: Seen, axis: int, dtype: str) -> None:
        self.full = x.shape
        self.order = axes.axis_order(x.shape, x.strides)
        self.shape = N, C, S = axes.rows_channels_values(self.order, axis, x.shape)
        if max(N, C, S) >= 2**31 or N * S >= 2**32:
            raise ValueError(f"shape (N, C, S) is {self.shape}; N, C and S are below 2**31 and N * S below 2**32. Split the batch")
        self.inverse = axes.inverse(self.order)
        self.in_memory = tuple(x.shape[a] for a in self.order)
        self.dtype = x.dtype
        self.bits = dtype == "bfloat16"
        self.stored = np.dtype(np.uint16) if self.bits else x.dtype.newbyteorder("=")
        self.storage = "uint16" if dtype in ("float16", "bfloat16") else None
        self._dense = axes.dense_strides(self.order, x.shape, x.dtype.itemsize)

    def fits(self, a: Seen) -> bool:
        """Whether kernels can read and write an array in place: without gaps, in this order, element by element."""
        return a.plain and all(s == dense for s, dense, n in zip(a.strides, self._dense, self.full, strict=True) if n > 1)

    def _in_order(self, a: Array) -> Array:
        """A view whose axes lie in memory in this layout's order, bfloat16 as uint16."""
        view = a if self.inverse is None else a.transpose(self.order)
        return view.view(np.uint16) if self.bits else view

    def read(self, a: Array, direct: bool) -> Any:
        """An input as kernels take it: itself if `direct`, which is what `fits` said, else a copy."""
        return flat(a if direct else native_copy(self._in_order(a)), self.storage, dense=True)

    def written(self, out: Array | None, direct: bool) -> tuple[Array, Any, Callable[[], None]]:
        """(array to return, what the kernels write, what to call afterwards). `out` is written in place if `direct`."""
        if out is not None and direct:
            return out, flat(out, self.storage, dense=True), no_more
        empty = loading.kernels().arrays.empty
        made = empty(self.in_memory, self.stored)
        written = flat(made, self.storage, dense=True)
        if out is None and self.dtype.isnative:
            y = made.view(self.dtype) if self.bits else made
            return y if self.inverse is None else y.transpose(self.inverse), written, no_more
        if out is None:  # y has x's dtype, byte order included
            out = empty(self.in_memory, self.dtype)
            out = out if self.inverse is None else out.transpose(self.inverse)
        given = out
        return given, written, lambda: assign(self._in_order(given), made)


class Channels(NamedTuple):
    """How kernels take per-channel arrays, which are all of one dtype: those named in `direct` in place, others through a copy."""

    dtype: np.dtype[Any]
    direct: frozenset[str]

    def read(self, a: Array | None, name: str) -> Any:
        """An array as kernels take it, None for None."""
        if a is None:
            return None
        return flat(a if name in self.direct else native_copy(a).astype(self.dtype, copy=False), dense=True)


def channels(vectors: dict[str, Seen]) -> Channels:
    """Per-channel arrays of one group, such as gamma and beta: float64 where they are of two dtypes."""
    found = {v.dtype.newbyteorder("=") for v in vectors.values()}
    dtype = np.dtype(np.float64) if len(found) > 1 else next(iter(found), np.dtype(np.float32))
    step = dtype.itemsize
    fitting = (name for name, v in vectors.items() if v.dtype == dtype and v.plain and (v.shape[0] <= 1 or v.strides[0] == step))
    return Channels(dtype, frozenset(fitting))


def no_more() -> None:
    """Nothing is left to do after the kernels."""
