"""Host microseconds of a GPU call, with no GPU: NUMBA_ENABLE_CUDASIM=1 python bench/gpu_host.py

A call is checked and planned, its outputs are allocated, its arguments are packed as words; launching does nothing. Arrays are CuPy's own
where CuPy is installed, over NumPy's memory, with an allocator that hands out one address and a current device and stream that are given
without asking the driver; else the tests' stand-in. So no driver's time is in here, nor that of CuPy's memory pool, nor of cuda.core's
launch (see kernels/cuda/launch.py). `arrays` is what asking the arrays for their shape, strides, dtype and address, and making the call's
own, costs by itself: the library's share. bench/gpu.py measures what a GPU's host pays.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from timeit import repeat
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
import cupy_standin

import fastbn
from fastbn.cuda import loading, streams
from fastbn.kernels.cuda import launch

CALLS, ROUNDS = 1000, 15
SHAPES = {"two launches": (32, 64, 56, 56), "one launch": (32, 512, 14, 14)}


def arrays_of_cupy() -> tuple[Any, Callable[[np.ndarray], Any]]:
    """CuPy with nothing behind it, and what makes its arrays over NumPy's memory."""
    import cupy

    memory = cupy.cuda.memory
    somewhere = memory.UnownedMemory(1 << 40, 1 << 40, None, 0)
    cupy.cuda.set_allocator(lambda size: memory.MemoryPointer(somewhere, 0))
    cupy.cuda.runtime.getDevice, cupy.cuda.runtime.setDevice = lambda: 0, lambda device: None
    current = SimpleNamespace(ptr=0)
    cupy.cuda.get_current_stream = lambda: current

    def over(a: np.ndarray) -> Any:
        owner = memory.UnownedMemory(a.ctypes.data, a.nbytes, a, 0)
        return cupy.ndarray(a.shape, a.dtype, memory.MemoryPointer(owner, 0))

    streams._workspaces[streams.Stream(0, streams.LEGACY_STREAM)] = full = streams.Workspace()
    full.partials = full.counters = launch.DeviceArray(1 << 40, 1 << 20, 8, "<f8")  # zeros would be a kernel of CuPy's
    return cupy, over


def packed(variant: Any, blocks: int, threads: int, device: int, stream: int, arguments: list[Any]) -> None:
    """A launch up to the driver's call."""
    launch.flat(arguments)


def microseconds(call: Callable[[], Any]) -> float:
    return min(repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def asked(*arrays: Any) -> None:
    """What a call asks each of its arrays."""
    for a in arrays:
        memory = a.data
        _ = memory.device_id, memory.ptr, a.shape, a.strides, a.dtype


def calls(xp: Any, over: Callable[[np.ndarray], Any], shape: tuple[int, ...]) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """(name, call, what its arrays do in it) of each function."""
    C = shape[1]
    x, out = over(np.zeros(shape, np.float32)), over(np.zeros(shape, np.float32))
    channels = [over(np.ones(C, np.float32)) for _ in range(4)]
    _, ctx = fastbn.batch_norm_forward(x, *channels[:2])

    def made(*sizes: Any) -> None:
        for size in sizes:
            xp.empty(size, np.float32)

    return [
        ("forward", lambda: fastbn.batch_norm_forward(x, *channels), lambda: (asked(x, *channels), made(shape, (10, C)))),
        ("inference", lambda: fastbn.batch_norm_inference(x, *channels, out=out), lambda: asked(x, *channels, out)),
        ("backward", lambda: fastbn.batch_norm_backward(x, ctx, out=out), lambda: (asked(x, x, out), made((7, C), C, C))),
    ]


def main() -> None:
    real = importlib.util.find_spec("cupy") is not None
    known = replace(loading.kernels(), simulated=False)  # arguments as pointers, not the simulator's views
    loading.kernels = lambda: known
    xp, over = arrays_of_cupy() if real else (cupy_standin.module(), cupy_standin.on_device)
    known = replace(known, arrays=xp)
    launch.ready, launch.launch = lambda *arguments: None, packed
    print(f"CuPy {xp.__version__}" if real else "the tests' stand-in for CuPy")
    print(f"{'':<26}{'all':>9}{'arrays':>9}{'ours':>9}   us")
    for title, shape in SHAPES.items():
        for name, call, own in calls(xp, over, shape):
            whole, arrays = microseconds(call), microseconds(own)
            print(f"{title + ', ' + name:<26}{whole:9.1f}{arrays:9.1f}{whole - arrays:9.1f}")


if __name__ == "__main__":
    main()
