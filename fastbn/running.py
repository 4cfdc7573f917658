"""What a layer has learnt is written all or nothing: running statistics after a forward, and what a checkpoint replaces."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import backend as cpu

Array = NDArray[Any]


def correction(n: float) -> float:
    """n / (n - 1); infinite, so that running_var is left alone, where all but one weight are vanishingly small."""
    return n / (n - 1.0) if n > 1.0 else float("inf")


def _outside() -> int:
    """The stacklevel of the first caller that is not fastbn, for a warning in the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastbn":
        frame, level = frame.f_back, level + 1
    return level


def update(table: Array, mean: Array, var: Array, momentum: float, correction: float) -> None:
    """The last step of training: all channels, or all but those that are not finite."""
    if mean.dtype == var.dtype and mean.dtype.isnative and mean.flags.aligned and var.flags.aligned:
        new_mean, new_var = mean, var
    else:
        common = np.result_type(mean, var).newbyteorder("=")
        new_mean, new_var = mean.astype(common), var.astype(common)
    single = mean.itemsize == 4 or var.itemsize == 4
    limit = cpu.LARGEST["float32" if single else "float64"]
    before = mean.copy(), var.copy()
    try:
        skipped = cpu.update_running(table, new_mean, new_var, momentum, correction, limit, False)
        if skipped:
            if correction < math.inf:
                dtype = "float32" if single else "float64"
                reason = f"{skipped} of {len(mean)} channels have statistics that are not finite in {dtype}; their"
            else:
                reason = "all but one of the sample weights are vanishingly small, which leaves no unbiased variance;"
            warnings.warn(f"{reason} running statistics stay as they were", RuntimeWarning, stacklevel=_outside())
            cpu.update_running(table, new_mean, new_var, momentum, correction, limit, True)
        if new_mean is not mean:
            mean[...], var[...] = new_mean, new_var
    except BaseException:  # Ctrl-C among them, which may strike after the kernel has returned
        mean[...], var[...] = before
        raise


def overwrite(layer: object, values: Mapping[str, Any]) -> None:
    """Write into the layer's arrays of these names, and set its numbers: all of it, or on any exception nothing.

    Raises
    ------
    ValueError
        For an array of the layer that is read-only.
    """
    old = {field: getattr(layer, field) for field in values}
    arrays = {field: a for field, a in old.items() if getattr(a, "ndim", 0)}
    for field, a in arrays.items():
        if not getattr(a.flags, "writeable", True):  # CuPy knows no read-only arrays
            raise ValueError(f"the layer's {field} is read-only, but is written in place; set bn.{field} = bn.{field}.copy()")
    before = old | {field: a.copy() for field, a in arrays.items()}

    def write(new: Mapping[str, Any]) -> None:
        for field, value in new.items():
            if field in arrays:
                arrays[field][...] = value
            else:
                setattr(layer, field, value)

    try:
        write(values)
    except BaseException:  # Ctrl-C among them
        write(before)
        raise
