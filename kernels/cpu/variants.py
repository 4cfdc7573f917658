"""From kernels written in Python to machine code: which types an argument's name stands for, and one compilation a variant of a program.

A group of arguments (arguments.py) of one name has one type in every kernel of a forward, and one in every kernel of a backward. A variant
is a dtype and the optional arguments that are present; the absent ones are of type None, which lets Numba drop their branches.
"""

import gc
import inspect
from contextlib import contextmanager

from numba import njit, types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from fastbn.kernels.cpu import arguments, team
from fastbn.kernels.cpu.cache import KernelCache
from fastbn.kernels.cpu.simd import Pointer, bfloat16

DTYPES = {"float32": types.float32, "float64": types.float64, "float16": types.float16, "bfloat16": bfloat16}
REAL, INTEGER, FLAG = types.float64, types.int64, types.boolean


def tensor(dtype):
    """(pointer, stride of n or row, stride of c), in elements."""
    return types.Tuple((Pointer(dtype), INTEGER, INTEGER))


VECTOR = types.Tuple((Pointer(types.uint8), INTEGER, INTEGER))


def _weight(present):
    """Weights of every position in float64 or float32, or of whole rows or planes."""
    if "row_weight" in present:
        return types.Tuple((Pointer(REAL), INTEGER))
    if "narrow_weight" in present:
        return tensor(types.float32)
    return tensor(REAL) if "weight" in present else types.none


def group_type(name, dtype, present, backward):
    """The Numba type of the group of arguments called `name`, in the kernels of a forward or of a backward."""

    def optional(argument, given):
        return given if argument in present else types.none

    def named(group, *members):
        alike = len(set(members)) == 1
        return types.NamedUniTuple(members[0], len(members), group) if alike else types.NamedTuple(members, group)

    data, weight, mask = tensor(DTYPES[dtype]), _weight(present), optional("mask", tensor(types.uint16))
    if name == "data":
        totals = types.none if weight is types.none else REAL[::1]
        return named(arguments.Data, data, data, optional("residual", data), weight, totals, mask)
    if name == "gradients":
        return named(arguments.Gradients, data, data, data, optional("dresidual", data), weight, mask)
    if name == "channels":
        group = arguments.ChannelGradients if backward else arguments.Channels
        return named(group, *[VECTOR] * len(group._fields))
    if name == "shape":
        return named(arguments.Shape, *[INTEGER] * len(arguments.Shape._fields))
    if name == "options":
        group = arguments.BackwardOptions if backward else arguments.ForwardOptions
        return named(group, *(optional(field, FLAG) for field in group._fields))
    if name == "numbers":
        if backward:
            return named(arguments.BackwardNumbers, REAL, FLAG, FLAG)
        return named(arguments.ForwardNumbers, REAL, REAL, REAL, REAL, FLAG, FLAG, types.UniTuple(INTEGER, 3))
    return {"table": REAL[:, ::1], "grads": REAL[:, ::1], "partial": REAL[:, :, ::1], "scratch": REAL[:, :, ::1]}[name]


def signature(kernel, dtype, present):
    """The types of the groups of arguments that a kernel takes behind (thread, first, last)."""
    names = tuple(inspect.signature(kernel).parameters)[3:]
    return tuple(group_type(name, dtype, present, names[0] == "gradients") for name in names)


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


def compiled(name, kernels, dtype, present=()):
    """The machine code of a program's variant as a Python callable, from memory, from disk, or compiled now; see `team.program`.

    The callable is Numba's entry point for the signature, without the dispatcher before it: it takes about 0.1 us, converts each
    argument to the one type it may have (TypeError otherwise), and releases the GIL.
    """
    variant = (name, kernels, dtype, present)
    if variant not in _compiled:
        # Numba's own lock, which fastbn.cpu.threads holds over a fork. With one of ours around it, a thread that holds Numba's and
        # needs a kernel could wait for ever.
        with global_compiler_lock:
            if variant not in _compiled:
                types_ = team.signature(signature(kernels[0], dtype, present), len(kernels))
                dispatcher = njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(team.program(name, kernels))
                dispatcher._cache = KernelCache(name)
                with _written_in_vectors(), _without_collecting():
                    _compiled[variant] = dispatcher, dispatcher.compile(types_)
    return _compiled[variant][1]
