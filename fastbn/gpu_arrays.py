"""The arrays of one GPU call: of one kind, on one device, of fitting shapes and dtypes; and how the kernels read them.

Shapes and dtypes are checked by the functions of checks.py, so that the errors are the CPU's. Those see NumPy arrays of the same shape
and dtype that hold nothing: GPU memory is never read here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from fastbn import checks, layout
from fastbn.kernels.cuda import host

Array = Any

# Arrays of others that can be had as CuPy arrays, and back, without a copy: (CuPy's function, module, its function for the way back).
# PyTorch's and CuPy's streams wait for each other in DLPack's exchange.
_EXCHANGES = {
    "torch": ("from_dlpack", "torch", "from_dlpack"),
    "numba": ("asarray", "numba.cuda", "as_cuda_array"),
}
_NOTHING = bytes(32)  # memory for one value of any dtype
_CONVERT = "cupy.asarray({0}), or cupy.from_dlpack({0})"


def is_gpu_array(a: object) -> bool:
    """Whether an array is on a GPU, by the interface that it offers. To be asked where ``type(a) is np.ndarray`` does not hold."""
    try:
        return hasattr(a, "__cuda_array_interface__")
    except RuntimeError:  # a PyTorch tensor on a GPU that requires a gradient; what to do is said where it is converted
        return True


def refuse(name: str, a: object, function: str, instead: str) -> None:
    """TypeError where an array is on a GPU, for a function of NumPy arrays alone."""
    if type(a) is not np.ndarray and is_gpu_array(a):
        raise TypeError(f"{name} is a {_kind(a)} on a GPU, but {function} takes NumPy arrays only: {instead.format(name)}")


def _kind(a: object) -> str:
    """The name of an array's type, such as "cupy.ndarray"."""
    return f"{_family(a)}.{type(a).__qualname__}".removeprefix("builtins.")


def _family(a: object) -> str:
    """The library that an array is of: "cupy", "torch", "numba", or where its type is from."""
    kind: Any = type(a)
    return _family_of(kind)


@lru_cache(maxsize=64)
def _family_of(kind: type[Any]) -> str:
    roots = [base.__module__.partition(".")[0].removesuffix("_cuda") for base in kind.__mro__]
    return next((root for root in roots if root == "cupy" or root in _EXCHANGES), roots[0])


def _face(a: Array) -> Array:
    """A NumPy array of a's shape and dtype that shares one zero between all elements: for checks of shape and dtype."""
    return np.ndarray(a.shape, a.dtype, _NOTHING, 0, (0,) * a.ndim)


