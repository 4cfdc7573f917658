"""Which CUDA target Numba has, and how functions are compiled for it.

1. numba-cuda, NVIDIA's package (`pip install "fastbn[cuda13]"`): compiles and launches.
2. Numba's bundled target (no numba-cuda installed): refused on hardware; it lacks launch bounds, forced inlining and half types.
3. The simulator of either, with NUMBA_ENABLE_CUDASIM=1: kernels run as Python threads, and `cuda` is a stand-in with warp shuffles.

Kernel files import `cuda`, `WARP` and `device` from here and so look the same on all three.
"""

import numba
from numba import cuda as numba_cuda

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
BUNDLED = not SIMULATED and "numba_cuda" not in (getattr(numba_cuda, "__file__", "") or "")

if SIMULATED:
    from fastbn.kernels.cuda.simulator import WARP, cuda
else:
    cuda = numba_cuda
    WARP = 32

INSTALL = 'pip install "fastbn[cuda13]" (CUDA 13) or pip install "fastbn[cuda12]" (CUDA 12)'


def require_target():
    """Raise ImportError unless kernels can be compiled: Numba's bundled CUDA target cannot compile them."""
    if BUNDLED:
        raise ImportError(
            f"fastbn's GPU kernels need the package numba-cuda; found only the CUDA target bundled with Numba "
            f"{numba.__version__}, which lacks what they use. Do: {INSTALL}"
        )


def device(function):
    """A device function, inlined into its kernel; in the simulator the plain Python function."""
    if SIMULATED or BUNDLED:
        return function
    return numba_cuda.jit(device=True, forceinline=True)(function)


def kernel(function, signature, bounds):
    """A launchable kernel: kernel[grid, block, stream](*args). `bounds` are the most threads of a block, and how many such blocks
    are to fit a multiprocessor at once: they limit its registers."""
    require_target()
    if SIMULATED:
        return numba_cuda.jit(function)
    return numba_cuda.jit(signature, launch_bounds=bounds)(function)
