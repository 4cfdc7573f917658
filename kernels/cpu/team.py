"""Several threads at one kernel: who takes which tasks, and waiting for the last of them, all without the interpreter.

A kernel computes the tasks first..last with the workspace of `thread`. `team` makes of it what threads call: take a piece, compute it,
take the next, until there are none. Pieces are taken from a board, which the threads of a call share, by an atomic addition, so a
thread that comes late or runs on a slow processor simply takes fewer of them. Who computes a piece never changes its bits.

Halves, each for one thread, made the caller wait: the forward of 16x64x28x28 took 150 us on two threads and 125 on one (medians of 72
calls, with `set_num_threads` 1 and 2 in turn).
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.rows import DONE, FOUND, NEXT

BOARD = types.int64[::1]
CUTS = types.int64[::1]
# How often the caller looks whether the others are done, and the others whether a next call begins, before they let the system wake
# them. That takes 25 to 100 us; a look takes 1 to 2 ns.
LOOKS = 20_000
LINGER = 30_000


def _place(context, builder, array_type, array, k):
    """The address of element k of a one-dimensional array."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.gep(data, [k])


@intrinsic
def add_to(typingctx, board, k, n):
    """board[k] += n, atomically; the value before. What was written before it is seen by who sees the sum."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _place(context, builder, sig.args[0], args[0], args[1]), args[2], "seq_cst")

    return types.int64(board, types.int64, types.int64), codegen


@intrinsic
def look_at(typingctx, board, k):
    """board[k], as another thread may have just written it."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_place(context, builder, sig.args[0], args[0], args[1]), "acquire", 8)

    return types.int64(board, types.int64), codegen


def signature(kernel_types):
    """The types that a team's function takes, from those of its kernel."""
    return BOARD, BOARD, CUTS, types.int64, types.int64, types.Tuple(kernel_types[3:])


def team(kernel):
    """A kernel that several threads call at once; `arguments` are the kernel's behind (thread, first, last).

    The function made takes at most `turns` pieces, so that a long call comes back to the interpreter now and then, and returns the sum of
    what the kernel returned. Piece k is the tasks cuts[k]..cuts[k+1]. With an empty board a thread is alone, and takes all pieces.

    Thread 0 is the caller. It rings the bell when it begins, and in the end waits a little for the others. Those linger until all is done
    and the bell rings for the next call, or a little longer: were they to go back to the interpreter with the caller, one would have
    to wait for its lock, and be woken. (32x512x7x7, measured as above: the forward on two threads is 0.8 times as fast as on one
    without, 1.3 times with.)
    """
    compute = inline(kernel)

    def work(bell, board, cuts, turns, thread, arguments):
        alone = board.size == 0
        if not alone and thread == 0:
            add_to(bell, 0, 1)
        heard = look_at(bell, 0)
        pieces = cuts.size - 1
        found = 0
        for turn in range(turns):
            k = turn if alone else add_to(board, NEXT, 1)
            if k >= pieces:
                break
            n = compute(thread, cuts[k], cuts[k + 1], *arguments)
            found += n
            if not alone:
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

    # Names of machine code are made of these: two kernels' must differ, also where both are loaded from the disk.
    work.__name__, work.__qualname__, work.__module__ = kernel.__name__, f"{kernel.__qualname__}.team", kernel.__module__
    return work