class Arrays:
    """The arrays of a call by name, as CuPy arrays; None for what was not given. The first one is x.

    Raises
    ------
    TypeError
        For NumPy among GPU arrays, arrays of two kinds or on two devices, and what cannot be seen as a CuPy array.
    ImportError
        For CuPy arrays where numba-cuda is missing; names the extra to install.
    """

    def __init__(self, **named: Array | None) -> None:
        given = {name: a for name, a in named.items() if a is not None}
        first = next(iter(given))
        self.original = given
        for name, a in given.items():
            _check_kind(name, a, first, given[first])
        self.xp = _namespace(first, given[first])
        self._back: Callable[[Array], Array] | None = None
        if not isinstance(given[first], self.xp.ndarray):
            given, self._back = _exchange(self.xp, given)
        self.arrays = given
        self.x = given[first]
        self.device = int(self.x.device.id)
        for name, a in given.items():
            if int(a.device.id) != self.device:
                raise TypeError(
                    f"{name} is on device {int(a.device.id)} and {first} on device {self.device}; nothing is moved between them silently: "
                    f"copy one, with cupy.cuda.Device({self.device}): {name} = cupy.array({name})"
                )

    def __getitem__(self, name: str) -> Array | None:
        """The array of that name, or None."""
        return self.arrays.get(name)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """The arrays' device as the current one: its current stream is where the kernels run."""
        if int(self.xp.cuda.runtime.getDevice()) == self.device:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.xp.cuda.Device(self.device)
        return context

    def back(self, name: str | None, result: Array | None) -> Array | None:
        """A result in the kind that came in: `name`'s own object if it was given, else the result exchanged."""
        if name in self.original:
            return self.original[name]
        return result if result is None or self._back is None else self._back(result)

    @property
    def exchanged(self) -> bool:
        """Whether results go back as arrays of another library."""
        return self._back is not None

    def data(self, name: str, axis: Any) -> tuple[str, int]:
        """(name of the dtype, axis from the front) of x; checks both."""
        _, dtype, axis = checks.x_and_axis(_face(self.arrays[name]), axis)
        return dtype, axis

    def vector(self, name: str, axis: int) -> Array | None:
        """A per-channel array, checked."""
        a = self[name]
        if a is not None:
            checks.vector(_face(a), name, _face(self.x), axis)
        return a

    def running(self, axis: int, written: bool) -> tuple[Array | None, Array | None]:
        """Both running statistics or neither; checks as `checks.running`."""
        pair = mean, var = self["running_mean"], self["running_var"]
        faces = tuple(None if a is None else _face(a) for a in pair)
        checks.running(faces[0], faces[1], _face(self.x), axis, False)
        if written and mean is not None:
            for name in ("running_mean", "running_var"):
                a = self.arrays[name]
                if _read_only(a):
                    raise ValueError(f"{name} is read-only, but training updates it in place; pass a writable copy: {name}.copy()")
                if a.size > 1 and a.strides[0] == 0:
                    raise ValueError(f"{name} has stride 0: its elements share one address; pass {name}.copy()")
            if _overlap(mean, var):
                raise ValueError("running_mean and running_var share memory, but each is updated in place; pass two arrays")
        return pair

    def like_x(self, name: str) -> None:
        """Check that an array, if given, is of x's shape and dtype."""
        if self[name] is not None:
            checks.like(_face(self.arrays[name]), name, _face(self.x))

    def weight(self, axis: int) -> None:
        """Check dtype and shape of sample_weight; its values would have to be waited for."""
        w = self["sample_weight"]
        if w is None:
            return
        full = self.x.shape[:axis] + self.x.shape[axis + 1 :]
        known = w.dtype.kind in "bfiu" or checks.dtype_name(w.dtype) is not None
        if not known or w.shape not in (full, full[:1]):
            checks.weights(_face(w), _face(self.x), axis)  # raises

    def output(self, may_be: str | None, others: tuple[str, ...]) -> None:
        """Check `out`, if given, as `checks.output` does; it may be the array named `may_be`, element for element."""
        out = self["out"]
        if out is None:
            return
        checks.like(_face(out), "out", _face(self.x))
        if _read_only(out):
            raise ValueError("out is read-only; pass a writable array: cupy.empty_like(x)")
        if out.size and checks._overlaps_itself(out):
            raise ValueError(f"out has strides {out.strides}: several elements share one address; pass cupy.empty_like(x)")
        for name in others:
            a = self[name]
            if a is None or (name == may_be and _same_place(out, a)) or not _overlap(out, a):
                continue
            allowed = "out may be that array itself, element for element" if name == may_be else "they must not share memory"
            raise ValueError(f"out overlaps {name}; {allowed}: pass cupy.empty_like(x)")


def _check_kind(name: str, a: Array, first: str, x: Array) -> None:
    """TypeError for an array of another kind than x's."""
    if _family(a) == _family(x) and is_gpu_array(a) and is_gpu_array(x):
        return
    kinds = f"{name} is a {_kind(a)} and {first} is a {_kind(x)} on a GPU"
    if isinstance(a, np.ndarray) and not is_gpu_array(a):
        raise TypeError(f"{kinds}; nothing is moved silently: pass cupy.asarray({name}), or {first} as NumPy, cupy.asnumpy({first})")
    raise TypeError(f"{kinds}; all arrays of a call are of one kind: pass {_CONVERT.format(name)}, and {first} likewise")


def _namespace(name: str, x: Array) -> Any:
    """CuPy, in which outputs and workspace are made."""
    try:
        return host.kernels().arrays
    except ImportError as error:
        if _family(x) == "cupy":
            raise
        raise TypeError(
            f"{name} is a {_kind(x)} on a GPU; fastbn takes NumPy arrays, and CuPy arrays on a GPU: pass {_CONVERT.format(name)}. "
            f"Neither works yet: {error}"
        ) from error


def _exchange(xp: Any, given: dict[str, Array]) -> tuple[dict[str, Array], Callable[[Array], Array]]:
    """Arrays of another library as CuPy arrays of the same memory, and the way back."""
    first, x = next(iter(given.items()))
    known = _EXCHANGES.get(_family(x))
    if known is None:
        raise TypeError(f"{first} is a {_kind(x)} on a GPU, which fastbn cannot give back in kind: pass {_CONVERT.format(first)}")
    to_cupy, module, back = known
    seen = {}
    for name, a in given.items():
        try:
            seen[name] = getattr(xp, to_cupy)(a)
        except Exception as error:  # dtypes and layouts that CuPy does not have, tensors that require a gradient: each its own error
            raise TypeError(
                f"{name}, a {_kind(a)}, cannot be had as a CuPy array ({error}): pass {_CONVERT.format(name)}, of a tensor that "
                "requires no gradient, of float32, float64 or float16"
            ) from error
    way_back: Callable[[Array], Array] = getattr(importlib.import_module(module), back)
    return seen, way_back


