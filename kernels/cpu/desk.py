"""The desk: where a call lies for threads that wait in machine code, and come within a microsecond.

A thread that waits in the interpreter needs its lock to come. That takes milliseconds where the caller holds it: 5.8 ms in a loop of Python
code, the interval after which the interpreter lets go of it. Here a thread waits in machine code (`serve`).

A call has one owner. It lays the addresses of its code and of its arguments on the desk, and adds 1 to JOB. A thread that sees an odd JOB
goes INSIDE, looks whether JOB is still the same, takes a seat, and works with the workspace of that number. The owner goes from phase to
phase, with who is there. It adds 1 to JOB again, and returns when nobody is inside. Nobody reads its arguments after that: who is late
finds that JOB has changed.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.kernels import rows
from fastbn.kernels.cpu.atomics import (
    FUTEX,
    INTEGER,
    INTEGERS,
    WAIT,
    WAKE,
    add_to,
    allow,
    clock,
    displaced,
    futex,
    give_way,
    look_at,
    pause,
    processor,
    set_to,
    swap,
)
from fastbn.kernels.cpu.groups import element
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd.types import I64

# How often a thread looks in a turn of waiting, of about 10 us.
LOOKS = 300
# For how many turns after a call a thread keeps its processor; later it gives way in each. Without the first, other threads that wait (as
# those of OpenMP do, for some milliseconds) take it for a whole slice of time, and the next calls are done alone. Without the second, a
# matrix product of 500x500 between two calls takes 2.6 ms, not 1.3, as NumPy's threads are kept from it.
HOLD = 50
# A thread whose processor is wanted within so many turns after a call naps. It sleeps through twice as much work as the last time, in
# units of 65,536 values (25 us); unless it has been of use for some calls. A call of so many units wakes it from a nap.
HURRY, LONGEST_NAP, OF_USE, LONG = 200, 1 << 14, 32, 32
# Nanoseconds since the last call after which naps are forgotten, and after which a call of one unit wakes nobody: it would be over before.
PAUSE, SHORT_PAUSE = 10_000_000, 1_000_000
# The phase after the last.
OVER = -1
# What runs a piece, of any program: its arguments' address, the phase, the thread's seat, the first and the last task.
ENTRY = ir.FunctionType(I64, [I64] * 5)


@intrinsic
def address(typingctx, integers):
    """Where integers lie, as a number."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(args[0], I64)

    return INTEGER(integers), codegen


@intrinsic
def integers_at(typingctx, address):
    """The integers that lie there."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(INTEGERS))

    return INTEGERS(INTEGER), codegen


@intrinsic
def compute(typingctx, code, block, phase, seat, first, last):
    """Run a piece by its code's address: what it finds."""

    def codegen(context, builder, sig, args):
        entry = builder.inttoptr(args[0], ENTRY.as_pointer())
        return builder.call(entry, args[1:])

    return INTEGER(*[INTEGER] * 6), codegen


def laying(name, piece):
    """What makes a call ready for other threads: lay(arrays, options, numbers, constants) -> (code, block).

    `block` is the address of the arguments, on the caller's stack. `code` is that of a function that takes the same numbers whatever the
    program: code(block, phase, thread, first, last) runs piece(phase, thread, first, last, *arguments).
    """

    @intrinsic
    def lay(typingctx, arrays, options, numbers, constants):
        passed = arrays, options, numbers, constants
        types_of_piece = *[INTEGER] * 4, *passed
        piece.get_call_template(types_of_piece, {})  # compiles it

        def codegen(context, builder, sig, args):
            compiled = piece.overloads[types_of_piece]
            block = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in args]))
            for k, value in enumerate(args):
                builder.store(value, cgutils.gep_inbounds(builder, block, 0, k))
            entry = ir.Function(builder.module, ENTRY, f"{name}.entry")
            entry.linkage = "internal"
            inside = ir.IRBuilder(entry.append_basic_block())
            there = inside.inttoptr(entry.args[0], block.type)
            values = [inside.load(cgutils.gep_inbounds(inside, there, 0, k)) for k in range(len(args))]
            context.add_linking_libs((compiled.library,))
            found = context.call_internal_no_propagate(inside, compiled.fndesc, compiled.signature, [*entry.args[1:], *values])[1]
            inside.ret(found)
            return context.make_tuple(builder, sig.return_type, (builder.ptrtoint(entry, I64), builder.ptrtoint(block, I64)))

        return types.UniTuple(INTEGER, 2)(*passed), codegen

    return lay


@inline
def take(desk, code, block, cuts, phase, seat):
    """Compute pieces of a phase until none are left."""
    board, pieces, begin = rows.BOARDS + rows.BOARD * phase, element(cuts, 2 * phase + 1), element(cuts, 2 * phase + 2)
    while True:
        k = add_to(desk, board + rows.NEXT, 1)
        if k >= pieces:
            break
        add_to(desk, board + rows.FOUND, compute(code, block, phase, seat, element(cuts, begin + k), element(cuts, begin + k + 1)))
        add_to(desk, board + rows.DONE, 1)


@inline
def ease(looks):
    """Between two looks in the middle of a call; one more. Whom a thread waits for may want its processor: it gives way soon."""
    if looks < LOOKS:
        pause()
    else:
        give_way()
    return looks + 1


