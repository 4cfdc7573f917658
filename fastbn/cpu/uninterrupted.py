"""Imports and compilation out of reach of Ctrl-C.

Python runs signal handlers in the main thread, between any two bytecodes. Inside Numba that can leave it unusable for the rest of the
process: a signature left on the compiler's stack of frames ("compiler re-entrant to the same function signature"), a module imported
half that cannot be imported again ("duplicate registration"). So the main thread lets another thread do such work, and waits: the
wait ends with KeyboardInterrupt at once, the work goes on to its end, and the next call finds it done.
"""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import threading
from collections.abc import Callable
from mmap import mmap
from typing import Any, TypeVar

Result = TypeVar("Result")

# Address space that compiling may take; a kernel takes about 40 MB. LLVM ends the process when it finds none.
MEMORY = 128 << 20
# Seconds in which a new thread begins, or the caller does the work: without memory for its first call, a thread ends unheard.
PATIENCE = 1.0


class _Work:
    """A piece of work that whoever claims it first does, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.owner: dict[str, str] = {}
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def claim(self, who: str) -> bool:
        return self.owner.setdefault("owner", who) == who

    def run(self) -> None:
        """What the thread does."""
        if self.claim("thread"):
            try:
                self.result = self.work()
            except BaseException as error:  # raised again in the main thread
                self.error = error
            finally:
                _running.pop(self, None)
                self.done.release()


# What threads are at. At exit the interpreter waits for them, rather than unload LLVM under their feet. (`threading.Thread` would be
# waited for by itself, but its `start` never returns where memory is too short for the thread to begin.)
_running: dict[_Work, None] = {}


def _wait_for_threads() -> None:
    for work in list(_running):
        if not work.claim("nobody"):
            work.done.acquire()


def _forget_threads() -> None:
    """In a forked child, where none of them is: nobody shall wait for one."""
    for work in list(_running):
        work.error = RuntimeError("the process was forked while a kernel was made ready for it; call again")
        work.done.release()
    _running.clear()


atexit.register(_wait_for_threads)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def uninterrupted(work: Callable[[], Result]) -> Result:
    """What work() returns or raises; it runs to its end though a signal handler raise in the main thread meanwhile.

    It runs in the calling thread where no signals come (any but the main one), where another thread could wait for this one for
    ever (`_others_may_wait`), and where no thread begins (no memory, or the interpreter ends).

    Raises
    ------
    MemoryError
        There is too little for a compiler.
    """
    try:
        mmap(-1, MEMORY).close()
    except OSError:
        text = f"there are no {MEMORY >> 20} MB of memory to compile a kernel; free some, or call fastbn.warmup earlier"
        raise MemoryError(text) from None
    if threading.current_thread() is not threading.main_thread() or _others_may_wait():
        return work()
    task = _Work(work)
    _running[task] = None
    try:
        _thread.start_new_thread(task.run, ())
    except RuntimeError:
        _running.pop(task, None)
        return work()
    if not task.done.acquire(timeout=PATIENCE):
        if task.claim("caller"):
            _running.pop(task, None)
            return work()
        task.done.acquire()
    error, task.error = task.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error  # or the frame and the error would keep each other, and what they hold, alive
    return task.result  # type: ignore[no-any-return]


def _others_may_wait() -> bool:
    """Whether this thread holds Numba's lock, or is in the middle of an import: a `__del__` may call fastbn anywhere."""
    numba = sys.modules.get("numba.core.compiler_lock")
    if numba is not None and numba.global_compiler_lock.is_locked():  # by this thread
        return True
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
