"""What threads need to meet in machine code: integers that they share, and ways to wait.

All that is read and written here is so in one order for all threads (sequentially consistent).
"""

import os
import platform
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.kernels.cpu.simd import Pointer
from fastbn.kernels.cpu.simd.types import I1, I32, I64

INTEGERS, INTEGER = Pointer(types.int64), types.int64
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
POSIX, LINUX = os.name == "posix", sys.platform == "linux"
# LLVM's name for the instruction that eases a loop that waits, and its operands.
PAUSE = {"x86_64": ("llvm.x86.sse2.pause",), "aarch64": ("llvm.aarch64.hint", 1)}.get(MACHINE)
# The number of Linux' system call that sleeps until a word of memory changes, and its operations among threads of one process.
FUTEX = {"x86_64": 202, "aarch64": 98}.get(MACHINE) if LINUX else None
WAIT, WAKE = 128, 129
# Bytes of a set of processors, 1024 of them.
_MASK = 128
_MONOTONIC = 6 if sys.platform == "darwin" else 1
# Linux' struct rusage has so many integers, the last of which counts involuntary switches to another thread.
_USAGE, _OF_THREAD = 18, 1


def place(builder, integers, k):
    """The address of integers[k]."""
    return builder.gep(integers, [k], source_etype=I64)


def _call(builder, result, name, operands, variadic=False):
    kind = ir.FunctionType(result, [I64] if variadic else [operand.type for operand in operands], var_arg=variadic)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@intrinsic
def add_to(typingctx, integers, k, n):
    """integers[k] += n; the value before."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", place(builder, args[0], args[1]), args[2], "seq_cst")

    return INTEGER(integers, INTEGER, INTEGER), codegen


@intrinsic
def swap(typingctx, integers, k, n):
    """integers[k] = n; the value before."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("xchg", place(builder, args[0], args[1]), args[2], "seq_cst")

    return INTEGER(integers, INTEGER, INTEGER), codegen


@intrinsic
def look_at(typingctx, integers, k):
    """integers[k], as another thread may have just written it."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(place(builder, args[0], args[1]), "seq_cst", 8, typ=I64)

    return INTEGER(integers, INTEGER), codegen


@intrinsic
def set_to(typingctx, integers, k, n):
    """integers[k] = n."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[2], place(builder, args[0], args[1]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(integers, INTEGER, INTEGER), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a loop that waits: 15 to 50 ns in which it saves power."""

    def codegen(context, builder, sig, args):
        if PAUSE:
            _call(builder, ir.VoidType(), PAUSE[0], [ir.Constant(I32, n) for n in PAUSE[1:]])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx):
    """Let another thread have the processor, if one wants it: 0.7 us where none does."""

    def codegen(context, builder, sig, args):
        if POSIX:
            _call(builder, I32, "sched_yield", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def clock(typingctx):
    """Nanoseconds since some moment; always 0 where the system does not tell."""

    def codegen(context, builder, sig, args):
        if not POSIX:
            return ir.Constant(I64, 0)
        time = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(I64, 2)), I64.as_pointer())  # seconds and nanoseconds
        _call(builder, I32, "clock_gettime", [ir.Constant(I32, _MONOTONIC), time])
        seconds, rest = (builder.load(place(builder, time, ir.Constant(I64, k)), typ=I64) for k in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), rest)

    return INTEGER(), codegen


@intrinsic
def displaced(typingctx):
    """How often this thread has had to leave its processor to another; always 0 where the system does not tell."""

    def codegen(context, builder, sig, args):
        if not LINUX:
            return ir.Constant(I64, 0)
        usage = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(I64, _USAGE)), I64.as_pointer())
        _call(builder, I32, "getrusage", [ir.Constant(I32, _OF_THREAD), usage])
        return builder.load(place(builder, usage, ir.Constant(I64, _USAGE - 1)), typ=I64)

    return INTEGER(), codegen


@intrinsic
def processor(typingctx):
    """The number of the processor that this thread runs on; -1 where the system does not tell."""

    def codegen(context, builder, sig, args):
        if not LINUX:
            return ir.Constant(I64, -1)
        return builder.sext(_call(builder, I32, "sched_getcpu", []), I64)

    return INTEGER(), codegen


@intrinsic
def allow(typingctx, number, allowed):
    """Allow this thread a processor, or forbid it, if it may run on others too; whether that changed anything."""

    def codegen(context, builder, sig, args):
        if not LINUX:
            return ir.Constant(I1, 0)
        number, allowed = args
        changed = cgutils.alloca_once_value(builder, ir.Constant(I1, 0))
        words = cgutils.alloca_once(builder, ir.ArrayType(I64, _MASK // 8))
        mask, itself, size = builder.bitcast(words, I64.as_pointer()), ir.Constant(I32, 0), ir.Constant(I64, _MASK)
        done = _call(builder, I32, "sched_getaffinity", [itself, size, mask])
        known = builder.icmp_unsigned("<", number, ir.Constant(I64, 8 * _MASK))
        with builder.if_then(builder.and_(known, builder.icmp_signed("==", done, ir.Constant(I32, 0)))):
            word = place(builder, mask, builder.lshr(number, ir.Constant(I64, 6)))
            bit, before = builder.shl(ir.Constant(I64, 1), builder.and_(number, ir.Constant(I64, 63))), builder.load(word, typ=I64)
            is_allowed = builder.icmp_signed("!=", builder.and_(before, bit), ir.Constant(I64, 0))
            with builder.if_then(builder.xor(is_allowed, allowed)):
                builder.store(builder.xor(before, bit), word)
                done = _call(builder, I32, "sched_setaffinity", [itself, size, mask])
                builder.store(builder.icmp_signed("==", done, ir.Constant(I32, 0)), changed)
        return builder.load(changed)

    return types.boolean(INTEGER, types.boolean), codegen


@intrinsic
def futex(typingctx, integers, k, operation, n):
    """WAIT: sleep until somebody wakes this thread, unless integers[k] is no longer n. WAKE: n threads that sleep there.

    Nothing where the system has no futex.
    """

    def codegen(context, builder, sig, args):
        if FUTEX:
            address, rest = place(builder, args[0], args[1]), [ir.Constant(I64, 0)] * 3
            _call(builder, I64, "syscall", [ir.Constant(I64, FUTEX), address, args[2], args[3], *rest], variadic=True)
        return context.get_dummy_value()

    return types.void(integers, INTEGER, INTEGER, INTEGER), codegen
