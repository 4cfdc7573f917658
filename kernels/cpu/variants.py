"""From kernels written in Python to machine code: which types an argument's name stands for, and one compilation a variant of a program.

What a program of a forward takes, and what one of a backward takes (arguments.py), has one type in each variant. A variant is a dtype and
the optional arguments that are present; the absent ones are of type None, which lets Numba drop their branches.
"""

import gc
import inspect
from contextlib import contextmanager

from numba import njit, types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from fastbn.kernels.cpu import arguments, atomics, desk, groups, team
from fastbn.kernels.cpu.cache import KernelCache
from fastbn.kernels.cpu.simd import Pointer, bfloat16

DTYPES = {"float32": types.float32, "float64": types.float64, "float16": types.float16, "bfloat16": bfloat16}
REAL, FLAG = types.float64, types.boolean


def signature(backward, dtype, present):
    """The types of arrays, options and numbers, in the order of arguments.py."""

    def array(name):
        if name in ("x", "y", "dy", "dx"):
            return Pointer(DTYPES[dtype])
        if name in ("residual", "dresidual"):
            return Pointer(DTYPES[dtype]) if name in present else types.none
        if name == "mask":
            return Pointer(types.uint16) if name in present else types.none
        if name == "weight" and "narrow_weight" in present:
            return Pointer(types.float32)
        if name in ("weight", "block_weights"):
            return Pointer(REAL) if "weight" in present or "row_weight" in present or "narrow_weight" in present else types.none
        return Pointer(REAL if name in ("table", "workspace") else types.uint8)

    arrays, options = (
        (arguments.BackwardArrays, arguments.BackwardOptions) if backward else (arguments.ForwardArrays, arguments.ForwardOptions)
    )
    flags = [FLAG if name in present else types.none for name in options._fields]
    numbers = (REAL, FLAG, FLAG) if backward else (REAL, REAL, REAL, REAL, FLAG, FLAG)
    return groups.named(arrays, [array(name) for name in arrays._fields]), groups.named(options, flags), types.Tuple(numbers)


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


def _compile(function, types_, name):
    """Numba's dispatcher of a function and its entry point for the types, from disk or compiled now; under the compiler lock."""
    dispatcher = njit(_nrt=False, nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    dispatcher._cache = KernelCache(name)
    with _written_in_vectors(), _without_collecting():
        return dispatcher, dispatcher.compile(types_)


def serve():
    """What a thread runs that waits for calls (desk.py), as a Python callable."""
    variant = "serve", (), "", ()
    with global_compiler_lock:
        if variant not in _compiled:
            _compiled[variant] = _compile(desk.serve, (atomics.INTEGERS,), "serve")
    return _compiled[variant][1]


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
                backward = "gradients" in inspect.signature(kernels[0]).parameters
                groups_of = groups.maker(backward, "row_weight" in present)
                types_ = team.signature(signature(backward, dtype, present))
                # Types do not tell all variants apart, neither in the cache nor as names of machine code.
                full_name = "_".join((name, dtype, *present))
                _compiled[variant] = _compile(team.program(full_name, kernels, groups_of), types_, full_name)
    return _compiled[variant][1]
