"""From kernels to a program: all of them in one call, or several threads at one of them, without the interpreter.

A kernel computes the tasks first..last with the workspace of `thread`. A program runs kernels one after the other, its phases.

- Alone, a thread runs all phases in one call of machine code. That is the shortest way for small arrays.
- Several threads share the tasks of one phase. Each takes a piece, computes it, takes the next, until there are none. Pieces are taken from
  a board by an atomic addition, so a thread that comes late or runs on a slow processor takes fewer of them.

Who computes a piece never changes its bits.

Halves, each for one thread, made the caller wait: the forward of 16x64x28x28 took 150 us on two threads and 125 on one (medians of 72
calls, with `set_num_threads` 1 and 2 in turn).
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastbn.kernels.cpu.groups import element
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import Pointer
from fastbn.kernels.rows import DONE, FOUND, NEXT

INTEGERS = Pointer(types.int64)
# The phase that stands for all of them; what a call of all returns is found * PHASES + the phase that found it.
ALL, PHASES = -1, 8
# How often the caller looks whether the others are done, and the others whether a next call begins, before they let the system wake
# them. That takes 25 to 100 us; a look takes 1 to 2 ns.
LOOKS = 20_000
LINGER = 30_000


def _place(builder, array, k):
    """The address of element k of integers."""
    return builder.gep(array, [k], source_etype=ir.IntType(64))


@intrinsic
def add_to(typingctx, board, k, n):
    """board[k] += n, atomically; the value before. What was written before it is seen by who sees the sum."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _place(builder, args[0], args[1]), args[2], "seq_cst")

    return types.int64(board, types.int64, types.int64), codegen


@intrinsic
def look_at(typingctx, board, k):
    """board[k], as another thread may have just written it."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_place(builder, args[0], args[1]), "acquire", 8, typ=ir.IntType(64))

    return types.int64(board, types.int64), codegen


def signature(groups):
    """The types that a program takes, with those of its arrays, options and numbers."""
    integer = types.int64
    return INTEGERS, INTEGERS, INTEGERS, integer, integer, integer, integer, INTEGERS, *groups, INTEGERS


def _phases(kernels):
    """A helper that runs the kernel of a phase: compute(phase, thread, first, last, arguments)."""
    this, more = inline(kernels[0]), kernels[1:]
    others = _phases(more) if len(more) > 1 else this if not more else inline(more[0])

    def only(phase, thread, first, last, arguments):
        return this(thread, first, last, *arguments)

    def either(phase, thread, first, last, arguments):
        return this(thread, first, last, *arguments) if phase == 0 else others(thread, first, last, *arguments)

    def several(phase, thread, first, last, arguments):
        return this(thread, first, last, *arguments) if phase == 0 else others(phase - 1, thread, first, last, arguments)

    return inline(several if len(more) > 1 else either if more else only)


def program(name, kernels, groups_of):
    """What one or several threads call; `groups_of` makes the kernels' groups of arguments (groups.py).

    With phase ALL the calling thread is alone. Phase k runs over the tasks 0..tasks[k], and `turns` is the number of phases. The first
    phase that finds something is the last to run. With phase ALL - 1 - k and one turn it runs phase k alone. Board and cuts are not looked
    at, nor does the bell ring.

    Else the threads of a call share that phase. The function takes at most `turns` pieces, so that a long call comes back to the
    interpreter now and then. It returns the sum of what the kernel returned. Piece k of `pieces` is the tasks cuts[k]..cuts[k+1].

    Thread 0 is the caller. It rings the bell when it begins, and in the end waits a little for the others. Those linger until all is done
    and the bell rings for the next call, or a little longer: were they to go back to the interpreter with the caller, one would have
    to wait for its lock, and be woken. (32x512x7x7, measured as above: the forward on two threads is 0.8 times as fast as on one
    without, 1.3 times with.)
    """
    compute = _phases(kernels)

    def work(bell, board, cuts, pieces, turns, thread, phase, tasks, arrays, options, numbers, constants):
        alone = phase < 0
        arguments = groups_of(arrays, options, numbers, constants, thread)
        if not alone and thread == 0:
            add_to(bell, 0, 1)
        heard = look_at(bell, 0)
        found = 0
        for turn in range(turns):
            this, first, last = turn, 0, 0
            if alone:
                if phase < ALL:
                    this = ALL - 1 - phase
                last = element(tasks, this)
            else:
                k = add_to(board, NEXT, 1)
                if k >= pieces:
                    break
                this, first, last = phase, element(cuts, k), element(cuts, k + 1)
            n = compute(this, thread, first, last, arguments)
            if alone:
                if n != 0:
                    return n * PHASES + this
            else:
                found += n
                add_to(board, FOUND, n)
                add_to(board, DONE, 1)
        if not alone and look_at(board, NEXT) >= pieces:
            for _ in range(LOOKS):
                if look_at(board, DONE) >= pieces:
                    break
            if thread != 0:
                for _ in range(LINGER):
                    if look_at(bell, 0) != heard:
                        break
        return found

    # Names of machine code are made of these: two programs' must differ, also where both are loaded from the disk.
    work.__name__, work.__qualname__, work.__module__ = name, f"{name}.program", kernels[0].__module__
    return work
