"""The arrays of one GPU call: of one kind, on one device, of fitting shapes and dtypes, apart in memory.

Shapes and dtypes are checked by the functions of checks.py, so that the errors are the CPU's. Those see NumPy arrays of the same shape
and dtype that hold nothing: GPU memory is never read here. An array is looked at once, by CuPy's own attributes: its interface would ask
the driver for the current stream each time.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np

from fastbn.arguments import checks
from fastbn.cuda.layout import Seen, face
from fastbn.kernels.cuda import host

Array = Any

# Arrays of others that can be had as CuPy arrays, and back, without a copy: (CuPy's function, module, its function for the way back).
# PyTorch's and CuPy's streams wait for each other in DLPack's exchange.
_EXCHANGES = {
    "torch": ("from_dlpack", "torch", "from_dlpack"),
    "numba": ("asarray", "numba.cuda", "as_cuda_array"),
}
# What is seen of a call's arrays, (name, *Seen) each: a key for what is worked out once for calls that are alike.
Facts = tuple[tuple[Any, ...], ...]
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
def _is_cupy(kind: type[Any]) -> bool:
    """Whether a type is CuPy's array, not one derived from it: those may have no memory of their own."""
    return kind.__module__ == "cupy" and kind.__qualname__ == "ndarray"


@lru_cache(maxsize=64)
def _family_of(kind: type[Any]) -> str:
    roots = [base.__module__.partition(".")[0].removesuffix("_cuda") for base in kind.__mro__]
    return next((root for root in roots if root == "cupy" or root in _EXCHANGES), roots[0])


class Shapes:
    """The arrays of a call without their memory: the checks that calls which are alike need once.

    Raises
    ------
    TypeError, ValueError
        From each method, as the function of checks.py that it is named after.
    """

    def __init__(self, facts: Facts) -> None:
        self.of = {name: Seen(*rest) for name, *rest in facts}
        self.x = self.of["x"]
        self.ndim, self.shape = len(self.x.shape), self.x.shape

    def face(self, name: str) -> np.ndarray[Any, Any] | None:
        """An array for checks.py, or None for what was not given."""
        seen = self.of.get(name)
        return None if seen is None else face(seen.shape, seen.dtype)

    def data(self, axis: int) -> str:
        """The name of x's dtype; `axis` is checked too."""
        return checks.x_and_axis(self.face("x"), axis)[1]

    def vectors(self, axis: int, *names: str) -> dict[str, Seen]:
        """Per-channel arrays that were given, by name."""
        x = face(self.x.shape, self.x.dtype)
        for name in names:
            checks.vector(self.face(name), name, x, axis)
        return {name: self.of[name] for name in names if name in self.of}

    def running(self, axis: int, written: bool) -> dict[str, Seen]:
        """Both running statistics or neither."""
        checks.running(self.face("running_mean"), self.face("running_var"), face(self.x.shape, self.x.dtype), axis, False)
        found = {name: self.of[name] for name in ("running_mean", "running_var") if name in self.of}
        for name, seen in found.items():
            if written and seen.shape[0] > 1 and seen.strides[0] == 0:
                raise ValueError(f"{name} has stride 0: its elements share one address; pass {name}.copy()")
        return found

    def like_x(self, name: str) -> None:
        """An array, if given, of x's shape and dtype."""
        if name in self.of:
            checks.like(self.face(name), name, face(self.x.shape, self.x.dtype))

    def weight(self, axis: int) -> None:
        """Dtype and shape of sample_weight; its values would have to be waited for."""
        w = self.of.get("sample_weight")
        if w is None:
            return
        full = self.x.shape[:axis] + self.x.shape[axis + 1 :]
        known = w.dtype.kind in "bfiu" or checks.dtype_name(w.dtype) is not None
        if not known or w.shape not in (full, full[:1]):
            checks.weights(face(w.shape, w.dtype), face(self.x.shape, self.x.dtype), axis)  # raises

    def output(self) -> None:
        """`out`, if given: like x, and with an address for each element."""
        out = self.of.get("out")
        if out is None:
            return
        self.like_x("out")
        if 0 not in out.shape and checks._overlaps_itself(cast(Any, _Addresses(out))):
            raise ValueError(f"out has strides {out.strides}: several elements share one address; pass cupy.empty_like(x)")

    def reach(self) -> dict[str, tuple[int, int]]:
        """The memory of each array, counted from its address."""
        return {name: seen.reach for name, seen in self.of.items()}


