"""Which kernels run, in which order, over which tasks: a literal table, printed by ``python -m fastbn.cpu.dispatch``.

The key is (operation, family, road). A road says how memory is crossed:

- ``channels``: planes, one group of channels after another; the second sweep reads the cache;
- ``strips``: the same for columns with short planes, or with few rows;
- ``sweeps``: the whole array once for the statistics, once for the output: channels last, a few huge channels, inference.

A step names a kernel and what it is split into. Kernels take their arguments by name from one dictionary, the `Job`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import gcd
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu.layout import LANES, STREAM_FROM, Plan
from fastbn.cpu.threads import BELL, get_num_threads, importing, parallel
from fastbn.cpu.uninterrupted import uninterrupted
from fastbn.kernels.rows import FOUND

Job = dict[str, Any]

#                  kernel          split into
STEPS: Mapping[str, tuple[str, str | None]] = {
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
    "finish_stats": ("channels", None),
    "finish_given": ("channels", None),
    "finish_backward": ("channels", None),
    "update_running": ("channels", None),
}

TABLE: Mapping[tuple[str, str, str], tuple[str, ...]] = {
    ("forward", "planes", "channels"): ("forward_planes",),
    ("forward", "planes", "sweeps"): ("stats_planes", "finish_stats", "normalise_planes"),
    ("forward", "columns", "strips"): ("forward_columns",),
    ("forward", "columns", "sweeps"): ("stats_columns", "finish_stats", "normalise_columns"),
    ("moments", "planes", "sweeps"): ("stats_planes", "finish_stats"),
    ("moments", "columns", "sweeps"): ("stats_columns", "finish_stats"),
    ("inference", "planes", "sweeps"): ("finish_given", "normalise_planes"),
    ("inference", "columns", "sweeps"): ("finish_given", "normalise_columns"),
    ("backward", "planes", "channels"): ("backward_planes",),
    ("backward", "planes", "sweeps"): ("reduce_planes", "finish_backward", "apply_planes"),
    ("backward", "columns", "strips"): ("backward_columns",),
    ("backward", "columns", "sweeps"): ("reduce_columns", "finish_backward", "apply_columns"),
    ("reduce", "planes", "sweeps"): ("reduce_planes", "finish_backward"),
    ("reduce", "columns", "sweeps"): ("reduce_columns", "finish_backward"),
    ("apply", "planes", "sweeps"): ("apply_planes",),
    ("apply", "columns", "sweeps"): ("apply_columns",),
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


@dataclass(frozen=True)
class Schedule:
    """How a plan is cut into tasks: by shape alone, so that the bits do not depend on the threads.

    Attributes
    ----------
    road : str
        ``"channels"``, ``"strips"`` or ``"sweeps"``: the second key of `TABLE` for training.
    group : int
        Channels of a group or a strip.
    blocks : int
        Blocks of a channel, each summed before it is merged.
    rows_a_block : int
        Rows (columns) or planes (planes) of a block.
    tasks : mapping of str to int
        What `STEPS` splits into, and how many there are.
    whole : mapping of str to array
        The same as one piece: `cut` of it for one thread.
    arguments : dict
        The kernels' arguments that follow from all this.
    partial, scratch : tuple of int
        Shapes of the float64 workspace: moments of blocks; one thread's.
    """

    road: str
    group: int
    blocks: int
    rows_a_block: int
    tasks: Mapping[str, int]
    whole: Mapping[str, NDArray[np.int64]]
    arguments: Job
    partial: tuple[int, int, int]
    scratch: tuple[int, int]


@lru_cache(maxsize=4096)
def schedule(p: Plan, itemsize: int, tensors: int, residual: bool = False, training: bool = True) -> Schedule:
    """The schedule for a plan; `tensors` is how many arrays a group must keep in the cache, 1 forward and 2 backward.

    Strips are narrower with a residual, and of other widths where all of an operation's kernels are sweeps, which it is without
    `training`. That changes no bits: blocks are the same.
    """
    widest = WIDEST_FLOAT64 if residual or tensors > 1 or itemsize == 8 else WIDEST
    road, group, blocks, rows, tasks = _cut(p, itemsize, tensors, widest, training)
    width = group * p.S * p.fold
    rows_a_part = min(rows, max(LEAST_ROWS, -(-p.rows // MOST_PARTS)))
    shape = {"N": p.N, "C": p.C, "S": p.S, "R": p.rows, "rest": p.rest, "fold": p.fold}
    arguments: Job = shape | {"segment": BLOCK, "group": group, "rows_a_block": rows, "planes_a_block": rows, "rows_a_part": rows_a_part}
    arguments["weight"] = arguments["counts"] = arguments["brief"] = None
    arguments["pieces"] = 1 + p.count * p.C * itemsize // PIECE  # kernel calls at least, so that Ctrl-C is noticed
    scratch = (group, 4 * LANES)
    if p.family == "columns":
        # 6 rows of constants and accumulators by column; a vector more than the width, as whole vectors are written.
        scratch = (6, -(-width // LANES) * LANES + LANES)
        tasks["parts of strips"] = -(-p.C // group) * max(1, -(-p.rows // rows_a_part))
    whole = {split: cut(count, 1, 1, 1) for split, count in tasks.items()}
    return Schedule(road, group, blocks, rows, tasks, whole, arguments, (p.C, blocks, 4), scratch)


def _cut(p: Plan, itemsize: int, tensors: int, widest: int, training: bool) -> tuple[str, int, int, int, dict[str, int]]:
    """Road, channels a group, blocks a channel, rows or planes a block, and the numbers of tasks."""
    channel = p.count * itemsize * tensors
    if p.family == "planes":
        segments = -(-p.S // BLOCK)
        planes = max(1, BLOCK // p.S)
        blocks = -(-p.N // planes) * segments
        fused = segments == 1 and p.C >= FEW_CHANNELS and channel <= LARGEST_CHANNEL
        group = max(1, min(CACHE // channel, 64, p.C))
        tasks = {"channels": p.C, "blocks of channels": p.C * blocks, "segments": p.N * p.C * segments}
        return "channels" if fused else "sweeps", group, blocks, planes, tasks
    if p.S == 1 or p.fold > 1:
        group = p.C if p.fold > 1 else min(p.C, 1024)
        rows = max(-(-p.rows // min(32, max(1, p.N * p.C * p.S >> 17))), -(-512 // (p.fold * p.S)))
        blocks = max(1, -(-p.rows // rows))
        strip = min(STRIP // channel, p.C // 4, group) // LANES * LANES
        small = p.C * channel <= CACHE  # one call of one kernel is the shortest way
        medium = p.N * p.C >= PARALLEL_FROM and p.N * p.C * itemsize < STREAM_FROM
        few_rows = medium and p.fold == 1 and strip >= NARROWEST
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


@lru_cache(maxsize=1024)
def _kernel(name: str, dtype: str, present: tuple[str, ...]) -> tuple[Callable[..., int], tuple[str, ...]]:
    """Machine code of a kernel's variant, and the names of its arguments."""

    def compile_() -> tuple[Callable[..., int], tuple[str, ...]]:
        with importing:  # not inherited half done by a forked child
            from fastbn.kernels.cpu.variants import compiled

            function = getattr(import_module(f"fastbn.kernels.cpu.{STEPS[name][0]}"), name)
        names = tuple(inspect.signature(function).parameters)
        given = tuple(a for a in present if a.rpartition("_")[2] in names)  # row_weight and narrow_weight are a weight
        return compiled(function, dtype, given), names  # type: ignore[no-untyped-call]

    return uninterrupted(compile_)


