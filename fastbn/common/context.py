"""What a forward leaves for its backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.common.plan import Plan
from fastbn.kernels.rows import INVSTD, MEAN, VAR

Array = Any  # NumPy's or CuPy's


class Context:
    """A forward's statistics, and all that its backward needs. Made by `batch_norm_forward`.

    It holds x by reference and copies nothing of its size.

    Attributes
    ----------
    mean, var, invstd : array, (C,), float64
        What x was normalised with: mean, biased variance, 1 / sqrt(var + eps). On x's device; NumPy's are read-only.
    count : float
        Values a channel, or the sum of the sample weights: on a GPU then an array of no dimensions.
    x : array
        The input itself. Change it before the backward and the gradients are wrong.
    axis : int
        The channel axis, from the front.
    training : bool
        False: the statistics were given and are constants for the backward.
    has_residual, relu : bool
        What the forward added and applied.
    """

    __slots__ = ("count", "mask", "plan", "table", "weights", "x")

    def __init__(self, x: Array, plan: Plan, count: Any, table: Array, mask: Any = None, weights: Any = None) -> None:
        self.x, self.plan, self.count = x, plan, count
        self.table = table  # rows as in kernels/rows.py
        self.mask, self.weights = mask, weights  # the backend's: which values the ReLU passed, sample weights as kernels read them

    @property
    def axis(self) -> int:
        return self.plan.axis

    @property
    def training(self) -> bool:
        return self.plan.training

    @property
    def has_residual(self) -> bool:
        return self.plan.has_residual

    @property
    def relu(self) -> bool:
        return self.plan.relu

    @property
    def mean(self) -> Array:
        return self._row(MEAN)

    @property
    def var(self) -> Array:
        return self._row(VAR)

    @property
    def invstd(self) -> Array:
        return self._row(INVSTD)

    def _row(self, row: int) -> Array:
        view: Array = self.table[row]
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
        return view

    def __repr__(self) -> str:
        mode, shape = "training" if self.training else "frozen", tuple(self.x.shape)
        return f"Context({mode}, x: {self.x.dtype} {shape}, axis={self.axis}, count={float(self.count):g})"
