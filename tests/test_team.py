"""How a call is cut into pieces, and how threads share it: every task once, whoever comes."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import subprocesses
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from fastbn.cpu import dispatch
from fastbn.cpu.crew import Crew
from fastbn.kernels import rows
from fastbn.kernels.cpu import atomics, team, variants
from fastbn.kernels.cpu.arguments import PLACES, ForwardArrays, Shape, whole_lines


def count(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """A kernel of which each task leaves its thread, and how often it was computed."""
    for task in range(first, last):
        partial[0, 0, task] += 1.0
        partial[0, 1, task] = thread
    return last - first


def nothing(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """A kernel that finds nothing, and takes about a microsecond a task."""
    for task in range(first, last):
        sum_ = 0.0
        for k in range(300):
            sum_ += 1.0 / (1.0 + sum_ + k)
        partial[0, 2, task] += 1.0
        partial[0, 3, task] = sum_
    return 0


class Partial:
    """What kernels take in their simplest form, with `tasks` channels: row k is ``partial[0, k]``."""

    def __init__(self, tasks):
        self.workspace = np.zeros(whole_lines(4 * tasks))
        self.rows = self.workspace[: 4 * tasks].reshape(4, tasks)
        shape = dict.fromkeys(Shape._fields, 0) | {"C": tasks, "blocks": 1}
        there = {"x", "y", "gamma", "beta", "mean", "var", "low", "table"}
        arrays = [self.workspace if name == "workspace" else np.empty(0) if name in there else None for name in ForwardArrays._fields]
        constants = np.zeros(PLACES + 3, np.int64)
        constants[: len(shape)] = [*shape.values()]
        self.arguments = tuple(arrays), (None, True, None), (1.0, 0.0, 1.0, 1.0, False, False), constants

    def __getitem__(self, row):
        return self.rows[row].tolist()


def compiled(name, *kernels):
    return variants.compiled(name, kernels, "float64", ("lanes64",))


@pytest.fixture(scope="module")
def three():
    return compiled("three", nothing, count, nothing)


@pytest.fixture
def crew():
    """Two threads and a desk of their own."""
    made = Crew()
    made.gather(2)
    yield made
    made.dismiss()


def call(code, desk, cuts_of_phases, partial, members=1, first=0, last=None):
    """(phase, found) of a call."""
    cuts = dispatch._table(cuts_of_phases, WORK)
    found = code(desk, cuts, members, first, len(cuts_of_phases) if last is None else last, *partial.arguments)
    return found % rows.PHASES, found // rows.PHASES


WORK = 1 << 10  # a call that is worth waking threads for
NOBODY = np.empty(0, np.int64)  # the desk of a call that is not shared is not looked at


def test_a_program_runs_its_kernels_in_order_until_one_finds_something(three):
    partial = Partial(10)
    assert call(three, NOBODY, ([0, 4], [0, 10], [0, 10]), partial) == (1, 10)
    assert partial[2] == [1.0] * 4 + [0.0] * 6
    assert partial[0] == [1.0] * 10
    assert call(three, NOBODY, ([0, 4], [0, 0], [0, 10]), partial) == (0, 0)
    assert partial[2] == [3.0] * 4 + [1.0] * 6


def test_some_of_the_phases_and_some_of_the_tasks(three):
    partial = Partial(10)
    assert call(three, NOBODY, ([0], [2, 5, 9], [0]), partial, 1, 1, 2) == (1, 7)
    assert partial[0] == [0.0] * 2 + [1.0] * 7 + [0.0]
    assert partial[2] == [0.0] * 10


def test_every_task_once(three, crew):
    """Whoever comes: 300 calls with three seats, of which the threads take some."""
    cuts, seats = [*range(0, 1000, 7), 1000], 0
    for _ in range(300):
        partial = Partial(1000)
        assert call(three, crew.desk, (cuts, cuts, cuts), partial, 3) == (1, 1000)
        assert partial[0] == partial[2] == [1.0] * 1000
        assert set(partial[1]) <= {0.0, 1.0, 2.0}
        assert not crew.desk[[rows.OWNER, rows.INSIDE]].any()
        seats += crew.desk[rows.SEATS]
    assert crew.desk[rows.JOB] % 2 == 0
    assert seats > 0, "no thread ever came"


def test_threads_take_part(three):
    """Sooner or later, also after they have slept; or the tests of this module would hold nothing."""
    crew = Crew()
    crew.gather(1)
    for _ in range(2):
        stop = time.perf_counter() + 30
        computed, partial = set(), Partial(1000)
        while computed != {0.0, 1.0}:
            assert time.perf_counter() < stop, "no thread came"
            call(three, crew.desk, ([*range(1001)], [*range(1001)], [0]), partial, 2, 0, 2)
            computed |= set(partial[1])
        time.sleep(0.05)
    crew.dismiss()


def test_a_desk_that_is_taken(three, crew):
    """Who finds another's call there does all the work itself; nobody's work gets mixed up."""
    cuts = [*range(0, 1000, 7), 1000]

    def caller(_):
        for _ in range(100):
            partial = Partial(1000)
            if call(three, crew.desk, (cuts, cuts, cuts), partial, 3) != (1, 1000) or partial[0] != [1.0] * 1000:
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(caller, range(6)))
    crew.desk[rows.OWNER] = 1
    jobs, partial = int(crew.desk[rows.JOB]), Partial(1000)
    assert call(three, crew.desk, (cuts, cuts, cuts), partial, 3) == (1, 1000)
    assert set(partial[1]) == {0.0}
    assert crew.desk[rows.JOB] == jobs


def test_no_more_seats_than_members(three, crew):
    cuts = [*range(0, 1000, 7), 1000]
    for _ in range(300):
        partial = Partial(1000)
        call(three, crew.desk, (cuts, cuts, cuts), partial, 2)
        assert set(partial[1]) <= {0.0, 1.0}


def test_threads_leave(three):
    """At STOP, be they awake or asleep when it is set, and called once more."""
    before = threading.active_count()
    crew = Crew()
    crew.gather(2)
    assert threading.active_count() == before + 2
    crew.dismiss()
    stop = time.perf_counter() + 30
    while threading.active_count() > before:
        assert time.perf_counter() < stop
        call(three, crew.desk, ([0, 1], [0, 0], [0, 1]), Partial(1), 3)
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are moved on Linux alone")
def test_a_thread_forbids_itself_a_processor():
    """And has it again; not its only one, nor one that it never had."""
    allow = njit(lambda number, allowed: atomics.allow(number, allowed))

    def trying():
        all_ = os.sched_getaffinity(0)
        first, others = min(all_), all_ - {min(all_)}
        steps = [(first, False), (first, False), (first, True), (first, True), (1023, False), (-1, False)]
        return [(allow(*step), os.sched_getaffinity(0)) for step in steps], all_, others

    with ThreadPoolExecutor(1) as pool:
        found, all_, others = pool.submit(trying).result()
    moved = bool(others)
    assert found[:4] == [(moved, others or all_), (False, others or all_), (moved, all_), (False, all_)]
    assert found[4:] == [(False, all_)] * 2


def test_names_of_machine_code_differ():
    """Two kernels of the same signature, loaded into one process, must not be taken for each other."""
    a, b = team.program("a", (count,), None), team.program("b", (nothing,), None)
    assert a.__qualname__ != b.__qualname__


def test_every_program_has_boards_for_its_phases():
    assert all(len(names) <= rows.PHASES for names in dispatch.TABLE.values())


@given(st.integers(0, 100), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64))
def test_cuts(first, tasks, unit, threads):
    first *= unit
    cuts = dispatch.cut(first, first + tasks, unit, threads)
    assert (cuts[0], cuts[-1]) == (first, first + tasks)
    assert all(a < b for a, b in pairwise(cuts))
    assert all(k % unit == 0 for k in cuts[:-1])
    assert len(cuts) - 1 <= (1 if threads == 1 else threads * (dispatch.SHARES + 8))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_calls_of_a_schedule(pieces, threads):
    """Short: all phases in one. Long: several a phase, which together are all tasks once, in order, at whole groups of channels."""
    program = dispatch.program("forward", "planes", "channels", "float32", ("lanes32",))
    tasks, shape = {"channels": 100, "": 1}, Shape(*[8] * len(Shape._fields))
    calls = dispatch._cuts(program, dispatch.Schedule("channels", tasks, pieces, shape, 5), threads)
    if pieces == 1:
        assert [call[:2] for call in calls] == [(0, 2)]
    found = {phase: [] for phase in range(2)}
    for first, last, cuts in calls:
        assert cuts[0] == 5
        for phase in range(first, last):
            number, begin = cuts[2 * phase + 1 : 2 * phase + 3]
            found[phase] += pairwise(cuts[begin : begin + number + 1].tolist())
    for phase, n in enumerate((100, 1)):
        assert [a for a, _ in found[phase]] == [0, *(b for _, b in found[phase][:-1])]
        assert found[phase][-1][1] == n
    assert all(a % 8 == 0 for a, _ in found[0])
    assert len(calls) >= pieces


def test_the_work_of_other_tests_is_for_several_threads():
    for name, (shape, _) in subprocesses.WORK.items():
        assert (np.prod(shape) >= dispatch.PARALLEL_FROM) == (name != "small")
