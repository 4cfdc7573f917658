"""What a forward leaves for its backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.kernels.rows import INVSTD, MEAN, VAR

Array = NDArray[Any]


@dataclass(eq=False)
class Context:
    """A forward's statistics, and all that its backward needs. Made by `batch_norm_forward`.

    It holds x by reference and copies nothing of its size.

    Attributes
    ----------
    mean, var, invstd : array, (C,), float64
        What x was normalised with: mean, biased variance, 1 / sqrt(var + eps). Read-only.
    count : float
        Values a channel, or the sum of the sample weights.
    x : array
        The input itself. Change it before the backward and the gradients are wrong.
    axis : int
        The channel axis, from the front.
    training : bool
        False: the statistics were given and are constants for the backward.
    has_residual, relu : bool
        What the forward added and applied.
    """

    x: Array
    axis: int
    training: bool
    count: float
    has_residual: bool
    relu: bool
    gamma_dtype: np.dtype[Any] | None
    beta_dtype: np.dtype[Any] | None
    table: Array  # rows as in kernels/cpu/channels.py
    state: Any  # the backend's: cpu.State or its GPU counterpart; None if x is empty

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
        mode = "training" if self.training else "frozen"
        return f"Context({mode}, x: {self.x.dtype} {self.x.shape}, axis={self.axis}, count={self.count:g})"
