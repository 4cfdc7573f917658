"""Our own threads over nogil kernels; Numba's threading layers are never started.

Those layers abort when two Python threads use them at once (workqueue) or kill a forked child (omp). A call here is cut into pieces,
which its threads take from a board, one by one, until there are none (kernels/cpu/team.py): the caller, and a few daemon threads that wait
on a queue each. Who computes a piece never changes its bits.

- The caller takes what no worker has begun, so nothing ever depends on a worker, and returns when all pieces are computed, without
  waiting for the workers to come back.
- A second Python thread that calls while the workers are busy does all of its tasks itself: nothing waits for another's work.
- A forked child starts with no workers and makes its own at the first call.
- On an exception, Ctrl-C included, no new piece is started and the call returns only after the workers have stopped writing.
- While the interpreter shuts down, everything runs in the calling thread.
"""

from __future__ import annotations

import logging  # noqa: F401  (before the fork hooks below: its own hook then runs after them, and an import can end that wants its lock)
import os
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cpu import processors
from fastbn.kernels.rows import DONE, NEXT

Board = NDArray[np.int64]

# work(thread): take pieces from the call's board and compute them, until there are none or it is time to look for signals.
Work = Callable[[int], object]


class _Stop:
    """Set once no further piece of a call shall begin."""

    wanted = False


class _Share:
    """The part of one thread in a call: as many pieces as it gets hold of."""

    def __init__(self, work: Work, board: Board, pieces: int, stop: _Stop, thread: int) -> None:
        self.take, self.board, self.pieces, self.stop, self.thread = work, board, pieces, stop, thread
        self.owner: dict[str, str] = {}
        self.finished = False  # by a worker
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def claim(self, who: str) -> bool:
        """Whether the share is ("caller" or "worker") who's. One atomic step, and asking again gives the same answer."""
        return self.owner.setdefault("owner", who) == who

    def work(self) -> None:
        while self.board[NEXT] < self.pieces and not self.stop.wanted:
            self.take(self.thread)

    def work_and_report(self) -> None:
        if not self.claim("worker"):
            return
        try:
            self.work()
        except BaseException as error:  # raised again in the calling thread
            self.error = error
        finally:
            self.finished = True
            self.done.release()

    def wait(self) -> None:
        """Return once no worker is at this share, nor will be. An interrupted wait can be repeated."""
        if not self.claim("caller"):
            while not self.finished:
                self.done.acquire()


class _Call:
    """One kernel over its pieces, in as many shares as there are threads; the first is the caller's."""

    def __init__(self, work: Work, board: Board, pieces: int, threads: int) -> None:
        self.stop = _Stop()  # shares do not know the call: a cycle would keep its arrays until the garbage collector comes
        self.board, self.pieces = board, pieces
        self.shares = [_Share(work, board, pieces, self.stop, k) for k in range(threads)]

    @property
    def complete(self) -> bool:
        """Whether all pieces are computed. A worker may still be on its way back, but writes nothing any more."""
        return bool(self.board[DONE] >= self.pieces)

    def wait(self) -> None:
        """Return once no piece is being computed."""
        if not self.complete:
            for share in self.shares[1:]:
                share.wait()

    def settle(self) -> None:
        """The same, however often Ctrl-C is pressed meanwhile."""
        while True:
            try:
                self.wait()
                return
            except BaseException:
                self.stop.wanted = True  # the exception that matters is on its way up already

    def raise_errors(self) -> None:
        """Raise the first error of a worker."""
        for share in self.shares:
            error, share.error = share.error, None
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # or the frame and the error would keep each other, and the call's arrays, alive