@inline
def follow(desk, seat):
    """Take part in the call on the desk, phase by phase."""
    code, block, cuts = look_at(desk, rows.CALL), look_at(desk, rows.CALL + 1), integers_at(look_at(desk, rows.CALL + 2))
    seen, looks = 0, 0
    while True:
        phase = look_at(desk, rows.PHASE)
        if phase == OVER:
            break
        if phase > seen:
            take(desk, code, block, cuts, phase - 1, seat)
            seen, looks = phase, 0
        else:
            looks = ease(looks)


def serve(desk):
    """Wait for calls and take part in them, until STOP.

    A thread looks for a call. Soon it gives way to others now and then. It sleeps after PATIENCE turns, or as soon as others want its
    processor. Where the system has no futex, it returns instead of sleeping.
    """
    served, looks, turns, calls, times = 0, 0, 0, 0, displaced()
    add_to(desk, rows.THREADS, 1)
    while look_at(desk, rows.STOP) == 0:
        job = look_at(desk, rows.JOB)
        if job & 1 and job != served:
            here = processor()
            if here == look_at(desk, rows.CALLER) and allow(here, False):
                allow(here, True)
            add_to(desk, rows.INSIDE, 1)
            if look_at(desk, rows.JOB) == job:
                seat = add_to(desk, rows.SEATS, 1) + 1
                if seat < look_at(desk, rows.MEMBERS):
                    follow(desk, seat)
                    turns, calls = 0, calls + 1
            add_to(desk, rows.INSIDE, -1)
            served, looks = job, 0
        elif looks < LOOKS:
            looks += 1
            pause()
        else:
            looks, turns, patience = 0, turns + 1, look_at(desk, rows.PATIENCE)
            if turns <= min(HOLD, patience):
                continue
            give_way()
            before, times = times, displaced()
            wanted = times != before
            if wanted or turns > patience:
                nap = min(2 * look_at(desk, rows.LAST_NAP) + 1, LONGEST_NAP) if wanted and turns < HURRY and calls < OF_USE else 0
                set_to(desk, rows.LAST_NAP, nap)
                set_to(desk, rows.NAP, nap)
                turns, calls = 0, 0
                add_to(desk, rows.SLEEPERS, 1)
                if not FUTEX:
                    break
                # Linux may wake a thread on the processor of who wakes it, and let it wait there for milliseconds.
                there = look_at(desk, rows.CALLER)
                avoided = allow(there, False)
                futex(desk, rows.JOB, WAIT, look_at(desk, rows.JOB))  # that of before may be long past
                add_to(desk, rows.SLEEPERS, -1)
                if avoided:
                    allow(there, True)
                times = displaced()
    add_to(desk, rows.THREADS, -1)
    return served


@inline
def wait(desk, k, wanted):
    """Until desk[k] is `wanted`."""
    looks = 0
    while look_at(desk, k) != wanted:
        looks = ease(looks)


@inline
def is_worth_waking(desk, work):
    """Whether to wake threads for a call: not for a short one after a pause, nor while they nap."""
    idle = clock() - look_at(desk, rows.ENDED)
    if idle > PAUSE:
        set_to(desk, rows.LAST_NAP, 0)
        set_to(desk, rows.NAP, 0)
    return (work > 1 or idle < SHORT_PAUSE) and (work >= LONG or add_to(desk, rows.NAP, -work) <= 0)


@inline
def open_call(desk, code, block, members, cuts, phases):
    """Lay a call on the desk, if there is none and threads are awake or worth waking; whether it lies there."""
    if members == 1:
        return False
    sleepers = look_at(desk, rows.SLEEPERS)
    wakes = sleepers != 0 and is_worth_waking(desk, element(cuts, 0))
    if not wakes and sleepers >= look_at(desk, rows.THREADS):
        return False
    if look_at(desk, rows.OWNER) != 0 or swap(desk, rows.OWNER, 1) != 0:
        return False
    for k in range(0, phases * rows.BOARD, rows.LINE):
        set_to(desk, rows.BOARDS + k, 0)
    set_to(desk, rows.PHASE, 0)
    set_to(desk, rows.SEATS, 0)
    set_to(desk, rows.CALLER, processor())
    set_to(desk, rows.MEMBERS, members)
    set_to(desk, rows.CALL, code)
    set_to(desk, rows.CALL + 1, block)
    set_to(desk, rows.CALL + 2, address(cuts))
    add_to(desk, rows.JOB, 1)
    if wakes:
        futex(desk, rows.JOB, WAKE, members - 1)
    return True


@inline
def close_call(desk):
    """Take the call off the desk, once all threads have left it."""
    set_to(desk, rows.PHASE, OVER)
    add_to(desk, rows.JOB, 1)
    wait(desk, rows.INSIDE, 0)
    set_to(desk, rows.OWNER, 0)


@inline
def lead(desk, code, block, members, cuts, first, last):
    """Run the phases of a call with the threads that come; what `team.program` returns."""
    shared, result = open_call(desk, code, block, members, cuts, last), 0
    for phase in range(first, last):
        pieces, begin = element(cuts, 2 * phase + 1), element(cuts, 2 * phase + 2)
        if shared and pieces > 1:
            board = rows.BOARDS + rows.BOARD * phase
            set_to(desk, rows.PHASE, phase + 1)
            take(desk, code, block, cuts, phase, 0)
            wait(desk, board + rows.DONE, pieces)
            found = look_at(desk, board + rows.FOUND)
        else:
            found = compute(code, block, phase, 0, element(cuts, begin), element(cuts, begin + pieces))
        if found != 0:
            result = found * rows.PHASES + phase
            break
    if shared:
        close_call(desk)
    if members > 1:
        set_to(desk, rows.ENDED, clock())
    return result
