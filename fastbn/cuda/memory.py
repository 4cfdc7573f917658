"""Arrays as kernels take them: pointers of contiguous memory, and the tables that a call makes for itself.

Arrays are CuPy's or anything else with ``__cuda_array_interface__``; in the simulator NumPy arrays.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastbn.cuda import loading

Array = Any


def interface(x: Array) -> dict[str, Any]:
    """What an array of any library says of its memory."""
    found = getattr(x, "__cuda_array_interface__", None)
    if found is None and loading.kernels().simulated:
        found = getattr(x, "__array_interface__", None)
    if found is None:
        raise TypeError(f"{type(x).__name__} is not in GPU memory; move it there with cupy.asarray(x)")
    return dict(found)


def is_compact(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> bool:
    """Whether an array fills its memory without gaps, in whatever order of axes (channels last is a permuted (N, C, H, W))."""
    expected = itemsize
    for stride, length in sorted((s, n) for s, n in zip(strides or (), shape, strict=False) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def flat(x: Array, storage: str | None = None, dense: bool = False) -> Any:
    """x as the 1-D array that kernels take: a NumPy view in the simulator, else pointer and size; half types as `storage`.

    Raises
    ------
    TypeError
        For what is not in GPU memory.
    ValueError
        For gaps, unless the caller knows that x is `dense`, and for elements off their boundary, at which a kernel would fail in a way
        that no later call survives.
    """
    kernel = loading.kernels()
    if kernel.simulated:
        interface(x)
        view = x.ravel(order="K")
        if x.size and not np.shares_memory(view, x):
            raise ValueError("GPU kernels need contiguous data; pass numpy.ascontiguousarray(x)")
        pointer, itemsize = int(interface(view)["data"][0]), view.itemsize
        found = view if storage is None or view.dtype == storage else view.view(storage)
    else:
        if type(x) is kernel.arrays.ndarray:
            pointer, size, itemsize, typestr = x.data.ptr, x.size, x.itemsize, x.dtype.str
            dense = dense or x.flags.c_contiguous or is_compact(x.shape, x.strides, itemsize)
        else:
            seen = interface(x)
            pointer, size, typestr = int(seen["data"][0]), math.prod(seen["shape"]), str(seen["typestr"])
            itemsize = np.dtype(typestr).itemsize
            dense = dense or is_compact(seen["shape"], seen.get("strides"), itemsize)
        if not dense:
            raise ValueError(f"GPU kernels need contiguous data, not shape {x.shape} with gaps or negative strides; copy it")
        typestr = "<u2" if storage is not None and itemsize == 2 else typestr
        found = kernel.launch.DeviceArray(pointer, size, itemsize, typestr, x)
    if pointer % itemsize:
        raise ValueError(f"GPU kernels need elements at multiples of their {itemsize} bytes, not at address {pointer:#x}; copy the array")
    return found


@functools.cache
def nothing(device: int) -> Any:
    """The empty array that stands for an absent one."""
    return flat(loading.kernels().arrays.empty(0, "float32"))


def tables(rows: int, columns: int, more: int, dtype: str) -> tuple[Array, Any, Any]:
    """(float64 array (rows, columns), it and `more` rows of `dtype` as kernels take them): one allocation, as each costs a microsecond.

    The array has the extra rows behind the others (`extra_rows`); `dtype` is float32 or float64.
    """
    kernel = loading.kernels()
    itemsize = 4 if dtype == "float32" else 8
    table = kernel.arrays.empty((rows + -(-more * itemsize // 8), columns), np.float64)
    whole = flat(table, dense=True)
    if kernel.simulated:
        return table, whole[: rows * columns], whole[rows * columns :].view(dtype)[: more * columns]
    made = kernel.launch.DeviceArray
    first = made(whole.pointer, rows * columns, 8, "<f8", table)
    return table, first, made(whole.pointer + 8 * rows * columns, more * columns, itemsize, f"<f{itemsize}", table)


def extra_rows(table: Array, rows: int, more: int, dtype: str) -> Array:
    """The extra rows of what `tables` made, as an array (more, columns)."""
    columns = table.shape[1]
    return table[rows:].reshape(-1).view(dtype)[: more * columns].reshape(more, columns)