class _Pool:
    """Daemon threads, each with a queue of shares."""

    def __init__(self) -> None:
        # The call that the workers are at. Not a lock: Ctrl-C between acquiring one and noting it would leave it locked for ever.
        self.at: dict[str, _Call] = {}
        self.queues: list[SimpleQueue[_Share]] = []

    def take(self, call: _Call) -> bool:
        """Whether the workers are for this call; False where they are busy with another."""
        return self.at.setdefault("call", call) is call

    def grow(self, workers: int) -> None:
        """Try to have this many workers."""
        while len(self.queues) < workers:
            queue: SimpleQueue[_Share] = SimpleQueue()
            thread = threading.Thread(target=_serve, args=(queue,), name=f"fastbn-{len(self.queues) + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is shutting down, or the system allows no more threads
                return
            self.queues.append(queue)


def _serve(queue: SimpleQueue[_Share]) -> None:
    while True:
        share = queue.get()
        share.work_and_report()
        del share  # do not keep a finished call's arrays alive while waiting


_pool = _Pool()
# Rung by callers, heard by workers that linger (kernels/cpu/team.py).
BELL = np.zeros(1, np.int64)

# Held while kernels' modules are imported, which takes a second at first and starts with Numba.
importing = threading.RLock()
_held = threading.local()


def _compiler_lock() -> Any:
    """The lock under which Numba compiles, once Numba is there."""
    return getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)


def _before_fork() -> None:
    """Wait until no thread imports or compiles: a child would inherit modules that are half there, a compiler stopped in the
    middle, and locks of a thread that it does not have.

    A thread that imports may want Numba's lock, and a thread that compiles may want ours. So nothing is held while waiting for long.
    """
    while True:
        compiler = _compiler_lock()
        if compiler is not None:
            compiler.acquire()
        if importing.acquire(timeout=0.01):
            if compiler is not None or _compiler_lock() is None:
                _held.locks = [importing] if compiler is None else [compiler, importing]
                return
            importing.release()  # Numba has come meanwhile
        if compiler is not None:
            compiler.release()


def _after_fork() -> None:
    while _held.locks:
        _held.locks.pop().release()


def _after_fork_in_child() -> None:
    global _pool
    _pool = _Pool()
    _default_threads.cache_clear()  # a child may be pinned to other processors than its parent
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def parallel(work: Work, board: Board, pieces: int, threads: int) -> None:
    """Let threads compute the pieces of a call.

    Parameters
    ----------
    work : callable
        work(thread) takes pieces: it adds 1 to board[NEXT] for each that it begins, and 1 to board[DONE] when that is computed. It may
        return before there are none left, and is then called again.
    board : int64 array
        Zeros.
    pieces, threads : int

    Raises
    ------
    BaseException
        Whatever a kernel, or a signal handler meanwhile, raised; after all threads have stopped.
    """
    pool = _pool
    threads = min(threads, pieces)
    if threads <= 1 or sys.is_finalizing():
        threads = 1
    call = _Call(work, board, pieces, threads)
    try:
        try:
            if threads > 1 and pool.take(call):
                pool.grow(threads - 1)
                for queue, share in zip(pool.queues, call.shares[1:], strict=False):
                    queue.put(share)
            call.shares[0].work()
            call.wait()
        except BaseException:
            call.stop.wanted = True
            raise
        finally:
            call.settle()
    finally:
        # Ctrl-C strikes when functions are called, and as this calls none, the pool is given back for certain.
        if "call" in pool.at and pool.at["call"] is call:
            del pool.at["call"]
        call.settle()  # again: a second Ctrl-C may have struck on the way into the first
    call.raise_errors()


@lru_cache(maxsize=1)
def _default_threads() -> int:
    """The smallest of affinity, control groups' quota and FASTBN_NUM_THREADS."""
    available = processors.available()
    text = os.environ.get("FASTBN_NUM_THREADS", "")
    if not text:
        return available
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"FASTBN_NUM_THREADS is {text!r}; set it to a whole number from 1 up, or unset it")
    return min(int(text), available)


_threads: int | None = None


def get_num_threads() -> int:
    """How many threads a large call uses.

    The smallest of the processors this process may run on, its control groups' quota, and FASTBN_NUM_THREADS, unless
    `set_num_threads` was called. Looked up once, and again in a forked child.

    Raises
    ------
    ValueError
        FASTBN_NUM_THREADS is not a whole number from 1 up.
    """
    return _threads or _default_threads()


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
