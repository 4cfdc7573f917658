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
    add_to,
    allow,
    avoid,
    displaced,
    give_way,
    look_at,
    pause,
    place,
    processor,
    set_to,
    sleep_at,
    swap,
    wake_at,
)
from fastbn.kernels.cpu.groups import element
from fastbn.kernels.cpu.helpers import inline, outline
from fastbn.kernels.cpu.simd.types import I64

# How often a thread looks before it gives way: about 10 us. Who gives way more seldom holds up the threads of others, such as NumPy's in
# a matrix product (500x500 between calls: 1.24 ms alone; 2.6 ms beside a thread that never gives way, 1.26 with this).
LOOKS = 300
# Through how much work a thread sleeps before it is woken, in values / 65,536, which take 25 us each: so that a short call after a pause
# does not wake it, and that those who want its processor have it. And how many calls it must have taken part in for a short nap again.
SHORT_NAP, LONGEST_NAP, OF_USE = 1, 1 << 12, 64
# The phase after the last.
OVER = -1


@intrinsic
def _come_in(typingctx, desk, seat):
    """Run the code of the call on the desk."""

    def codegen(context, builder, sig, args):
        code, arguments = (builder.load(place(builder, args[0], ir.Constant(I64, rows.CALL + k)), typ=I64) for k in range(2))
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(code, kind.as_pointer()), [arguments, args[1]])
        return context.get_dummy_value()

    return types.void(desk, types.int64), codegen


def serve(desk):
    """Wait for calls and take part in them, until STOP.

    A thread looks for a call, gives way to others now and then, and sleeps after PATIENCE turns of that. It sleeps at once where others
    want its processor, and four times as long each time, until it was of use for some calls in a row. Where the system has no futex, it
    returns instead of sleeping.
    """
    served, looks, turns, calls, nap, times = 0, 0, 0, 0, SHORT_NAP, displaced()
    while look_at(desk, rows.STOP) == 0:
        job = look_at(desk, rows.JOB)
        if job & 1 and job != served:
            here = processor()
            if here == look_at(desk, rows.CALLER) and avoid(here):
                allow(here)
            add_to(desk, rows.INSIDE, 1)
            if look_at(desk, rows.JOB) == job:
                seat = add_to(desk, rows.SEATS, 1) + 1
                if seat < look_at(desk, rows.CALL + 2):
                    _come_in(desk, seat)
            add_to(desk, rows.INSIDE, -1)
            served, looks, turns, calls = job, 0, 0, calls + 1
        elif looks < LOOKS:
            looks += 1
            pause()
        else:
            looks, turns = 0, turns + 1
            give_way()
            before, times = times, displaced()
            wanted, there = times != before, look_at(desk, rows.CALLER)
            others = wanted and processor() != there
            if wanted or turns > look_at(desk, rows.PATIENCE):
                if calls >= OF_USE:
                    nap = SHORT_NAP
                if others:
                    nap, calls = min(4 * nap, LONGEST_NAP), 0
                turns = 0
                set_to(desk, rows.NAP, nap if others else SHORT_NAP)
                add_to(desk, rows.SLEEPERS, 1)
                if not FUTEX:
                    break
                # Linux may wake a thread on the processor of who wakes it, and let it wait there for milliseconds.
                avoided = avoid(there)
                sleep_at(desk, rows.JOB, job)
                if avoided:
                    allow(there)
                times = displaced()
    return served


def _laying(name, follow):
    """What lays a call on the desk: lay(desk, members, cuts, *arguments). A thread that comes runs follow(seat, desk, cuts, *arguments).

    The arguments lie on the owner's stack.
    """

    @intrinsic
    def lay(typingctx, desk, members, cuts, arrays, options, numbers, constants):
        passed = desk, cuts, arrays, options, numbers, constants
        follow.get_call_template((types.int64, *passed), {})  # compiles it

        def codegen(context, builder, sig, args):
            compiled = follow.overloads[(types.int64, *passed)]
            held = [args[0], *args[2:]]
            block = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in held]))
            for k, value in enumerate(held):
                builder.store(value, cgutils.gep_inbounds(builder, block, 0, k))
            # A function that takes two integers, whatever the program: it unpacks the arguments.
            entry = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64, I64]), f"{name}.entry")
            entry.linkage = "internal"
            inside = ir.IRBuilder(entry.append_basic_block())
            there = inside.inttoptr(entry.args[0], block.type)
            values = [inside.load(cgutils.gep_inbounds(inside, there, 0, k)) for k in range(len(held))]
            context.add_linking_libs((compiled.library,))
            context.call_internal_no_propagate(inside, compiled.fndesc, compiled.signature, [entry.args[1], *values])
            inside.ret_void()
            for k, value in enumerate((builder.ptrtoint(entry, I64), builder.ptrtoint(block, I64), args[1])):
                builder.store(value, place(builder, args[0], ir.Constant(I64, rows.CALL + k)))
            return context.get_dummy_value()

        return types.void(desk, members, *passed[1:]), codegen

    return lay


