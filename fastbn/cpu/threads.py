"""How many threads a large call uses, and what a fork waits for. The threads themselves: fastbn/cpu/crew.py."""

from __future__ import annotations

import logging  # noqa: F401  (before the fork hooks below: its own hook then runs after them, and an import can end that wants its lock)
import os
import sys
import threading
from functools import lru_cache
from typing import Any

from fastbn.cpu import processors

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
    _default_threads.cache_clear()  # a child may be pinned to other processors than its parent
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


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
