"""CuPy and the kernels' modules, loaded by the first call that needs them: importing fastbn imports neither CuPy nor Numba."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

INSTALL = 'install it with pip install "fastbn[cuda13]" (CUDA 13) or pip install "fastbn[cuda12]" (CUDA 12)'


@dataclass(frozen=True)
class Kernels:
    """Modules: `arrays` is CuPy, or NumPy in the simulator; the others are those of kernels/cuda."""

    arrays: Any
    simulated: bool
    channels: Any
    launch: Any
    plan: Any
    variants: Any


@functools.cache
def kernels() -> Kernels:
    """The modules of the kernels and the arrays.

    Raises
    ------
    ImportError
        Where numba-cuda or CuPy is missing, or Numba has only its bundled CUDA target; names the extra to install.
    """
    target = importlib.import_module("fastbn.kernels.cuda.target")
    target.require_target()
    if target.SIMULATED:
        arrays: Any = np
    else:
        if importlib.util.find_spec("cupy") is None:
            raise ImportError(f"arrays on a GPU need CuPy, which is not installed; {INSTALL}")
        arrays = importlib.import_module("cupy")
    names = ("channels", "launch", "plan", "variants")
    loaded = {name: importlib.import_module(f"fastbn.kernels.cuda.{name}") for name in names}
    return Kernels(arrays=arrays, simulated=target.SIMULATED, **loaded)


def other_device(device: int) -> AbstractContextManager[Any] | None:
    """A context in which a device is the current one; None where it is already."""
    cuda = kernels().arrays.cuda
    return None if cuda.runtime.getDevice() == device else cuda.Device(device)


Function = TypeVar("Function", bound=Any)


def on_device(function: Function) -> Function:
    """A function of a plan and an array that runs with the array's device as the current one: its current stream takes the kernels."""

    @functools.wraps(function)
    def on_its_device(plan: Any, x: Any, *rest: Any) -> Any:
        device = other_device(x.data.device_id)
        if device is None:
            return function(plan, x, *rest)
        with device:
            return function(plan, x, *rest)

    return cast(Function, on_its_device)
