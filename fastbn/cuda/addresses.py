"""Whether GPU arrays share memory, told from their addresses and strides alone."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from fastbn.common.facts import Seen
from fastbn.cuda.plan import GpuPlan

Array = Any  # cupy.ndarray


def separate(plan: GpuPlan, arrays: tuple[Array | None, ...]) -> bool:
    """Whether the arrays of a plan's call share no memory for certain; False where that takes a closer look."""
    starts = [a.data.ptr for a in arrays if a is not None]
    spans = sorted([(start + low, start + high) for start, (low, high) in zip(starts, plan.reach, strict=True)])
    return all(a[1] <= b[0] for a, b in pairwise(spans))


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; True if that cannot be told quickly."""
    (low, high), (begin, end) = _span(a), _span(b)
    if high <= begin or end <= low:
        return False
    # NumPy solves this from addresses and strides, without looking at what is there. These arrays never leave this function.
    here, there = np.asarray(_Addresses(a)), np.asarray(_Addresses(b))
    try:
        return np.shares_memory(here, there, max_work=10_000)  # type: ignore[arg-type]  # any work bound is allowed, the stub knows two
    except np.exceptions.TooHardError:
        return True


def same_place(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return bool(a.data.ptr == b.data.ptr and a.strides == b.strides and a.shape == b.shape)


def _span(a: Array) -> tuple[int, int]:
    """The first address of an array's memory, and the one behind the last."""
    start, (low, high) = a.data.ptr, _reach(a.shape, a.strides, a.dtype)
    return start + low, start + high


@lru_cache(maxsize=1024)
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
    return Seen(shape, strides, dtype).reach


class _Addresses:
    """A range of GPU addresses, to be asked for overlaps only."""

    def __init__(self, a: Array) -> None:
        data = {"typestr": f"|V{a.dtype.itemsize}", "data": (a.data.ptr, True)}
        self.__array_interface__ = {"version": 3, "shape": a.shape, "strides": a.strides, **data}
