"""Host microseconds of a GPU call up to its launches, with no GPU: NUMBA_ENABLE_CUDASIM=1 python bench/gpu_host.py

CuPy is the tests' stand-in over NumPy memory and launching does nothing, so this is the cost of checking, planning and packing arguments,
with the stand-in's allocations for CuPy's. The launcher's own time comes on top, and CuPy's arrays are not the stand-in's: no more than a
hint of what a GPU's host pays, which bench/gpu.py measures.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from timeit import repeat

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
import cupy_standin

import fastbn
from fastbn import cuda_backend
from fastbn.kernels.cuda import host, launch

CALLS, ROUNDS = 300, 7


def main() -> None:
    module = cupy_standin.module()
    known = replace(host.kernels(), arrays=module, simulated=False)  # arguments as pointers, not the simulator's views
    host.kernels = cuda_backend.kernels = lambda: known
    launch.ready = launch.launch = lambda *arguments: None
    x = cupy_standin.on_device(np.zeros((32, 64, 8, 8), np.float32))
    gamma, beta, mean, var = (cupy_standin.on_device(np.ones(64, np.float32)) for _ in range(4))
    out = module.empty_like(x)
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta)
    for name, call in {
        "forward": lambda: fastbn.batch_norm_forward(x, gamma, beta, mean, var, out=out),
        "inference": lambda: fastbn.batch_norm_inference(x, gamma, beta, mean, var, out=out),
        "backward": lambda: fastbn.batch_norm_backward(x, ctx, out=out),
    }.items():
        print(f"{name:<10}{min(repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6:7.1f} us")


if __name__ == "__main__":
    main()
