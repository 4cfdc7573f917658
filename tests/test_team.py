"""How a call is cut into pieces, and how threads take them from a board: every task once, nobody waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import subprocesses
from hypothesis import given
from hypothesis import strategies as st

from fastbn.cpu import dispatch
from fastbn.kernels.cpu import team, variants
from fastbn.kernels.cpu.arguments import PLACES, ForwardArrays, Shape, whole_lines
from fastbn.kernels.rows import DONE, FOUND, NEXT


def count(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """A kernel of which each task leaves its thread, and how often it was computed."""
    for task in range(first, last):
        partial[0, 0, task] += 1.0
        partial[0, 1, task] = thread
    return last - first


def nothing(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """A kernel that finds nothing."""
    for task in range(first, last):
        partial[0, 2, task] += 1.0
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
def work():
    return compiled("count", count)


def call(work, board, cuts, turns, thread, partial, phase=0):
    tasks = np.array([len(partial[0])])
    return work(np.zeros(1, np.int64), board, cuts, len(cuts) - 1, turns, thread, phase, tasks, *partial.arguments)


def alone(code, tasks, partial, turns=None, phase=team.ALL):
    """(phase, found) of a call of all phases; bell, board and cuts are not read."""
    absent = np.empty(0, np.int64)
    found = code(absent, absent, absent, 0, turns or len(tasks), 0, phase, np.array(tasks), *partial.arguments)
    return found % team.PHASES, found // team.PHASES


def test_alone(work):
    partial = Partial(10)
    assert alone(work, (10,), partial) == (0, 10)
    assert partial[0] == [1.0] * 10


def test_a_program_runs_its_kernels_in_order_until_one_finds_something():
    code, partial = compiled("three", nothing, count, nothing), Partial(10)
    assert alone(code, (4, 10, 10), partial) == (1, 10)
    assert partial[2] == [1.0] * 4 + [0.0] * 6
    assert partial[0] == [1.0] * 10
    assert alone(code, (4, 0, 10), partial) == (0, 0)
    assert partial[2] == [3.0] * 4 + [1.0] * 6


def test_one_phase_alone():
    code, partial = compiled("three", nothing, count, nothing), Partial(10)
    assert alone(code, (10, 7, 10), partial, 1, team.ALL - 1 - 1) == (1, 7)
    assert partial[0] == [1.0] * 7 + [0.0] * 3
    assert partial[2] == [0.0] * 10


def test_threads_share_one_phase():
    code, partial, board = compiled("three", nothing, count, nothing), Partial(10), np.zeros(3, np.int64)
    tasks = np.array([10, 10, 10])
    assert code(np.zeros(1, np.int64), board, np.array([0, 10]), 1, 2, 0, 1, tasks, *partial.arguments) == 10
    assert partial[0] == [1.0] * 10
    assert partial[2] == [0.0] * 10


def test_numbers_that_stand_twice():
    """dispatch.py reads results without importing Numba."""
    assert (dispatch._ALL, dispatch.PHASES) == (team.ALL, team.PHASES)
    assert all(len(names) <= team.PHASES for names in dispatch.TABLE.values())


def test_turns(work):
    """A call takes so many pieces at most; the next goes on behind them, and one behind the last takes none."""
    partial, board, cuts = Partial(10), np.zeros(3, np.int64), np.array([0, 3, 6, 9, 10])
    assert call(work, board, cuts, 2, 0, partial) == 6
    assert board.tolist() == [2, 2, 6]
    assert call(work, board, cuts, 5, 1, partial) == 4
    assert call(work, board, cuts, 5, 1, partial) == 0
    assert board[DONE] == 4
    assert board[FOUND] == 10
    assert partial[1] == [0.0] * 6 + [1.0] * 4


def test_every_task_once(work):
    """Eight threads at one board, 200 times."""
    cuts, start = np.arange(0, 1001, 2), threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(200):
            partial, board = Partial(1000), np.zeros(3, np.int64)

            def member(thread, board=board, partial=partial):
                start.wait(timeout=30)
                return call(work, board, cuts, len(cuts), thread, partial)

            assert sum(pool.map(member, range(8))) == 1000
            assert partial[0] == [1.0] * 1000
            assert (board[DONE], board[FOUND]) == (500, 1000)
            assert board[NEXT] >= 500


def test_waiting_ends(work):
    """A caller does not wait for ever for a piece that somebody took and did not compute; nor does a worker for the bell."""
    board = np.array([1, 0, 0])
    for thread in (0, 1):
        assert call(work, board, np.array([0, 1]), 1, thread, Partial(1)) == 0


def test_names_of_machine_code_differ():
    """Two kernels of the same signature, loaded into one process, must not be taken for each other."""
    a, b = team.program("a", (count,), None), team.program("b", (nothing,), None)
    assert a.__qualname__ != b.__qualname__


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 20))
def test_cuts(tasks, unit, threads, least):
    cuts = dispatch.cut(tasks, unit, threads, least)
    sizes = np.diff(cuts)
    assert (cuts[0], cuts[-1]) == (0, tasks)
    assert (sizes > 0).all()
    assert (cuts[:-1] % unit == 0).all()
    units = -(-tasks // unit)
    assert len(sizes) >= min(least, units) / 2  # a piece is rounded up to whole units
    assert sizes.max() <= -(-units // least) * unit
    if threads == 1:
        assert len(sizes) <= least
    else:
        assert len(sizes) <= least + threads * (dispatch.SHARES + 8)


def test_the_work_of_other_tests_is_for_several_threads():
    for name, (shape, _) in subprocesses.WORK.items():
        assert (np.prod(shape) >= dispatch.PARALLEL_FROM) == (name != "small")
