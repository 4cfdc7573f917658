"""Sample weights as the kernels read them, computed on the GPU: nothing is waited for. Twin: fastbn/cpu/weights.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.common.axes import weights_in_order
from fastbn.cuda import loading
from fastbn.cuda.layout import Layout, native_copy
from fastbn.cuda.memory import flat

Array = Any

# The arguments of kernels that have no weights.
UNWEIGHTED = {"weight": None, "counts": None, "weight_n": 0, "weight_s": 0}


class Weights:
    """Sample weights as kernels/cuda/weights.py reads them.

    Attributes
    ----------
    positive, total : None
        How many are above 0, and their sum, as far as they are known without waiting: not.
    count : array of no dimensions, float64
        Their sum, on the GPU.
    """

    positive = total = None

    def __init__(self, w: Array, plain: bool, layout: Layout, axis: int, compute: str) -> None:
        (N, _, S), (order, full) = layout.shape, (layout.order, layout.full)
        self._mask = w.dtype.kind == "b"
        w = w if plain else native_copy(w)
        # A sample's weight stands for all its positions where they lie side by side, in runs of rows of N: (1, C, S) or (rows, C, 1).
        by_sample = w.shape == (full[:1] if axis else full[1:2]) and order[0] == 0 and (S == 1 or w.size == N)
        if not by_sample:
            w = weights_in_order(loading.kernels().arrays, w, full, axis, order)
        weight = w.reshape(-1).astype(compute)
        if S == 1 and weight.size < N:
            weight = loading.kernels().arrays.repeat(weight, N // weight.size)
        each = S if weight.size == N else 1  # values that a weight stands for
        wide = weight.astype(np.float64)
        self.count, self._squares = wide.sum() * each, (wide * wide).sum() * each
        self._given: dict[str, Any] = {"weight": flat(weight), "weight_n": S // each, "weight_s": 1 if each == 1 else 0}

    def arguments(self, unbiased: bool = False) -> dict[str, Any]:
        """The arguments of a kernel, by name; with the factor n / (n - 1) of running_var if `unbiased`.

        The first call decides that. It is a forward's, whose backwards do not look at the factor.
        """
        if "counts" not in self._given:
            self._given["counts"] = flat(loading.kernels().arrays.stack([self.count, self.correction(unbiased)]))
        return self._given

    def correction(self, unbiased: bool) -> Array:
        """n / (n - 1), or 1, n being their effective number: sum(w)**2 / sum(w**2)."""
        if not unbiased:
            return loading.kernels().arrays.ones_like(self.count)
        square = self.count * self.count
        return square / (square - self._squares)

    def are_a_mask(self) -> bool:
        """Whether their effective number is their sum, as it is of weights of 0 and 1. Waits for the GPU, unless they are of bool."""
        return self._mask or bool(self.count == self._squares)
