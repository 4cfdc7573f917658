"""Which kernels run, in which order, over which tasks: a literal table, printed by ``python -m fastbn.cpu.dispatch``.

The key is (what runs, family, traversal). A traversal says how memory is crossed:

- ``channels``: planes, one group of channels after another; the second sweep reads the cache;
- ``cached``: the same in the backward of a tensor that the caches hold, one channel after another;
- ``strips``: one strip after another, for columns with short planes, or with few rows;
- ``sweeps``: the whole array once for the statistics, once for the output: channels last, a few huge channels, inference.

A line of the table is compiled as one program, in variants (kernels/cpu/variants.py). Each kernel is split into tasks, or is not. A small
call is one call of machine code, for all kernels of the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, chain, pairwise
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import crew
from fastbn.cpu.layout import LANES, STREAM_FROM, Layout
from fastbn.cpu.threads import importing
from fastbn.cpu.uninterrupted import uninterrupted
from fastbn.kernels.cpu.arguments import Shape
from fastbn.kernels.rows import PHASES

#                  kernel          file, split into
KERNELS: Mapping[str, tuple[str, str]] = {
    "forward_planes": ("planes", "channels"),
    "stats_planes": ("planes", "blocks of channels"),
    "normalise_planes": ("planes", "segments"),
    "backward_cached": ("planes_cached", "channels"),
    "backward_planes": ("planes_backward", "channels"),
    "reduce_planes": ("planes_backward", "blocks of channels"),
    "apply_planes": ("planes_backward", "segments"),
    "forward_columns": ("columns", "strips"),
    "stats_columns": ("columns", "blocks of strips"),
    "normalise_columns": ("columns", "parts of strips"),
    "backward_columns": ("columns_backward", "strips"),
    "reduce_columns": ("columns_backward", "blocks of strips"),
    "apply_columns": ("columns_backward", "parts of strips"),
    "finish_stats": ("channels", ""),
    "finish_given": ("channels", ""),
    "finish_backward": ("channels", ""),
    "update_running": ("channels", ""),
}

TABLE: Mapping[tuple[str, str, str], tuple[str, ...]] = {
    ("forward", "planes", "channels"): ("forward_planes", "update_running"),
    ("forward", "planes", "sweeps"): ("stats_planes", "finish_stats", "normalise_planes", "update_running"),
    ("forward", "columns", "strips"): ("forward_columns", "update_running"),
    ("forward", "columns", "sweeps"): ("stats_columns", "finish_stats", "normalise_columns", "update_running"),
    ("moments", "planes", "sweeps"): ("stats_planes", "finish_stats"),
    ("moments", "columns", "sweeps"): ("stats_columns", "finish_stats"),
    ("inference", "planes", "sweeps"): ("finish_given", "normalise_planes"),
    ("inference", "columns", "sweeps"): ("finish_given", "normalise_columns"),
    ("leftovers", "planes", "sweeps"): ("normalise_planes",),
    ("leftovers", "columns", "sweeps"): ("normalise_columns",),
    ("backward", "planes", "cached"): ("backward_cached",),
    ("backward", "planes", "channels"): ("backward_planes",),
    ("backward", "planes", "sweeps"): ("reduce_planes", "finish_backward", "apply_planes"),
    ("backward", "columns", "strips"): ("backward_columns",),
    ("backward", "columns", "sweeps"): ("reduce_columns", "finish_backward", "apply_columns"),
    ("reduce", "planes", "sweeps"): ("reduce_planes", "finish_backward"),
    ("reduce", "columns", "sweeps"): ("reduce_columns", "finish_backward"),
    ("apply", "planes", "sweeps"): ("finish_backward", "apply_planes"),
    ("apply", "columns", "sweeps"): ("finish_backward", "apply_columns"),
}

# What a group of channels may fill of the L2 cache, all tensors together: 1 MiB a core, half of it for the group behind.
CACHE = 300 << 10
# Values whose moments are summed before they are merged. It bounds how far a naive sum can drift, and costs one merge in 65,536.
BLOCK = 1 << 16
# What a strip of channels last may fill of the L2 cache, so that its rows are read from memory once; and the fewest channels that are
# worth it, as memory is read in runs of their length. On 2 threads the forward of (512, 2048) takes 0.8 of the time of two sweeps, the
# backward 0.85; of (256, 4096) 0.85 and 0.7; of (1024, 1024) 0.9 and 0.95. On one thread they take 1.2 to 1.4 times as long, and where
# output is streamed up to 1.5 times: the ends of runs that start off a line of memory write that in two parts.
STRIP, NARROWEST = 640 << 10, 64
# Columns of a strip of short planes, where constants are float32 lanes, and where they are float64 lanes, which would leave the L1 cache:
# for float64, in the backward, and with a residual. These with 2048 columns too take 1.14 times as long (forward of 32x2048x7x7 with a
# residual; 1.3 times of 32x832x10x10), the backward of 16x2048x7x7 1.29 times; float32 lanes with 1024 columns 1.05 times (32x1024x14x14).
WIDEST, WIDEST_FLOAT64 = 2048, 1024
# Rows of columns that are written in one task at least, as their constants are spread first; and tasks a strip is cut into at most, as
# a task ends with a prefetch for nothing.
LEAST_ROWS, MOST_PARTS = 128, 32
# A channel larger than the last-level cache is read twice from memory whichever way; sweeps keep all threads on it.
LARGEST_CHANNEL = 16 << 20
# Fewer channels than this do not feed the threads of a common machine one by one; half of it will do for channels that the L2 cache
# holds, of which sweeps would read all twice: 32x6x28x28 in 0.8 of their time on one thread, 0.93 on two (forward).
FEW_CHANNELS = 8
# A thread's share of a call, in smallest pieces: it waits for the others one of these at most, and a piece has a start and an end.
SHARES = 4
# Groups of planes come in multiples of this, so that two, four or eight threads have as many each: of 64 channels in groups of 12, one
# thread of two had 36. The forward of 128x16x12x12 takes 51 us on two threads with 8 groups, and 72 with 4; 66 and 65 on one thread.
EVEN = 8
# Values from which threads share a call, and for each of them at least.
PARALLEL_FROM, LEAST_SHARE = 1 << 14, 1 << 13
# Bytes one call of machine code may cross: about 10 ms, so that Ctrl-C is noticed.
PIECE = 32 << 20


@dataclass(frozen=True, eq=False)
class Schedule:
    """How a layout is cut into tasks: by shape alone, so that the bits do not depend on the threads.

    Attributes
    ----------
    traversal : str
        ``"cached"``, ``"channels"``, ``"strips"`` or ``"sweeps"``: the third key of `TABLE` for training.
    tasks : mapping of str to int
        What kernels are split into, and how many there are.
    pieces : int
        Calls of machine code a kernel is cut into at least, so that Ctrl-C is noticed.
    work : int
        Values / 65,536, and 1 at least: threads that sleep let some work pass before they are woken for it (kernels/cpu/desk.py).
    shape : Shape
        The group of arguments of that name (kernels/cpu/arguments.py): channels of a group or a strip, blocks of a channel and so on.
    """

    traversal: str
    tasks: Mapping[str, int]
    pieces: int
    shape: Shape
    work: int
    calls: dict[tuple[Program, int], list[tuple[int, int, NDArray[np.int64]]]] = field(default_factory=dict)  # by program and threads


@lru_cache(maxsize=4096)
def schedule(p: Layout, itemsize: int, tensors: int, residual: bool = False, training: bool = True) -> Schedule:
    """The schedule for a layout; `tensors` is how many arrays a group must keep in the cache, 1 forward and 2 backward.

    Strips are narrower with a residual, and of other widths where all of an operation's kernels are sweeps, which it is without
    `training`. That changes no bits: blocks are the same.
    """
    widest = WIDEST_FLOAT64 if residual or tensors > 1 or itemsize == 8 else WIDEST
    traversal, group, blocks, rows, tasks = _cut(p, itemsize, tensors, widest, training)
    width = group * p.S * p.folded
    part = min(rows, max(LEAST_ROWS, -(-p.rows // MOST_PARTS)))
    pieces = 1 + p.count * p.C * itemsize // PIECE
    scratch = (group, 5 * LANES)  # four vectors of sums, and a scalar
    if p.family == "columns":
        # 6 rows of constants and accumulators by column; a vector more than the width, as whole vectors are written.
        scratch = (6, _whole(width, LANES) + LANES)
        tasks["parts of strips"] = -(-p.C // group) * max(1, -(-p.rows // part))
    tasks[""] = 1
    shape = Shape(p.N, p.C, p.S, p.rows, p.tail_columns, p.folded, group, blocks, rows, part, BLOCK, *scratch)
    return Schedule(traversal, tasks, pieces, shape, max(1, p.count * p.C * tensors >> 16))


def _whole(n: int, unit: int) -> int:
    """n, or the next multiple of `unit`."""
    return -(-n // unit) * unit


def _cut(p: Layout, itemsize: int, tensors: int, widest: int, training: bool) -> tuple[str, int, int, int, dict[str, int]]:
    """Traversal, channels a group, blocks a channel, rows or planes a block, and the numbers of tasks."""
    channel, values = p.count * itemsize * tensors, p.count * p.C
    cached = values * itemsize < STREAM_FROM
    if p.family == "planes":
        segments = -(-p.S // BLOCK)
        planes = max(1, BLOCK // p.S)
        blocks = -(-p.N // planes) * segments
        least = FEW_CHANNELS // 2 if channel <= CACHE else FEW_CHANNELS
        few = segments > 1 or least > p.C or channel > LARGEST_CHANNEL
        groups = -(-p.C // max(1, min(CACHE // channel, 64)))
        group = -(-p.C // _whole(groups, EVEN))
        tasks = {"channels": p.C, "blocks of channels": p.C * blocks, "segments": p.N * p.C * segments}
        return "sweeps" if few else "cached" if cached and tensors > 1 else "channels", group, blocks, planes, tasks
    if p.S == 1 or p.folded > 1:
        group = p.C if p.folded > 1 else min(p.C, 1024)
        # Blocks of about 65,536 values in an even number, so that two threads have as many each: the forward of 16x28x28x16, channels last,
        # takes 35 us with six blocks and 45 with one.
        wanted = min(32, _whole(max(1, values >> 16), 2))
        rows = max(-(-p.rows // wanted), -(-512 // (p.folded * p.S)))
        blocks = max(1, -(-p.rows // rows))
        strip = min(STRIP // channel, p.C // 4, group) // LANES * LANES
        small = values < PARALLEL_FROM  # else threads would have no share: the forward of 1024x64 takes 0.65 of the time on two
        few_rows = not small and cached and p.folded == 1 and strip >= NARROWEST
        if training and few_rows:
            group = strip
        strips = -(-p.C // group)
        tasks = {"strips": strips, "blocks of strips": strips * blocks}
        return "strips" if training and (small or few_rows) else "sweeps", group, blocks, rows, tasks
    step = LANES // gcd(p.S, LANES)  # strips start at a multiple of 16 columns
    group = step * max(1, min(CACHE // channel, widest // p.S) // step)
    strips = -(-p.C // group)
    rows = max(1, BLOCK // p.S)
    blocks = -(-p.N // rows)
    few = strips < FEW_CHANNELS // 2 or group * channel > LARGEST_CHANNEL
    tasks = {"strips": strips, "blocks of strips": strips * blocks}
    return "sweeps" if few else "strips", group, blocks, rows, tasks


class Program:
    """A line of `TABLE` in one variant, compiled: its machine code, and its kernels' names and what they are split into."""

    __slots__ = ("code", "names", "splits")

    def __init__(self, name: str, names: tuple[str, ...], dtype: str, present: tuple[str, ...]) -> None:
        self.names, self.splits = names, tuple(KERNELS[name][1] for name in names)

        def compile_() -> Any:
            with importing:  # not inherited half done by a forked child
                from fastbn.kernels.cpu.variants import compiled

                kernels = tuple(getattr(import_module(f"fastbn.kernels.cpu.{KERNELS[name][0]}"), name) for name in names)
            return compiled(name, kernels, dtype, present)  # type: ignore[no-untyped-call]

        self.code = uninterrupted(compile_)