@dataclass(frozen=True)
class Step:
    """A kernel ready to be called: what it is split into, and how its arguments are taken from a job."""

    kernel: Callable[..., int]
    split: str | None
    arguments: Callable[[Job], tuple[Any, ...]]


@lru_cache(maxsize=1024)
def step(name: str, dtype: str, present: tuple[str, ...]) -> Step:
    """The step of a kernel's variant; compiles it, or loads it from disk, the first time."""
    split = STEPS[name][1]
    kernel, names = _kernel(name, dtype, present)
    return Step(kernel, split, itemgetter(*names[3:]) if split else itemgetter(*names))


@lru_cache(maxsize=1024)
def program(operation: str, family: str, road: str, dtype: str, present: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps of a line of `TABLE`. What happens once a channel is float64 for every dtype."""
    return tuple(step(name, dtype if STEPS[name][1] else "float64", present) for name in TABLE[operation, family, road])


def call(name: str, dtype: str, *arguments: Any) -> int:
    """Run a kernel that is not split."""
    return step(name, dtype, ()).kernel(*arguments)


def run(operation: str, p: Plan, s: Schedule, road: str, dtype: str, present: tuple[str, ...], job: Job, threads: int) -> None:
    """Run the steps of an operation over a job that holds every argument by name.

    What does not fit float32 lanes (kernels/formulas.py says which) is done once more, in float64 lanes: channels that are normalised,
    and a backward with brief sums, before anything of it is written.
    """
    unfit = 0
    for this in program(operation, p.family, road, dtype, present):
        unfit += _run(this, s, job, threads)
        if unfit and job["brief"]:
            job["brief"] = None
            run(operation, p, s, road, dtype, tuple(name for name in present if name != "brief"), job, threads)
            return
    if unfit and job.get("wide", True) is None:
        job["wide"] = False
        _run(step(f"normalise_{p.family}", dtype, (*present, "wide")), s, job, threads)


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


_ALONE = np.empty(0, np.int64)  # the board of a thread that shares with none


def _run(this: Step, s: Schedule, job: Job, threads: int) -> int:
    """Run one step; the sum of what its kernel returns, which is how many channels do not fit, or nothing."""
    split, arguments, pieces = this.split, this.arguments(job), job["pieces"]
    if split is None:
        return this.kernel(*arguments) or 0
    if threads == 1 and pieces == 1:  # a small call: the shortest way
        return this.kernel(BELL, _ALONE, s.whole[split], 1, 0, arguments)
    cuts = cut(s.tasks[split], s.group if split == "channels" else 1, threads, pieces)
    turns = len(cuts) if pieces == 1 else 1  # a long call comes back after each piece, so that Ctrl-C is noticed
    board = np.zeros(3, np.int64)

    def work(thread: int) -> None:
        this.kernel(BELL, board, cuts, turns, thread, arguments)

    parallel(work, board, len(cuts) - 1, threads)
    return int(board[FOUND])


def threads_for(elements: int) -> int:
    """Threads for an array of so many values."""
    return get_num_threads() if elements >= PARALLEL_FROM else 1


def describe() -> str:
    """The table as text."""
    lines = [f"{'operation':<12}{'family':<10}{'road':<10}kernels (split into)"]
    for (operation, family, road), names in TABLE.items():
        steps = ", ".join(f"{n} ({STEPS[n][1]})" if STEPS[n][1] else n for n in names)
        lines.append(f"{operation:<12}{family:<10}{road:<10}{steps}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
