"""Running statistics: moved last, all or nothing."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import cpu

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