@lru_cache(maxsize=1024)
def program(run: str, family: str, traversal: str, dtype: str, present: tuple[str, ...]) -> Program:
    """The program of a line of `TABLE`; compiles it, or loads it from disk, the first time."""
    return Program(f"{run}_{family}_{traversal}", TABLE[run, family, traversal], dtype, present)


def cut(first: int, last: int, unit: int, threads: int) -> list[int]:
    """Where the tasks first..last are cut into pieces, `first` and `last` included; at multiples of `unit` from the first on.

    For several threads pieces become smaller towards the end, so that none waits long for the others.
    """
    left = -(-(last - first) // unit)
    smallest = max(1, left // (threads * SHARES))
    cuts = [first]
    while left:
        taken = left if threads == 1 else min(left, max(smallest, -(-3 * left // (4 * threads))))
        left -= taken
        cuts.append(min(last, cuts[-1] + taken * unit))
    return cuts


def _cuts(this: Program, s: Schedule, threads: int) -> list[tuple[int, int, NDArray[np.int64]]]:
    """The calls of machine code that a call of a program takes: first and last phase, and the cuts that `team.program` wants.

    One for all phases, but for a long call, which comes back in every phase after each share of `pieces`: so Ctrl-C is noticed.
    """
    tasks = [s.tasks[split] for split in this.splits]
    units = [s.shape.group if split == "channels" else 1 for split in this.splits]
    if s.pieces == 1:
        return [(0, len(tasks), _table([cut(0, *pair, threads) for pair in zip(tasks, units, strict=True)], s.work))]
    calls = []
    for phase, (n, unit) in enumerate(zip(tasks, units, strict=True)):
        begins = range(0, n, -(-n // (unit * s.pieces)) * unit)
        for first, last in pairwise((*begins, n)):
            calls.append((phase, phase + 1, _table([[0]] * phase + [cut(first, last, unit, threads)], s.work)))
    return calls


def _table(cuts_of_phases: list[list[int]], work: int) -> NDArray[np.int64]:
    """`cuts` as `team.program` takes them."""
    begins = accumulate(map(len, cuts_of_phases), initial=1 + 2 * len(cuts_of_phases))
    heads = [number for cuts, begin in zip(cuts_of_phases, begins, strict=False) for number in (len(cuts) - 1, begin)]
    return np.array([work, *heads, *chain(*cuts_of_phases)], np.int64)


def run(this: Program, s: Schedule, arguments: tuple[Any, ...], threads: int, first: int = 0) -> int:
    """Run the kernels of a program from `first` on, until one finds something that the caller has to see to.

    What that one returned times PHASES, and which it is; 0 where none does. Kernels of a forward find channels that float32 lanes cannot
    do, or whose statistics are not finite; those of a backward find channels that do not suit float32 sums.
    """
    calls = s.calls.get((this, threads))
    if calls is None:
        calls = s.calls[this, threads] = _cuts(this, s, threads)
    if threads > 1:
        crew.crew.gather(threads - 1)
    desk = crew.crew.desk
    if len(calls) == 1:  # the shortest way
        return this.code(desk, calls[0][2], threads, first, calls[0][1], *arguments)  # type: ignore[no-any-return]
    found = phase = 0
    for begin, end, cuts in calls:
        if found and begin > phase:
            break
        if begin >= first:
            phase = begin
            found += this.code(desk, cuts, threads, begin, end, *arguments) // PHASES
    return found * PHASES + phase if found else 0


def most_threads(values: int) -> int:
    """How many threads may share a call on so many values."""
    return values // LEAST_SHARE if values >= PARALLEL_FROM else 1


def describe() -> str:
    """The table as text."""
    lines = [f"{'runs':<12}{'family':<10}{'traversal':<12}kernels (split into)"]
    for (runs, family, traversal), names in TABLE.items():
        kernels = ", ".join(f"{n} ({KERNELS[n][1]})" if KERNELS[n][1] else n for n in names)
        lines.append(f"{runs:<12}{family:<10}{traversal:<12}{kernels}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
