"""From kernels to a program: all of them in one call of machine code, which other threads may share.

A kernel computes the tasks first..last with the workspace of `thread`. A program runs kernels one after the other, its phases. The tasks of
a phase are cut into pieces. Each thread takes a piece, computes it, takes the next, until there are none. Pieces are taken by an
atomic addition, so a thread that comes late or runs on a slow processor takes fewer of them. Who computes a piece never changes its bits.

Halves, each for one thread, made the caller wait: the forward of 16x64x28x28 took 150 us on two threads and 125 on one (medians of 72
calls, with `set_num_threads` 1 and 2 in turn).
"""

from numba import types

from fastbn.kernels.cpu.atomics import INTEGERS
from fastbn.kernels.cpu.desk import laying, lead
from fastbn.kernels.cpu.helpers import inline


def signature(groups):
    """The types that a program takes, with those of its arrays, options and numbers."""
    integer = types.int64
    return INTEGERS, INTEGERS, integer, integer, integer, *groups, INTEGERS


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
    """What the caller runs: the phases first..last, with up to `members` threads, itself included; until one finds something.

    It returns found * PHASES + the phase that found it, or 0. `groups_of` makes the kernels' groups of arguments (groups.py).

    cuts[0] says how much work it is, in values / 65,536, for threads that sleep. For each phase follow how many pieces there are, and where
    their cuts begin in `cuts`: piece k of phase p is the tasks cuts[b + k]..cuts[b + k + 1] with b = cuts[2 * p + 2]. The caller does a
    phase of one piece itself, and all of them where another call is on the desk.
    """
    compute = _phases(kernels)

    def piece(phase, thread, first, last, arrays, options, numbers, constants):
        return compute(phase, thread, first, last, groups_of(arrays, options, numbers, constants, thread))

    lay = laying(name, inline(piece))

    def work(desk, cuts, members, first, last, arrays, options, numbers, constants):
        code, block = lay(arrays, options, numbers, constants)
        return lead(desk, code, block, members, cuts, first, last)

    # Names of machine code are made of these: two programs' must differ, also where both are loaded from the disk.
    work.__name__, work.__qualname__, work.__module__ = name, f"{name}.program", kernels[0].__module__
    return work
