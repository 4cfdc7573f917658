"""What calls that are alike have in common: the part of a plan that does not depend on the device."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from fastbn.common.facts import Seen


class Plan:
    """All checks that need no value and no address have been made, and what follows from the arrays' facts is worked out.

    A plan holds no array and no address, so it is cached for all calls that are alike (fastbn/arguments/plans.py). Each backend adds
    how its kernels read the arrays and which of them run: `fastbn.cpu.plan.CpuPlan`, `fastbn.cuda.plan.GpuPlan`.

    Attributes
    ----------
    operation : str
        "forward", "inference", "moments", "forward_apply", or of a backward "backward", "reduce", "apply".
    seen : mapping of str to Seen
        The arrays that were given, by name.
    shape, axis, dtype : tuple of int, int, str
        x's; axis counts from the front, dtype is a name.
    C, count : int
        Channels, and values of each.
    empty : bool
        x has no values: no kernel runs.
    training, relu : bool
        Statistics are x's own (or the batch's, for a part of it); a ReLU is applied.
    has_residual, weighted : bool
        The forward had a residual, sample weights.
    moves : bool
        Running statistics are updated.
    key : tuple
        What a plan is made of: a pickled one is made anew.
    forward : Plan or None
        A backward's: the plan of its forward.
    backwards : dict
        A forward's: the plans of the backwards that followed, by what was seen of their arrays.
    """

    backend: Any  # the module whose functions take this plan
    weighted: bool  # sample weights were given, to the forward where this is a backward's

    def __init__(
        self, operation: str, key: tuple[Any, ...], seen: Mapping[str, Seen], axis: int, dtype: str, training: bool, relu: bool,
        forward: Plan | None = None,
    ) -> None:  # fmt: skip
        self.operation, self.key, self.seen, self.forward = operation, key, seen, forward
        self.shape, self.axis, self.dtype = seen["x"].shape, axis, dtype
        self.C = self.shape[axis]
        self.count = prod(self.shape) // self.C if self.C else 0
        self.empty = self.count == 0
        self.training, self.relu = training, relu
        self.has_residual = "residual" in seen
        self.moves = training and "running_mean" in seen  # running statistics are updated
        self.backwards: dict[Any, Any] = {}

    def dtype_of(self, name: str) -> np.dtype[Any] | None:
        """The dtype of an array that was given, or None."""
        return self.seen[name].dtype if name in self.seen else None
