"""What Numba's CUDA simulator lacks, so that kernels run in it unchanged: warp shuffles, `cuda` inside device functions, and shared
arrays that two threads may ask for at once (its own hands out two arrays then, now and again).

A simulated thread is a Python thread. A warp here has 4 lanes, not 32: a block of 8 threads then has two warps, and small inputs
cross warp, block and tile edges. Nothing here is used on a GPU.
"""

import os
import sys
import threading

import numpy as np
from numba import cuda as numba_cuda
from numba.cuda.simulator import kernel as _kernel
from numba.np.numpy_support import as_dtype

WARP = int(os.environ.get("FASTBN_CUDASIM_WARP", "4"))
_PATIENCE = 60.0  # seconds until a lane that waits for one that died gives up
_lock = threading.Lock()


def _warp():
    """The barrier and the exchange slots of this thread's warp, and its lane."""
    thread = threading.current_thread()
    index = thread.thread_id // WARP
    with _lock:
        warps = thread._manager.__dict__.setdefault("_warps", {})
        if index not in warps:
            warps[index] = threading.Barrier(WARP), [None] * WARP
    return warps[index], thread.thread_id % WARP


class _Shared:
    """cuda.shared: an array for each line that asks for one, in each block. It starts as NaN: what is read too early shows."""

    @staticmethod
    def array(shape, dtype):
        """As numba.cuda.shared.array."""
        caller = sys._getframe(1)
        key = caller.f_code.co_filename, caller.f_lineno
        with _lock:
            arrays = threading.current_thread()._manager.__dict__.setdefault("_shared", {})
            if key not in arrays:
                arrays[key] = np.empty(shape, as_dtype(dtype))
                arrays[key].view(np.uint8)[...] = 0xFF
            return arrays[key]


class _Cuda:
    """numba.cuda as a kernel sees it: the running kernel's context where one runs, else the simulator's module."""

    shared = _Shared

    def __getattr__(self, name):
        context = _kernel._get_kernel_context()
        return getattr(numba_cuda if context is None else context, name)

    @staticmethod
    def shfl_down_sync(mask, value, delta):
        """The value of lane + delta; one's own beyond the warp's end."""
        (barrier, slots), lane = _warp()
        slots[lane] = value
        barrier.wait(_PATIENCE)
        result = slots[lane + delta] if lane + delta < WARP else value
        barrier.wait(_PATIENCE)
        return result


cuda = _Cuda()
