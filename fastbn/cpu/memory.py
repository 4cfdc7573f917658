"""NumPy arrays as the kernels read and write them: strides under a plan, copies where there must be one, outputs, sample weights.

Nothing of x's size is made, but for the outputs and for inputs whose strides or byte order the kernels cannot take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import dispatch, layout
from fastbn.cpu.dispatch import Schedule
from fastbn.cpu.layout import Plan

Array = NDArray[Any]
Tensor = tuple[Array, int, int]

LINE = 64
# Where in a channel the three values lie whose median is the shift of its moments, as shares of its length. They are irregular, as data is
# not: the first, middle and last value of an image are its border and its centre.
PLACES = np.array([0.303, 0.917, 0.539])
# Weights that are counted at a time, to find those places among the positive ones.
COUNTED = 4096
# The optional argument that weights are: of every position in float64, of whole rows or planes, of every position in float32.
WEIGHT_KINDS = ("weight", "row_weight", "narrow_weight")


class _Schedules(dict[tuple[int, bool, bool], Schedule]):
    """The schedule of (tensors, residual, training), made when it is first asked for."""

    def __init__(self, plan: Plan, itemsize: int) -> None:
        super().__init__()
        self.plan, self.itemsize = plan, itemsize

    def __missing__(self, key: tuple[int, bool, bool]) -> Schedule:
        self[key] = found = dispatch.schedule(self.plan, self.itemsize, *key)
        return found


class Frame:
    """How the arrays of one kind of call are read: the plan, and what follows from it. Made once for a shape, strides and axis.

    Attributes
    ----------
    shape, axis, dtype, itemsize, plan
        What it was made for, and `layout.plan` of it.
    size : int
        Values in an array.
    large : bool
        Whether an array is large enough to be streamed.
    schedules : mapping of (tensors, residual, training) to Schedule
        `dispatch.schedule` of such calls.
    in_memory, inverse : tuple of int
        The shape in memory's order, and how an array of it is transposed to `shape`; None if it need not be.
    """

    def __init__(self, shape: tuple[int, ...], axis: int, dtype: str, itemsize: int, plan: Plan) -> None:
        self.shape, self.axis, self.dtype, self.itemsize, self.plan = shape, axis, dtype, itemsize, plan
        self.size = plan.count * plan.C
        self.large = self.size * itemsize >= layout.STREAM_FROM
        self.in_memory = tuple(shape[a] for a in plan.order)
        self.inverse = layout.inverse(plan.order)
        self.schedules = _Schedules(plan, itemsize)
        self._strides: dict[tuple[int, ...], tuple[int, int] | None] = {}

    def strides(self, a: Array) -> tuple[int, int] | None:
        """(row stride, channel stride) of an array of this shape, or None where it must be copied first."""
        known = self._strides
        if a.strides not in known:
            known[a.strides] = layout.tensor_strides(self.plan, self.axis, a.shape, a.strides, a.itemsize)
        return known[a.strides]

    @cached_property
    def points(self) -> tuple[tuple[int, int], ...]:
        """Three places (n, s) in a channel, from which its shift is chosen."""
        p = self.plan
        return tuple(divmod(int(share * p.count), p.S) for share in PLACES)

    @cached_property
    def fresh_strides(self) -> tuple[int, int]:
        """(row stride, channel stride) of what `empty` makes."""
        strides = layout.dense_strides(self.plan.order, self.shape, self.itemsize)
        found = layout.tensor_strides(self.plan, self.axis, self.shape, strides, self.itemsize)
        assert found is not None
        return found

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


@dataclass(frozen=True)
class Weights:
    """Sample weights as the kernels read them: (N, S), or float64 (N,) where they are the same for all S positions.

    (N, S) are float32 where their dtype tells that this is exact, else float64. They are read once a channel, and the 800 kB of 32x56x56
    in float64 leave no room in the L2 cache for the channel: the forward of 32x64x56x56 takes 0.85 of the time with half of them.
    For columns the S positions of a row are followed by their first sixteen (again and again, if there are fewer).

    And their sum over all positions, how many are positive, and three places (n, s) where they are positive. `kind` is the name of the
    optional argument that they are. `values` are the weights without these repetitions, each for `times` positions.
    """

    array: Array
    kind: str
    total: float
    positive: int
    points: tuple[tuple[int, int], ...]
    values: Array
    times: int

    @cached_property
    def effective(self) -> float:
        """Their effective number, sum(w)**2 / sum(w**2)."""
        largest = float(self.values.max(initial=0.0)) or 1.0
        part = np.divide(self.values, largest, dtype=np.float64)  # squares of these neither overflow nor vanish
        np.square(part, out=part)
        return (self.total / largest) ** 2 / (self.times * float(part.sum()) or 1.0)


def address(a: Array) -> int:
    """The address of a[0, 0, ...]."""
    return a.__array_interface__["data"][0]  # type: ignore[no-any-return]


def native(x: Array) -> Array:
    """x itself, or a copy in native byte order at an aligned address."""
    if x.dtype.isnative and x.flags.aligned:
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="K")


@lru_cache(maxsize=1024)
def _frame(
    shape: tuple[int, ...], strides: tuple[int, ...], axis: int, dtype: str, itemsize: int, weighted: bool, inference: bool
) -> Frame:
    return Frame(shape, axis, dtype, itemsize, layout.plan(shape, strides, axis, itemsize, weighted, inference))


def frame_of(x: Array, axis: int, dtype: str, weighted: bool, inference: bool = False) -> Frame:
    """The frame for x, which is native."""
    return _frame(x.shape, x.strides, axis, dtype, x.itemsize, weighted, inference)


def readable(a: Array, f: Frame) -> Tensor:
    """A tensor the kernels can read under the frame's plan: `a` itself if possible."""
    a = native(a)
    strides = f.strides(a)
    if strides is None:
        copy = f.empty(a.dtype)
        copy[...] = a
        a, strides = copy, f.fresh_strides
    return a, strides[0], strides[1]


