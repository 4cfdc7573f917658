"""Imports and compilation out of reach of Ctrl-C.

Python runs signal handlers in the main thread, between any two bytecodes. Inside Numba that can leave it unusable for the rest of the
process: a signature left on the compiler's stack of frames ("compiler re-entrant to the same function signature"), a module imported
half that cannot be imported again ("duplicate registration"). So the main thread lets another thread do such work, and waits: the
wait ends with KeyboardInterrupt at once, the work goes on to its end, and the next call finds it done.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


def uninterrupted(work: Callable[[], Result]) -> Result:
    """What work() returns or raises; it runs to its end though a signal handler raise in the main thread meanwhile.

    It runs in the calling thread where no signals come (any but the main one), where another thread could wait for this one for
    ever (`_others_may_wait`), and where no thread can be started any more (atexit).
    """
    if threading.current_thread() is not threading.main_thread() or _others_may_wait():
        return work()
    answers: SimpleQueue[tuple[list[Result], BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put(([work()], None))
        except BaseException as error:  # raised again in the main thread
            answers.put(([], error))

    try:
        # Not a daemon: at exit the interpreter waits for it, rather than unload LLVM under its feet.
        threading.Thread(target=run, name="fastbn-compiler").start()
    except RuntimeError:
        return work()
    results, error = answers.get()
    if error is not None:
        try:
            raise error
        finally:
            del error  # or the frame and the error would keep each other alive
    return results[0]


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
