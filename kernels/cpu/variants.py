"""From a kernel written in Python to machine code: which type an argument's name stands for, and one compilation a variant.

An argument of one name has one type in every kernel, so signatures follow from the parameter lists. A variant is a dtype and
the optional arguments that are present; the absent ones are of type None, which lets Numba drop their branches.
"""

import gc
import inspect
from contextlib import contextmanager

from numba import njit, types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from fastbn.kernels.cpu import team
from fastbn.kernels.cpu.cache import KernelCache
from fastbn.kernels.cpu.simd import Pointer, bfloat16

DTYPES = {"float32": types.float32, "float64": types.float64, "float16": types.float16, "bfloat16": bfloat16}
# What is not an int64, whatever the data is.
FIXED = {
    "relu": types.boolean,
    "streamed": types.boolean,
    "frozen": types.boolean,
    "wide": types.boolean,
    "constant": types.boolean,
    "force": types.boolean,
    "brief": types.boolean,
    "limit": types.float64,
    "table": types.float64[:, ::1],
    "partial": types.float64[:, :, ::1],
    "scratch": types.float64[:, :, ::1],
    "points": types.UniTuple(types.int64, 3),
    "eps": types.float64,
    "momentum": types.float64,
    "correction": types.float64,
    "count": types.float64,
    "grads": types.float64[:, ::1],
}
OPTIONAL = ("residual", "weight", "counts", "mask", "relu", "dresidual", "frozen", "wide", "brief")


def tensor(dtype):
    """(pointer, stride of n or row, stride of c), in elements."""
    return types.Tuple((Pointer(dtype), types.int64, types.int64))


def argument_type(name, dtype, present):
    """The Numba type of the argument called `name`."""
    if name == "weight" and "row_weight" in present:  # one for a whole row or plane
        return types.Tuple((Pointer(types.float64), types.int64))
    if name == "weight" and "narrow_weight" in present:
        return tensor(types.float32)
    if name == "counts" and any(a.endswith("weight") for a in present):
        return types.float64[::1]
    if name in OPTIONAL and name not in present:
        return types.none
    if name in ("x", "y", "dy", "dx", "residual", "dresidual"):
        return tensor(DTYPES[dtype])
    if name in ("running_mean", "running_var"):
        return Pointer(DTYPES[dtype])
    if name in ("weight", "mask"):
        return tensor(types.float64 if name == "weight" else types.uint16)
    return FIXED.get(name, types.int64)


def signature(function, dtype, present):
    """The types of a kernel's arguments in the variant."""
    return tuple(argument_type(name, dtype, present) for name in inspect.signature(function).parameters)


def is_shared(function):
    """Whether threads share a kernel's tasks: its first arguments are thread, first, last."""
    return next(iter(inspect.signature(function).parameters)) == "thread"


@contextmanager
def _written_in_vectors():
    """LLVM at level 2 and without its own vectorisers, for code that is in vectors already; under the compiler lock.

    Level 3 takes half as long again to compile and makes twice the code (5800 lines of assembly against 2900 for normalise_columns),
    which ran no faster.
    """
    before = config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE
    config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE = type(config.OPT)(min(2, config.OPT)), 0, 0
    try:
        yield
    finally:
        config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE = before


@contextmanager
def _without_collecting():
    """Python's cycle collector at rest: compiling makes millions of objects and no garbage worth the search.

    First forward and backward with nothing cached, channels last: from 4.6 to 4.3 s (bench/startup.py's, both in turn, medians of three).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_compiled = {}


def compiled(function, dtype, present=()):
    """The machine code of a variant as a Python callable, from memory, from disk, or compiled now.

    Of a kernel whose tasks threads share it is what `team` makes: its arguments are bell, board, cuts, turns, thread, arguments.
    The callable is Numba's entry point for the signature, without the dispatcher before it: it takes about 0.1 us, converts each
    argument to the one type it may have (TypeError otherwise), and releases the GIL.
    """
    variant = (function, dtype, present)
    if variant not in _compiled:
        # Numba's own lock, which fastbn.cpu.threads holds over a fork. With one of ours around it, a thread that holds Numba's and
        # needs a kernel could wait for ever.
        with global_compiler_lock:
            if variant not in _compiled:
                types_, code = signature(function, dtype, present), function
                if is_shared(function):
                    types_, code = team.signature(types_), team.team(function)
                dispatcher = njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(code)
                dispatcher._cache = KernelCache(function.__name__)
                with _written_in_vectors(), _without_collecting():
                    _compiled[variant] = dispatcher, dispatcher.compile(types_)
    return _compiled[variant][1]
