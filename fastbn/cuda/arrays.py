"""GPU arrays as they come in: of which library, on which device, as CuPy arrays, and back. Nothing here reads what is on the GPU.

An array is looked at by CuPy's own attributes: its interface would ask the driver for the current stream each time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda import loading

Array = Any  # cupy.ndarray, or what is exchanged for one

# Arrays of others that can be had as CuPy arrays, and back, without a copy: (CuPy's function, module, its function for the way back).
# PyTorch's and CuPy's streams wait for each other in DLPack's exchange.
_EXCHANGES = {"torch": ("from_dlpack", "torch", "from_dlpack"), "numba": ("asarray", "numba.cuda", "as_cuda_array")}
_CONVERT = "cupy.asarray({0}), or cupy.from_dlpack({0})"


def is_gpu_array(a: object) -> bool:
    """Whether an array is on a GPU, by the interface that it offers. To be asked where ``type(a) is np.ndarray`` does not hold."""
    kind: Any = type(a)
    if _is_cupy(kind):
        return True
    try:
        return hasattr(a, "__cuda_array_interface__")
    except RuntimeError:  # a PyTorch tensor on a GPU that requires a gradient; what to do is said where it is converted
        return True


def kind_of(a: object) -> str:
    """The name of an array's type, such as "cupy.ndarray"."""
    return f"{_family(a)}.{type(a).__qualname__}".removeprefix("builtins.")


@lru_cache(maxsize=64)
def _is_cupy(kind: type[Any]) -> bool:
    """Whether a type is CuPy's array, not one derived from it: those may have no memory of their own."""
    return kind.__module__ == "cupy" and kind.__qualname__ == "ndarray"


def _family(a: object) -> str:
    """The library that an array is of: "cupy", "torch", "numba", or where its type is from."""
    kind: Any = type(a)
    return _family_of(kind)


@lru_cache(maxsize=64)
def _family_of(kind: type[Any]) -> str:
    roots = [base.__module__.partition(".")[0].removesuffix("_cuda") for base in kind.__mro__]
    return next((root for root in roots if root == "cupy" or root in _EXCHANGES), roots[0])


class Exchange(NamedTuple):
    """The way back to the library that a call's arrays came from."""

    function: Callable[[Array], Array]
    device: int

    def back(self, result: Array | None, *also: Array | None) -> Any:
        """A result in that library; None stays None.

        The exchange is what makes the other library wait for the kernels. So what was written in place, `also`, is exchanged for that
        alone.
        """
        device = loading.other_device(self.device)
        if device is not None:
            with device:  # its current stream is the one that is waited for
                return self.back(result, *also)
        exchanged = None if result is None else self.function(result)
        for a in also:
            if a is not None:
                self.function(a)
        return exchanged


def as_cupy(names: tuple[str, ...], arrays: tuple[Array | None, ...]) -> tuple[tuple[Array | None, ...], Exchange | None]:
    """A call's arrays as CuPy arrays of the same memory, and the way back where they are another library's. The first one is there.

    Raises
    ------
    TypeError
        For NumPy among GPU arrays, arrays of two kinds or on two devices, and what cannot be seen as a CuPy array.
    ImportError
        For CuPy arrays where numba-cuda is missing; names the extra to install.
    """
    first, x = names[0], arrays[0]
    kind: Any = type(x)
    cupy_alone = _is_cupy(kind)
    for name, a in zip(names, arrays, strict=True):
        if a is not None and not (cupy_alone and type(a) is kind):
            _check_kind(name, a, first, x)
    xp, way_back = _namespace(first, x), None
    if not isinstance(x, xp.ndarray):
        arrays, way_back = _exchange(xp, names, arrays)
        x = arrays[0]
    device = x.data.device_id  # type: ignore[union-attr]
    for name, a in zip(names, arrays, strict=True):
        if a is not None:
            check_device(name, a, first, device)
    return arrays, None if way_back is None else Exchange(way_back, device)


def check_device(name: str, a: Array, first: str, device: int) -> None:
    """TypeError for a CuPy array that is on another device than the one that is called `first`."""
    if a.data.device_id != device:
        raise TypeError(
            f"{name} is on device {a.data.device_id} and {first} on device {device}; nothing is moved between them silently: "
            f"copy one, with cupy.cuda.Device({device}): {name} = cupy.array({name})"
        )


def _check_kind(name: str, a: Array, first: str, x: Array) -> None:
    """TypeError for an array of another kind than x's."""
    if _family(a) == _family(x) and is_gpu_array(a) and is_gpu_array(x):
        return
    kinds = f"{name} is a {kind_of(a)} and {first} is a {kind_of(x)} on a GPU"
    if isinstance(a, np.ndarray) and not is_gpu_array(a):
        raise TypeError(f"{kinds}; nothing is moved silently: pass cupy.asarray({name}), or {first} as NumPy, cupy.asnumpy({first})")
    raise TypeError(f"{kinds}; all arrays of a call are of one kind: pass {_CONVERT.format(name)}, and {first} likewise")


def _namespace(name: str, x: Array) -> Any:
    """CuPy, in which outputs and workspace are made."""
    try:
        return loading.kernels().arrays
    except ImportError as error:
        if _family(x) == "cupy":
            raise
        raise TypeError(
            f"{name} is a {kind_of(x)} on a GPU; fastbn takes NumPy arrays, and CuPy arrays on a GPU: pass {_CONVERT.format(name)}. "
            f"Neither works yet: {error}"
        ) from error


def _exchange(
    xp: Any, names: tuple[str, ...], arrays: tuple[Array | None, ...]
) -> tuple[tuple[Array | None, ...], Callable[[Array], Array]]:
    """Arrays of another library as CuPy arrays of the same memory, and the way back."""
    x = arrays[0]
    known = _EXCHANGES.get(_family(x))
    if known is None:
        raise TypeError(f"{names[0]} is a {kind_of(x)} on a GPU, which fastbn cannot give back in kind: pass {_CONVERT.format(names[0])}")
    to_cupy, module, back = known
    seen = []
    for name, a in zip(names, arrays, strict=True):
        try:
            seen.append(None if a is None else getattr(xp, to_cupy)(a))
        except Exception as error:  # dtypes and layouts that CuPy does not have, tensors that require a gradient: each its own error
            raise TypeError(
                f"{name}, a {kind_of(a)}, cannot be had as a CuPy array ({error}): pass {_CONVERT.format(name)}, of a tensor that "
                "requires no gradient, of float32, float64 or float16"
            ) from error
    way_back: Callable[[Array], Array] = getattr(importlib.import_module(module), back)
    return tuple(seen), way_back
