"""Fixtures of the GPU tests, and where they run (where.py says by what): on a GPU, or on Numba's CUDA simulator.

Both must be chosen before Numba is imported, so these tests want a process of their own; in others only the tests that need no kernel
are collected. On a GPU that is test_hardware.py and those; the other tests are written for NumPy memory and small blocks, which only the
simulator takes. Compiling for a real GPU (test_ptx.py) happens in subprocesses.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for cupy_standin
from where import chosen

WHERE = chosen(os.environ)
SIMULATED = WHERE == "simulator"
collect_ignore = [] if WHERE == "gpu" else ["test_hardware.py"]
if SIMULATED:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    sys.setswitchinterval(1e-6)  # simulated threads wait for each other all the time: let them take turns often
else:
    names = ["forward", "backward", "blocks", "parts", "host", "sample_weights", "api", "api_errors", "bench"]
    collect_ignore += [f"test_{name}.py" for name in (*names, "failures", "streams", "memory")]


def small_blocks(monkeypatch, persistent):
    """Blocks of 8 threads (two warps of 4), so that small inputs cross warp, block and tile edges."""
    from fastbn.kernels.cuda import plan

    sizes = plan.Sizes(
        threads=8, smallest=4, blocks=6, wide=2, tall=1, persistent=(32, 64) if persistent else (), persistent_threads=8,
        persistent_channels=1, persistent_small=0,
    )  # fmt: skip
    monkeypatch.setattr(plan, "DEFAULT", sizes)
    monkeypatch.setattr("fastbn.arguments.plans._plans", {})  # which know how large blocks are


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in for CuPy, which the public functions take for it; blocks are small."""
    import cupy_standin

    from fastbn.cuda import loading, streams

    small_blocks(monkeypatch, True)
    module = cupy_standin.module()
    known = replace(loading.kernels(), arrays=module)
    monkeypatch.setattr(loading, "kernels", lambda: known)
    monkeypatch.setattr(streams, "_workspaces", {})
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def backend(cupy, monkeypatch):
    """The functions over flat arrays (flat.py), with or without the kernels that hold a channel in a block's registers."""
    import flat

    from fastbn.cuda import backend as gpu

    run = gpu.run
    monkeypatch.setattr(flat, "JOBS", [])
    monkeypatch.setattr(gpu, "run", lambda setting, steps, job: flat.JOBS.append(job) or run(setting, steps, job))

    def choose(persistent):
        small_blocks(monkeypatch, persistent)
        return flat

    return choose


def _bfloat16(values):
    """float32 values rounded to bfloat16 (to nearest, ties to even), as uint16."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode(values, dtype):
    """values as the array that the backend takes for a dtype."""
    return _bfloat16(values) if dtype == "bfloat16" else np.asarray(values).astype(dtype)


def decode(array, dtype):
    """The values of such an array in longdouble."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.longdouble)


def _channel(values):
    return np.asarray(values, np.longdouble)[None, :, None]


def forward(x, gamma, beta, mean=None, var=None, eps=1e-5, residual=None, relu=False):
    """y, mean, biased variance of (N, C, S) data in longdouble: the plain formula."""
    if mean is None:
        mean = x.mean(axis=(0, 2))
        var = ((x - _channel(mean)) ** 2).mean(axis=(0, 2))
    y = (x - _channel(mean)) / np.sqrt(_channel(var) + np.longdouble(eps)) * _channel(gamma) + _channel(beta)
    if residual is not None:
        y = y + residual
    return (np.maximum(y, 0) if relu else y), np.asarray(mean), np.asarray(var)


def backward(x, dy, gamma, mean, var, eps=1e-5, frozen=False):
    """dx, dgamma, dbeta and the sums of their terms' sizes, in longdouble."""
    invstd = 1 / np.sqrt(_channel(var) + np.longdouble(eps))
    xhat = (x - _channel(mean)) * invstd
    dgamma, dbeta = (dy * xhat).sum(axis=(0, 2)), dy.sum(axis=(0, 2))
    n = x.shape[0] * x.shape[2]
    inner = dy if frozen else dy - (_channel(dbeta) + xhat * _channel(dgamma)) / n
    sizes = np.abs(dy * xhat).sum(axis=(0, 2)), np.abs(dy).sum(axis=(0, 2))
    return _channel(gamma) * invstd * inner, dgamma, dbeta, *sizes


@pytest.fixture
def exact():
    """The reference and the conversions between its values and arrays."""
    return SimpleNamespace(forward=forward, backward=backward, encode=encode, decode=decode)