class Arrays:
    """The arrays of a call by name, as CuPy arrays; None for what was not given. The first one is x.

    Attributes
    ----------
    facts : tuple
        What is seen of each, see `Shapes`.
    device : int
        Where they are.

    Raises
    ------
    TypeError
        For NumPy among GPU arrays, arrays of two kinds or on two devices, and what cannot be seen as a CuPy array.
    ImportError
        For CuPy arrays where numba-cuda is missing; names the extra to install.
    """

    def __init__(self, **named: Array | None) -> None:
        given = {name: a for name, a in named.items() if a is not None}
        first, x = next(iter(given.items()))
        self.original = given
        kind: Any = type(x)
        cupy_alone = _is_cupy(kind)
        for name, a in given.items():
            if not (cupy_alone and type(a) is kind):
                _check_kind(name, a, first, x)
        self.xp = _namespace(first, x)
        self._back: Callable[[Array], Array] | None = None
        if not isinstance(x, self.xp.ndarray):
            given, self._back = _exchange(self.xp, given)
        self.arrays = given
        self.x = given[first]
        self.device = self.x.data.device_id
        self.start = {}
        facts = []
        for name, a in given.items():
            memory = a.data
            if memory.device_id != self.device:
                raise TypeError(
                    f"{name} is on device {memory.device_id} and {first} on device {self.device}; nothing is moved between them silently: "
                    f"copy one, with cupy.cuda.Device({self.device}): {name} = cupy.array({name})"
                )
            self.start[name] = start = memory.ptr
            facts.append((name, a.shape, a.strides, a.dtype, start % 16))
        self.facts: Facts = tuple(facts)

    def __getitem__(self, name: str) -> Array | None:
        """The array of that name, or None."""
        return self.arrays.get(name)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """The arrays' device as the current one: its current stream is where the kernels run."""
        if self.xp.cuda.runtime.getDevice() == self.device:
            return _ALREADY
        context: contextlib.AbstractContextManager[Any] = self.xp.cuda.Device(self.device)
        return context

    def back(self, name: str | None, result: Array | None) -> Array | None:
        """A result in the kind that came in: `name`'s own object if it was given, else the result exchanged.

        The exchange is what makes the other library wait for the kernels, so one's own object is exchanged too, for that alone.
        """
        exchanged = result if result is None or self._back is None else self._back(result)
        return self.original.get(name, exchanged) if name else exchanged

    @property
    def exchanged(self) -> bool:
        """Whether results go back as arrays of another library."""
        return self._back is not None

    def axis(self, axis: Any) -> int:
        """The channel axis as int, if it is none yet; checked."""
        return axis if type(axis) is int else checks.x_and_axis(face(self.x.shape, self.x.dtype), axis)[2]

    def writable(self, *names: str) -> None:
        """ValueError for arrays that are read-only. CuPy's never are: its flags do not know the word."""
        for name in names:
            if name in self.arrays and not getattr(self.arrays[name].flags, "writeable", True):
                if name == "out":
                    raise ValueError("out is read-only; pass a writable array: cupy.empty_like(x)")
                raise ValueError(f"{name} is read-only, but training updates it in place; pass a writable copy: {name}.copy()")

    def apart(self, reach: dict[str, tuple[int, int]], may_be: str | None, statistics: bool) -> None:
        """Check that what is written shares no memory: `out`, which may be the array `may_be`, and with `statistics` the running ones.

        Raises
        ------
        ValueError
        """
        start = self.start
        spans = {name: (start[name] + low, start[name] + high) for name, (low, high) in reach.items()}
        if all(a[1] <= b[0] for a, b in pairwise(sorted(spans.values()))):
            return
        if statistics and "running_mean" in start:
            if self._overlap("running_mean", "running_var", spans):
                raise ValueError("running_mean and running_var share memory, but each is updated in place; pass two arrays")
            for ours in ("running_mean", "running_var"):
                for name in ("x", "gamma", "beta", "residual", "sample_weight"):
                    if self._overlap(ours, name, spans):
                        raise ValueError(f"{ours} shares memory with {name}, but training updates it in place; pass {ours}.copy()")
        for name in start if "out" in start else ():
            if name == "out" or (name == may_be and self._same_place("out", name)) or not self._overlap("out", name, spans):
                continue
            allowed = "out may be that array itself, element for element" if name == may_be else "they must not share memory"
            raise ValueError(f"out overlaps {name}; {allowed}: pass cupy.empty_like(x)")

    def _same_place(self, first: str, second: str) -> bool:
        """Whether two arrays are the same elements in the same order."""
        a, b = self.arrays[first], self.arrays[second]
        return bool(self.start[first] == self.start[second] and a.strides == b.strides and a.shape == b.shape)

    def _overlap(self, first: str, second: str, spans: dict[str, tuple[int, int]]) -> bool:
        """Whether two arrays, if given, share an element."""
        if first not in spans or second not in spans:
            return False
        (low, high), (begin, end) = spans[first], spans[second]
        if high <= begin or end <= low:
            return False
        seen = {name: Seen(*rest) for name, *rest in self.facts}
        a, b = (np.asarray(_Addresses(seen[name], self.start[name])) for name in (first, second))
        # NumPy solves this from addresses and strides, without looking at what is there. These arrays never leave this line.
        return bool(a.size and b.size) and checks.overlap(a, b)


class _Addresses:
    """A range of GPU addresses, to be asked for overlaps only."""

    def __init__(self, seen: Seen, start: int = 0) -> None:
        self.shape, self.strides, self.itemsize = seen.shape, seen.strides, seen.dtype.itemsize
        data = {"typestr": f"|V{self.itemsize}", "data": (start, True)}
        self.__array_interface__ = {"version": 3, "shape": self.shape, "strides": self.strides, **data}


_ALREADY = contextlib.nullcontext()


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