def writable(out: Array | None, dtype: np.dtype[Any], f: Frame) -> tuple[Array, Tensor, Array | None]:
    """(array to return, tensor to write, array to copy from afterwards or None).

    Without `out` a new array of `dtype` in x's memory order; a new one too where the kernels cannot write `out` directly.
    """
    if out is None and dtype.isnative:
        y = f.empty(dtype)
        return y, (y, *f.fresh_strides), None
    if out is not None and out.dtype.isnative and out.flags.aligned:
        strides = f.strides(out)
        if strides is not None:
            return out, (out, *strides), None
    made = f.empty(dtype.newbyteorder("="))
    if out is None:  # y has x's dtype, byte order included
        out = f.empty(dtype)
    return out, (made, *f.fresh_strides), made


def _positive(weights: Array) -> tuple[int, list[int]]:
    """How many weights are positive, and where three of them are, at `PLACES` among them; 0 where there are none.

    No long list of all such places is made, eight bytes each: of 32x56x56 weights it took 0.2 ms and more. A short one is the
    shortest way: 4 us against 14.
    """
    positive = weights > 0.0
    short = positive.size <= COUNTED
    if short:
        places = positive.nonzero()[0]
        count = places.size
    else:
        ends = np.cumsum([np.count_nonzero(positive[k : k + COUNTED]) for k in range(0, positive.size, COUNTED)])
        count = int(ends[-1])
    if count == 0:
        return 0, [0] * len(PLACES)
    ranks = (PLACES * count).astype(np.intp)  # how many come before
    if short:
        return count, places[ranks].tolist()
    chosen = []
    for rank in ranks:
        piece = int(np.searchsorted(ends, rank, side="right"))
        start = piece * COUNTED
        before = int(ends[piece - 1]) if piece else 0
        chosen.append(start + int(positive[start : start + COUNTED].nonzero()[0][rank - before]))
    return count, chosen


def weights_of(sample_weight: Array, f: Frame) -> Weights:
    """Checked weights, (N,) or x's shape without the channel axis, in the order of the plan.

    Raises
    ------
    ValueError
        Where their sum is infinite.
    """
    p = f.plan
    shape = f.shape[: f.axis] + f.shape[f.axis + 1 :]
    by_sample = sample_weight.shape != shape and f.axis != 0 and p.order[0] == 0  # a sample's positions lie side by side
    if not by_sample:
        sample_weight = layout.weights_in_order(np, sample_weight, f.shape, f.axis, p.order)
    narrow = not by_sample and p.S > 1 and np.can_cast(sample_weight.dtype, np.float32)
    array: Array = np.ascontiguousarray(sample_weight, dtype=np.float32 if narrow else np.float64).reshape(-1)
    times = math.prod(shape[1:]) if by_sample else 1  # positions that share a weight
    positive, chosen = _positive(array)
    points = tuple(divmod(int(k) * times, max(p.S, 1)) for k in chosen)
    with np.errstate(over="ignore"):
        total = times * float(array.sum(dtype=np.float64))
    if not total < math.inf:
        raise ValueError("sample_weight has a sum beyond the range of float64; divide the weights by their largest")
    values = array
    if by_sample:
        array = np.repeat(array, p.N // max(array.size, 1))
    elif p.S > 1:
        array = array.reshape(p.N, p.S)
        if p.family == "columns":
            array = np.take(array, np.arange(p.S + layout.LANES) % p.S, axis=1)
    kind = "row_weight" if array.ndim == 1 else "narrow_weight" if narrow else "weight"
    return Weights(array, kind, total, times * positive, points, values, times)


def block_totals(weights: Weights, p: Plan, s: Schedule) -> Array:
    """The sum of the weights in each block of a schedule.

    NumPy adds in pairs. One after the other, 65,536 weights of 0.1 are off by 1e-12, and float64's statistics with them.
    """
    if weights.kind == "row_weight":
        values, row, times = weights.array, 1, p.S
    else:
        values, row, times = weights.values, p.S, 1
    if p.family == "planes" and dispatch.BLOCK < p.S:  # segments of planes
        starts = np.arange(0, p.S, dispatch.BLOCK)
        if row == 1:
            return np.outer(values, np.diff(starts, append=p.S)).reshape(-1)
        return np.add.reduceat(values.reshape(p.N, p.S), starts, axis=1, dtype=np.float64).reshape(-1)
    totals: Array = times * np.add.reduceat(values, np.arange(0, p.N * row, s.rows_a_block * row), dtype=np.float64)
    return totals


def streamed(y: Tensor, f: Frame, with_mask: bool) -> bool:
    """Whether a large output is written around the cache: rows keep the alignment that this needs."""
    p = f.plan
    if p.family == "planes":
        return True
    boundary = min(LINE, layout.LANES * f.itemsize)
    return y[1] * f.itemsize % boundary == 0 and not (with_mask and address(y[0]) % boundary)


def both_streamed(dx: Tensor, dresidual: Tensor | None, f: Frame) -> bool:
    """The same of dx and dresidual: where one vector is aligned, so must be the other."""
    if not streamed(dx, f, False):
        return False
    return dresidual is None or (dx[1] == dresidual[1] and (address(dx[0]) - address(dresidual[0])) % LINE == 0)
