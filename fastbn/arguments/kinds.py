"""Which backend a call's arrays belong to, and what else is taken: NumPy's subclasses, GPU arrays of other libraries."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.cuda.arrays import Exchange, as_cupy, is_gpu_array, kind_of

Array = Any

# What to do with a masked array; for what is not listed, _UNMASKED.
_UNMASK = {
    "x": "pass x.data, and the mask as sample_weight=~mask if it covers whole positions",
    "sample_weight": "pass sample_weight.filled(0), which gives what is masked no weight",
    "out": "pass out.data",
}
_UNMASKED = "pass {0}.data, which ignores the mask, or {0}.filled(value)"


def plain_array(a: Any, name: str) -> np.ndarray[Any, Any]:
    """A NumPy array, with subclasses such as memory maps seen as plain arrays.

    Raises
    ------
    TypeError
        For anything else.
    """
    if type(a) is np.ndarray:
        return a
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fastbn takes plain arrays: {_UNMASK.get(name, _UNMASKED.format(name))}")
    if isinstance(a, np.ndarray):
        return a.view(np.ndarray)
    kind = "None" if a is None else f"a {type(a).__module__}.{type(a).__qualname__}".replace(" builtins.", " ")
    hint = f"np.asarray({name}, dtype=np.float32)" if isinstance(a, (list, tuple, int, float)) else f"{name} as a NumPy array"
    raise TypeError(f"{name} is {kind}; fastbn takes NumPy arrays, and CuPy arrays on a GPU, all of one kind: pass {hint}")


def taken(names: tuple[str, ...], arrays: tuple[Any, ...]) -> tuple[tuple[Any, ...], Exchange | None]:
    """A call's arrays as a backend takes them, all NumPy's or all CuPy's, and how results go back in kind where they came in another.

    Raises
    ------
    TypeError
        For what is no array, for arrays of several kinds, on several devices, or of a library that cannot share them.
    ImportError
        For GPU arrays where CuPy or numba-cuda is missing; names the extra to install.
    """
    x = arrays[0]
    if type(x) is np.ndarray or not is_gpu_array(x):
        needed = ("x", "dy", "sum_dy", "sum_dy_xmu")
        found = zip(names, arrays, strict=True)
        return tuple(None if a is None and n not in needed else plain_array(a, n) for n, a in found), None
    if "dy" in names and arrays[1] is None:
        raise TypeError("dy is None; pass the gradient of y, an array of x's shape and dtype")
    return as_cupy(names, arrays)


def refuse_gpu(name: str, a: object, function: str, instead: str) -> None:
    """TypeError where an array is on a GPU, for a function of NumPy arrays alone."""
    if type(a) is not np.ndarray and is_gpu_array(a):
        raise TypeError(f"{name} is a {kind_of(a)} on a GPU, but {function} takes NumPy arrays only: {instead.format(name)}")