@inline
def wait(desk, k, wanted):
    """Until desk[k] is `wanted`. Whom the caller waits for may want its processor: it gives way soon."""
    looks = 0
    while look_at(desk, k) != wanted:
        looks += 1
        if looks < LOOKS:
            pause()
        else:
            give_way()


def sharing(name, piece):
    """Helpers that share a call of a program: own(desk), open_(desk, members, first, last, cuts, *arguments), share(desk, phase, cuts,
    *arguments), close(desk). `piece` computes a piece; `cuts` is as `team.program` takes it.
    """

    def take(seat, desk, cuts, phase, arrays, options, numbers, constants):
        board, pieces, begin = rows.BOARDS + rows.BOARD * phase, element(cuts, 2 * phase + 1), element(cuts, 2 * phase + 2)
        while True:
            k = add_to(desk, board + rows.NEXT, 1)
            if k >= pieces:
                break
            found = piece(phase, seat, element(cuts, begin + k), element(cuts, begin + k + 1), arrays, options, numbers, constants)
            add_to(desk, board + rows.FOUND, found)
            add_to(desk, board + rows.DONE, 1)

    take = inline(take)

    def follow(seat, desk, cuts, arrays, options, numbers, constants):
        seen = 0
        while True:
            phase = look_at(desk, rows.PHASE)
            if phase == OVER:
                return 0
            if phase > seen:
                take(seat, desk, cuts, phase - 1, arrays, options, numbers, constants)
                seen = phase
            else:
                pause()

    lay = _laying(name, outline(follow, f"{name}.follow"))

    def own(desk):
        """Whether the desk is the caller's now; not where another call is on it. Nobody waits for it."""
        return look_at(desk, rows.OWNER) == 0 and swap(desk, rows.OWNER, 1) == 0

    def open_(desk, members, phases, cuts, arrays, options, numbers, constants):
        """Lay a call on the desk, and wake threads that have slept through enough."""
        for k in range(0, phases * rows.BOARD, rows.LINE):
            set_to(desk, rows.BOARDS + k, 0)
        set_to(desk, rows.PHASE, 0)
        set_to(desk, rows.SEATS, 0)
        set_to(desk, rows.CALLER, processor())
        lay(desk, members, cuts, arrays, options, numbers, constants)
        add_to(desk, rows.JOB, 1)
        work = element(cuts, 0)
        if look_at(desk, rows.SLEEPERS) != 0 and add_to(desk, rows.NAP, -work) < work:
            sleepers = swap(desk, rows.SLEEPERS, 0)
            woken = min(sleepers, members - 1)
            if sleepers > woken:
                add_to(desk, rows.SLEEPERS, sleepers - woken)
            wake_at(desk, rows.JOB, woken)

    def share(desk, phase, cuts, arrays, options, numbers, constants):
        """One phase with the threads that are there; the sum of what the kernel returned."""
        board = rows.BOARDS + rows.BOARD * phase
        set_to(desk, rows.PHASE, phase + 1)
        take(0, desk, cuts, phase, arrays, options, numbers, constants)
        wait(desk, board + rows.DONE, element(cuts, 2 * phase + 1))
        return look_at(desk, board + rows.FOUND)

    def close(desk):
        """Take the call off the desk, once all threads have left it."""
        set_to(desk, rows.PHASE, OVER)
        add_to(desk, rows.JOB, 1)
        wait(desk, rows.INSIDE, 0)
        set_to(desk, rows.OWNER, 0)

    return inline(own), inline(open_), inline(share), inline(close)
