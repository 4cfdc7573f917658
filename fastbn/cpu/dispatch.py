"""Which kernels run, in which order, over which tasks: a literal table, printed by ``python -m fastbn.cpu.dispatch``.

The key is (what runs, family, traversal). A traversal says how memory is crossed:

- ``channels``: planes, one group of channels after another; the second sweep reads the cache;
- ``strips``: the same for columns with short planes, or with few rows;
- ``sweeps``: the whole array once for the statistics, once for the output: channels last, a few huge channels, inference.

A line of the table is compiled as one program, in variants (kernels/cpu/variants.py). Each kernel is split into tasks, or is not. A small
call is one call of machine code, for all kernels of the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu.layout import LANES, STREAM_FROM, Layout
from fastbn.cpu.threads import BELL, get_num_threads, importing, parallel
from fastbn.cpu.uninterrupted import uninterrupted
from fastbn.kernels.cpu.arguments import Shape
from fastbn.kernels.rows import FOUND

#                  kernel          file, split into
KERNELS: Mapping[str, tuple[str, str]] = {
    "forward_planes": ("planes", "channels"),
    "stats_planes": ("planes", "blocks of channels"),
    "normalise_planes": ("planes", "segments"),
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
# Fewer channels than this do not feed the threads of a common machine one by one.
FEW_CHANNELS = 8
# A thread's share of a call, in smallest pieces: it waits for the others one of these at most, and a piece has a start and an end.
SHARES = 4
# Below this many values the threads' wake-up costs more than it saves.
PARALLEL_FROM = 3 << 18
# Bytes one kernel call may cross: about 10 ms, so that Ctrl-C is noticed.
PIECE = 32 << 20


@dataclass(frozen=True, eq=False)
class Schedule:
    """How a layout is cut into tasks: by shape alone, so that the bits do not depend on the threads.

    Attributes
    ----------
    traversal : str
        ``"channels"``, ``"strips"`` or ``"sweeps"``: the third key of `TABLE` for training.
    tasks : mapping of str to int
        What kernels are split into, and how many there are.
    pieces : int
        Kernel calls at least, so that Ctrl-C is noticed.
    shape : Shape
        The group of arguments of that name (kernels/cpu/arguments.py): channels of a group or a strip, blocks of a channel and so on.
    """

    traversal: str
    tasks: Mapping[str, int]
    pieces: int
    shape: Shape
    by_program: dict[Program, NDArray[np.int64]] = field(default_factory=dict)  # the number of tasks of each kernel


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
    scratch = (group, 4 * LANES)
    if p.family == "columns":
        # 6 rows of constants and accumulators by column; a vector more than the width, as whole vectors are written.
        scratch = (6, -(-width // LANES) * LANES + LANES)
        tasks["parts of strips"] = -(-p.C // group) * max(1, -(-p.rows // part))
    tasks[""] = 1
    shape = Shape(p.N, p.C, p.S, p.rows, p.tail_columns, p.folded, group, blocks, rows, part, BLOCK, *scratch)
    return Schedule(traversal, tasks, pieces, shape)


def _cut(p: Layout, itemsize: int, tensors: int, widest: int, training: bool) -> tuple[str, int, int, int, dict[str, int]]:
    """Traversal, channels a group, blocks a channel, rows or planes a block, and the numbers of tasks."""
    channel = p.count * itemsize * tensors
    if p.family == "planes":
        segments = -(-p.S // BLOCK)
        planes = max(1, BLOCK // p.S)
        blocks = -(-p.N // planes) * segments
        fused = segments == 1 and p.C >= FEW_CHANNELS and channel <= LARGEST_CHANNEL
        group = max(1, min(CACHE // channel, 64, p.C))
        tasks = {"channels": p.C, "blocks of channels": p.C * blocks, "segments": p.N * p.C * segments}
        return "channels" if fused else "sweeps", group, blocks, planes, tasks
    if p.S == 1 or p.folded > 1:
        group = p.C if p.folded > 1 else min(p.C, 1024)
        rows = max(-(-p.rows // min(32, max(1, p.N * p.C * p.S >> 17))), -(-512 // (p.folded * p.S)))
        blocks = max(1, -(-p.rows // rows))
        strip = min(STRIP // channel, p.C // 4, group) // LANES * LANES
        small = p.C * channel <= CACHE  # one call of one kernel is the shortest way
        medium = p.N * p.C >= PARALLEL_FROM and p.N * p.C * itemsize < STREAM_FROM
        few_rows = medium and p.folded == 1 and strip >= NARROWEST
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


@lru_cache(maxsize=4096)
def cut(tasks: int, unit: int, threads: int, least: int) -> NDArray[np.int64]:
    """Where `tasks` are cut into pieces, `least` or more, at multiples of `unit`: piece k is cut[k] to cut[k + 1].

    For several threads pieces become smaller towards the end, so that none waits long for the others.
    """
    units = -(-tasks // unit)
    largest = -(-units // least)
    smallest = min(largest, max(1, units // (threads * SHARES)))
    cuts = [0]
    while cuts[-1] < units:
        left = units - cuts[-1]
        fair = largest if threads == 1 else 3 * left // (4 * threads)
        cuts.append(cuts[-1] + min(left, largest, max(smallest, fair)))
    return np.minimum(np.array(cuts, np.int64) * unit, tasks)


_NOTHING = np.empty(0, np.int64)  # the board and the cuts of a thread that shares with none
_ALL, PHASES = -1, 8  # as in kernels/cpu/team.py, which imports Numba


def run(this: Program, s: Schedule, arguments: tuple[Any, ...], threads: int, first: int = 0) -> int:
    """Run the kernels of a program from `first` on, until one finds something that the caller has to see to.

    What that one returned times PHASES, and which it is; 0 where none does. Kernels of a forward find channels that float32 lanes cannot
    do, or whose statistics are not finite; those of a backward find channels that do not suit float32 sums.
    """
    tasks = s.by_program.get(this)
    if tasks is None:
        tasks = s.by_program[this] = np.array([s.tasks[split] for split in this.splits], np.int64)
    if threads == 1 and s.pieces == 1 and first == 0:  # a small call: the shortest way
        return this.code(BELL, _NOTHING, _NOTHING, 0, len(tasks), 0, _ALL, tasks, *arguments)  # type: ignore[no-any-return]
    for phase in range(first, len(tasks)):
        found = _run_phase(this, phase, s, arguments, tasks, threads)
        if found:
            return found * PHASES + phase
    return 0


def _run_phase(this: Program, phase: int, s: Schedule, arguments: tuple[Any, ...], tasks: NDArray[np.int64], threads: int) -> int:
    """Let threads run one kernel of a program; the sum of what it returned."""
    split = this.splits[phase]
    if not split:
        return int(this.code(BELL, _NOTHING, _NOTHING, 0, 1, 0, _ALL - 1 - phase, tasks, *arguments)) // PHASES
    cuts = cut(int(tasks[phase]), s.shape.group if split == "channels" else 1, threads, s.pieces)
    pieces = len(cuts) - 1
    turns = pieces + 1 if s.pieces == 1 else 1  # a long call comes back after each piece, so that Ctrl-C is noticed
    board = np.zeros(3, np.int64)

    def work(thread: int) -> None:
        this.code(BELL, board, cuts, pieces, turns, thread, phase, tasks, *arguments)

    parallel(work, board, pieces, threads)
    return int(board[FOUND])


def threads_for(elements: int) -> int:
    """Threads for an array of so many values."""
    return get_num_threads() if elements >= PARALLEL_FROM else 1


def describe() -> str:
    """The table as text."""
    lines = [f"{'runs':<12}{'family':<10}{'traversal':<12}kernels (split into)"]
    for (runs, family, traversal), names in TABLE.items():
        kernels = ", ".join(f"{n} ({KERNELS[n][1]})" if KERNELS[n][1] else n for n in names)
        lines.append(f"{runs:<12}{family:<10}{traversal:<12}{kernels}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
