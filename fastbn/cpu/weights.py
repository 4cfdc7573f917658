"""Sample weights as the kernels read them, and the sums of them that the moments need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.common.axes import weights_in_order
from fastbn.common.facts import Seen
from fastbn.cpu import dispatch, layout
from fastbn.cpu.dispatch import Schedule
from fastbn.cpu.layout import Layout
from fastbn.cpu.memory import PLACES, Frame

Array = NDArray[Any]

# Weights that are counted at a time, to find three places among the positive ones.
COUNTED = 4096
# The optional argument that weights are: of every position in float64, of whole rows or planes, of every position in float32.
WEIGHT_KINDS = ("weight", "row_weight", "narrow_weight")


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
    shift_places: tuple[tuple[int, int], ...]
    values: Array
    times: int

    @property
    def effective(self) -> float:
        """Their effective number, sum(w)**2 / sum(w**2)."""
        largest = float(self.values.max(initial=0.0)) or 1.0
        part = np.divide(self.values, largest, dtype=np.float64)  # squares of these neither overflow nor vanish
        np.square(part, out=part)
        return (self.total / largest) ** 2 / (self.times * float(part.sum()) or 1.0)

    def are_a_mask(self) -> bool:
        """Whether their effective number is their sum, as it is of weights of 0 and 1."""
        return self.total == self.effective


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


def _by_sample(w: Seen, f: Frame) -> bool:
    """Whether weights are (N,), and a sample's positions lie side by side in memory."""
    return w.shape != f.shape[: f.axis] + f.shape[f.axis + 1 :] and f.axis != 0 and f.layout.order[0] == 0


def kind_of(w: Seen | None, f: Frame) -> str | None:
    """Which of WEIGHT_KINDS weights of these facts are for data of a frame."""
    if w is None:
        return None
    if f.layout.S == 1 or _by_sample(w, f):
        return "row_weight"
    return "narrow_weight" if np.can_cast(w.dtype, np.float32) else "weight"


def span(weight: Array) -> tuple[float, float] | None:
    """The smallest and the largest weight, both NaN where one is; None where that says nothing.

    Three arrays of 32x56x56 weights, as a test of each would make, cost more than the test.
    """
    if weight.dtype.kind == "b" or not weight.size:
        return None
    with np.errstate(invalid="ignore"):  # bfloat16's minimum warns of NaN
        return float(weight.min()), float(weight.max())


def weigh(sample_weight: Array, seen: Seen, f: Frame) -> Weights:
    """Weights, (N,) or x's shape without the channel axis, in the order of x's layout."""
    p, kind = f.layout, kind_of(seen, f)
    by_sample = _by_sample(seen, f)
    if not by_sample:
        sample_weight = weights_in_order(np, sample_weight, f.shape, f.axis, p.order)
    # Always a copy: the context keeps the weights, and what the user holds may be written before the backward, by its `out` too.
    array: Array = np.array(sample_weight, dtype=np.float32 if kind == "narrow_weight" else np.float64, order="C").reshape(-1)
    times = math.prod(f.shape[1:]) // p.C if by_sample else 1  # positions that share a weight
    positive, chosen = _positive(array)
    places = tuple(divmod(int(k) * times, max(p.S, 1)) for k in chosen)
    with np.errstate(over="ignore"):
        total = times * float(array.sum(dtype=np.float64))
    values = array
    if by_sample:
        array = np.repeat(array, p.N // max(array.size, 1))
    elif p.S > 1:
        array = array.reshape(p.N, p.S)
        if p.family == "columns":
            array = np.take(array, np.arange(p.S + layout.LANES) % p.S, axis=1)
    assert kind is not None
    return Weights(array, kind, total, times * positive, places, values, times)


def block_totals(weights: Weights, p: Layout, s: Schedule) -> Array:
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
    totals: Array = times * np.add.reduceat(values, np.arange(0, p.N * row, s.shape.block * row), dtype=np.float64)
    return totals
