"""Where a call's kernels run, CuPy's current stream, and the workspace that the kernels of a stream share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda import loading
from fastbn.cuda.memory import flat

# CUDA's handles of the two default streams. CuPy says 0 for the first, which libraries can be told to take for the second; 1 they cannot.
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
MOST_WORKSPACES = 256


class Stream(NamedTuple):
    """CuPy's current device and stream: what a workspace belongs to.

    `thread` tells per-thread default streams apart, which all have the handle 2; it is 0 for others, which threads may share.
    """

    device: int
    handle: int
    thread: int = 0


@dataclass
class Workspace:
    """Partial results and counters of one stream, as kernels take them. Kernels of one stream run one after the other, and share it.

    What is replaced by something larger is given back to CuPy's pool while kernels that use it may still be queued. That is right, as
    the pool orders by stream: it gives the memory to arrays that are made on the same stream, whose kernels come later. The counters
    are set to 0 on that stream too. So are they where two Python threads share a stream, as the lock is held until the zeros are queued.
    """

    partials: Any = None
    counters: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_workspaces: dict[Stream, Workspace] = {}
_lock = threading.Lock()
_threads = threading.local()
_SIMULATED = Stream(0, 0)


def stream() -> Stream:
    """CuPy's current device and stream, whose context is current in this thread; device 0 and handle 0 in the simulator."""
    kernel = loading.kernels()
    if kernel.simulated:
        return _SIMULATED
    cuda = kernel.arrays.cuda
    device = cuda.runtime.getDevice()
    known = _threads.__dict__.setdefault("devices", set())
    if device not in known:
        # In a thread that has not used CUDA yet no context is current, and the driver launches nothing. CuPy's own calls see to that by
        # themselves, but a call whose memory comes from the pool makes none.
        cuda.runtime.setDevice(device)
        known.add(device)
    handle = cuda.get_current_stream().ptr or LEGACY_STREAM
    return Stream(device, handle, threading.get_ident() if handle == PER_THREAD_STREAM else 0)


def workspace(partials: int, counters: int, where: Stream) -> Workspace:
    """The stream's workspace with room for that many float64 and int32; the counters are 0 between launches.

    Of more than MOST_WORKSPACES streams, which a program that makes and drops streams or threads comes to, the oldest gives its own
    back; that is right for the same reason as replacing it is. Where a dropped stream's handle is given to a new stream while the old
    one's kernels still run, both would share a workspace, as they share CuPy's pool: synchronise a stream before dropping it.
    """
    with _lock:
        space = _workspaces.get(where)
        if space is None:
            while len(_workspaces) >= MOST_WORKSPACES:
                del _workspaces[next(iter(_workspaces))]
            space = _workspaces[where] = Workspace()
    with space.lock:
        if space.partials is None or space.partials.size < partials:
            space.partials = flat(loading.kernels().arrays.empty(partials, np.float64))
        if space.counters is None or space.counters.size < counters:
            space.counters = flat(loading.kernels().arrays.zeros(counters, np.int32))
    return space