# ------------------------------------------------------------------------------------------------------------- memory


def _interface(a: Array) -> dict[str, Any]:
    found: dict[str, Any] = a.__cuda_array_interface__
    return found


def _address(a: Array) -> int:
    return int(_interface(a)["data"][0])


def _read_only(a: Array) -> bool:
    return bool(_interface(a)["data"][1])


def _same_place(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return _address(a) == _address(b) and a.strides == b.strides and a.shape == b.shape


def _bounds(a: Array) -> tuple[int, int]:
    """The first address of an array and the one behind its last."""
    start = _address(a)
    if a.flags.c_contiguous:
        return start, start + a.nbytes
    reach = [(n - 1) * s for s, n in zip(a.strides, a.shape, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + a.itemsize


class _Addresses:
    """A range of GPU addresses, to be asked for overlaps only."""

    def __init__(self, a: Array) -> None:
        data = {"typestr": f"|V{a.itemsize}", "data": (_address(a), True)}
        self.__array_interface__ = {"version": 3, "shape": a.shape, "strides": a.strides, **data}


def _overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share an element."""
    if not a.size or not b.size:
        return False
    (low, high), (begin, end) = _bounds(a), _bounds(b)
    if high <= begin or end <= low:
        return False
    # NumPy solves this from addresses and strides, without looking at what is there. These arrays never leave this line.
    return checks.overlap(np.asarray(_Addresses(a)), np.asarray(_Addresses(b)))


@lru_cache(maxsize=1024)
def _order(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int, int]]:
    """Axes as they lie in memory, the inverse permutation, and (N, C, S)."""
    order = layout.axis_order(shape, strides)
    at = order.index(axis)
    lengths = prod(shape[a] for a in order[:at]), shape[axis], prod(shape[a] for a in order[at + 1 :])
    return order, tuple(order.index(a) for a in range(len(order))), lengths


class Layout:
    """How the kernels read the arrays of a call: as contiguous (N, C, S) in x's order of axes in memory.

    Attributes
    ----------
    shape : (N, C, S)
        S == 1: rows of channels.
    """

    def __init__(self, x: Array, axis: int, dtype: str) -> None:
        self.full, self.axis = x.shape, axis
        self.order, self.inverse, self.shape = _order(tuple(x.shape), tuple(x.strides), axis)
        self.bits = dtype == "bfloat16"

    def _in_order(self, a: Array) -> Array:
        """A view whose axes lie in memory in this layout's order, bfloat16 as uint16."""
        view = a.transpose(self.order)
        return view.view(np.uint16) if self.bits else view

    def read(self, a: Array | None) -> Array | None:
        """An input, itself or as a contiguous copy."""
        if a is None:
            return None
        view = self._in_order(a)
        return view if _fits(view) else view.copy(order="C")

    def written(self, xp: Any, out: Array | None, dtype: Any) -> tuple[Array, Array, Callable[[], None]]:
        """(array to return, array for the kernels to write, what to call afterwards)."""
        if out is not None:
            view = self._in_order(out)
            if _fits(view):
                return out, view, no_more
        made = xp.empty(tuple(self.full[a] for a in self.order), np.uint16 if self.bits else dtype)
        if out is None:
            y = made.view(dtype) if self.bits else made
            return y.transpose(self.inverse), made, no_more

        def finish() -> None:
            self._in_order(out)[...] = made

        return out, made, finish

    def weight(self, xp: Any, w: Array | None) -> Array | None:
        """Weights of all N * S values, or of a whole number of rows each."""
        if w is None:
            return None
        N, _, S = self.shape
        shape = tuple(n for a, n in enumerate(self.full) if a != self.axis)
        if w.shape == shape[:1] and self.order[0] == 0 and (S == 1 or w.size == N):
            return w  # of runs of rows
        if w.shape != shape:
            w = xp.broadcast_to(w.reshape(w.shape + (1,) * (len(shape) - 1)), shape)
        return xp.ascontiguousarray(w.transpose(tuple(a - (a > self.axis) for a in self.order if a != self.axis)))


def _fits(view: Array) -> bool:
    return bool(view.flags.c_contiguous) and _address(view) % view.itemsize == 0


def no_more() -> None:
    """Nothing is left to do after the kernels."""
