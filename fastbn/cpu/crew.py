"""Threads that take part in calls; Numba's threading layers are never started.

Those layers abort when two Python threads use them at once (workqueue) or kill a forked child (omp). Here a call is one call of
machine code, or a few for a long one. It is laid on a desk, where threads look that wait in machine code (kernels/cpu/desk.py). Between two
of these calls no thread is at work, so Ctrl-C and errors find nothing to clean up.

- The caller takes what nobody else takes. It returns when no thread is at its call.
- A second Python thread that calls meanwhile does all of its work itself.
- A forked child starts with a crew of its own at its first call.
- While the interpreter shuts down, everything runs in the calling thread.

A thread that found no call for some milliseconds sleeps, and so does one whose processor others want. A later call wakes it, which takes 30
to 100 us; a short call after a pause does not, as it would not win that back.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import processors
from fastbn.cpu.threads import importing
from fastbn.cpu.uninterrupted import uninterrupted
from fastbn.kernels.rows import DESK, PATIENCE, SLEEPERS, STOP

# For how long threads wait for the next call before they sleep, unless FASTBN_WAIT_MS says otherwise; and a turn of waiting.
WAIT_MS, LONGEST_MS, TURN_MS = 5.0, 1000.0, 0.01


def wait_ms() -> float:
    """Milliseconds for which threads wait in their processors for the next call: FASTBN_WAIT_MS, or 5.

    Raises
    ------
    ValueError
        FASTBN_WAIT_MS is not a number from 0 to 1000.
    """
    text = os.environ.get("FASTBN_WAIT_MS", "")
    try:
        ms = float(text or WAIT_MS)
    except ValueError:
        ms = -1.0
    if not 0.0 <= ms <= LONGEST_MS:
        raise ValueError(f"FASTBN_WAIT_MS is {text!r}; set it to milliseconds from 0 to {LONGEST_MS:.0f}, or unset it")
    return ms


def what_threads_run() -> tuple[Callable[[NDArray[np.int64]], int], bool]:
    """The machine code that threads wait in, and whether it sleeps by itself; compiled, or loaded from disk, the first time."""

    def load() -> tuple[Any, bool]:
        with importing:  # not inherited half done by a forked child
            from fastbn.kernels.cpu.atomics import FUTEX
            from fastbn.kernels.cpu.variants import serve

        return serve(), bool(FUTEX)  # type: ignore[no-untyped-call]

    return uninterrupted(load)


class Crew:
    """The threads of a process, and their desk."""

    def __init__(self) -> None:
        self.desk: NDArray[np.int64] = np.zeros(DESK, np.int64)
        self.hired, self.most = 0, 1 << 10
        self.sleeps_in_kernel = True  # of the system; else in `asleep`
        self.asleep: SimpleQueue[None] = SimpleQueue()

    def gather(self, others: int) -> None:
        """See that there are so many threads besides the caller's, or as many as the system allows."""
        if self.hired < min(others, self.most):
            self._hire(others)
        if not self.sleeps_in_kernel and self.desk[SLEEPERS]:
            self.desk[SLEEPERS] = 0
            for _ in range(others):
                self.asleep.put(None)

    def _hire(self, others: int) -> None:
        """Start threads. Where there are more than processors they sleep at once: they would keep others from working."""
        turns = int(wait_ms() / TURN_MS)
        self.desk[PATIENCE] = turns if others < processors.available() else 0
        serve, self.sleeps_in_kernel = what_threads_run()
        while self.hired < min(others, self.most):
            thread = threading.Thread(target=_stand_by, args=(serve, self.desk, self.asleep), name=f"fastbn-{self.hired + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down, or the system allows no more threads
                self.most = self.hired
                return
            self.hired += 1  # not before: Ctrl-C may strike in between, and a thread too many does no harm

    def dismiss(self) -> None:
        """Send away threads that do not sleep, and start no new ones."""
        self.most = 0
        self.desk[STOP] = 1


def _stand_by(serve: Callable[[NDArray[np.int64]], int], desk: NDArray[np.int64], asleep: SimpleQueue[None]) -> None:
    """What a thread does. It comes back from `serve` to sleep where machine code cannot."""
    serve(desk)
    while not desk[STOP]:
        asleep.get()
        serve(desk)


crew = Crew()


def _after_fork_in_child() -> None:
    global crew
    crew = Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(lambda: crew.dismiss())
