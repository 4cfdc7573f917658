"""Our own threads over nogil kernels; Numba's threading layers are never started.

Those layers abort when two Python threads use them at once (workqueue) or kill a forked child (omp). A kernel here is serial over
a range of tasks; this module hands ranges to a few daemon threads that wait on a queue, and the caller works on a share itself.
Who computes a task never changes its bits.

- A second Python thread that calls while the workers are busy does all of its tasks itself: nothing waits for another's work.
- A forked child starts with no workers and makes its own at the first call.
- On an exception, Ctrl-C included, no new piece is started and the call returns only after the workers have stopped writing.
- While the interpreter shuts down, everything runs in the calling thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from math import ceil
from pathlib import Path
from queue import SimpleQueue

# kernel(thread, first, last): the tasks first..last, with the workspace of `thread`.
Kernel = Callable[[int, int, int], object]


class _Share:
    """A contiguous range of tasks, done in pieces so that a stop is noticed between them."""

    def __init__(self, kernel: Kernel, thread: int, first: int, last: int, piece: int) -> None:
        self.kernel, self.thread, self.first, self.last, self.piece = kernel, thread, first, last, piece
        self.stop = False
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def work(self) -> None:
        first = self.first
        while first < self.last and not self.stop:
            last = min(first + self.piece, self.last)
            self.kernel(self.thread, first, last)
            first = last

    def work_and_report(self) -> None:
        try:
            self.work()
        except BaseException as error:  # raised again in the calling thread
            self.error = error
        finally:
            self.done.release()


class _Pool:
    """Daemon threads, each with a queue of shares."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.queues: list[SimpleQueue[_Share]] = []

    def grow(self, workers: int) -> int:
        """Try to have this many workers; how many there are."""
        while len(self.queues) < workers:
            queue: SimpleQueue[_Share] = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(queue,), name=f"fastbn-{len(self.queues) + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down, or the system allows no more threads
                break
            self.queues.append(queue)
        return min(workers, len(self.queues))


def _serve(queue: SimpleQueue[_Share]) -> None:
    while True:
        share = queue.get()
        share.work_and_report()
        del share  # do not keep a finished call's arrays alive while waiting


_pool = _Pool()


def _forget_workers() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def parallel(kernel: Kernel, tasks: int, piece: int, threads: int) -> None:
    """Run kernel(thread, first, last) over range(tasks), in contiguous shares, `piece` tasks a call at most.

    Raises
    ------
    BaseException
        Whatever a kernel, or a signal handler meanwhile, raised; after all threads have stopped.
    """
    pool = _pool
    threads = min(threads, tasks)
    if threads <= 1 or sys.is_finalizing() or not pool.busy.acquire(blocking=False):
        return _Share(kernel, 0, 0, tasks, piece).work()
    try:
        threads = 1 + pool.grow(threads - 1)
        bounds = [tasks * k // threads for k in range(threads + 1)]
        shares = [_Share(kernel, k, bounds[k], bounds[k + 1], piece) for k in range(threads)]
        error: BaseException | None = None
        started = 0
        try:
            for queue, share in zip(pool.queues, shares[1:], strict=False):
                queue.put(share)
                started += 1
            shares[0].work()
        except BaseException as raised:
            error = raised
        for share in shares[1 : 1 + started]:
            error = _wait(share, shares, error)
    finally:
        pool.busy.release()
    if error is not None:
        raise error
    return None


def _wait(share: _Share, shares: list[_Share], error: BaseException | None) -> BaseException | None:
    """Wait until a share is done, come what may; the first error so far."""
    while True:
        if error is not None:
            for other in shares:
                other.stop = True
        try:
            share.done.acquire()
            return error or share.error
        except BaseException as raised:  # Ctrl-C while waiting: stop the others, then wait on
            error = error or raised


def _quota() -> int | None:
    """Whole processors that the control group grants, if it limits them."""
    try:
        unified = Path("/sys/fs/cgroup/cpu.max")
        if unified.exists():
            quota, period = unified.read_text().split()[:2]
        else:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text()
        return max(1, ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (OSError, ValueError):  # "max", or no such file: unlimited
        return None


def _available() -> int:
    """Processors this process may use: affinity, then the control group's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _quota() or affinity)


def _from_environment() -> int:
    text = os.environ.get("FASTBN_NUM_THREADS", "")
    if not text:
        return _available()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"FASTBN_NUM_THREADS is {text!r}; set it to a whole number from 1 up, or unset it")
    return min(int(text), _available())


_threads: int | None = None


def get_num_threads() -> int:
    """How many threads a large call uses.

    The smallest of the processors this process may run on, its control group's quota, and FASTBN_NUM_THREADS, unless
    `set_num_threads` was called.

    Raises
    ------
    ValueError
        FASTBN_NUM_THREADS is not a whole number from 1 up.
    """
    global _threads
    if _threads is None:
        _threads = _from_environment()
    return _threads


def set_num_threads(n: int) -> None:
    """Use n threads in large calls from now on; results do not depend on it.

    Parameters
    ----------
    n : int
        From 1 up. More threads than processors are allowed, and slow.

    Raises
    ------
    TypeError, ValueError
        n is not a whole number, or less than 1.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(before)
    """
    global _threads
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n is {n!r} of type {type(n).__name__}; pass a whole number from 1 up")
    if n.__index__() < 1:
        raise ValueError(f"n is {n}; pass a whole number from 1 up")
    _threads = n.__index__()
