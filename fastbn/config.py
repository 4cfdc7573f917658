"""Where fastbn runs: `show_config` prints versions, threads, SIMD instructions, cache and GPUs."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata


def show_config() -> None:
    """Print versions, threads, SIMD instructions, the cache's folder and the GPUs: what a bug report needs.

    CuPy is imported where it is installed, to ask for the GPUs.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn   ...
    """
    lines = config()
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()))


def config() -> dict[str, str]:
    """What `show_config` prints, by name."""
    from fastbn import __version__

    return {
        "fastbn": __version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        **{name: _version(name) for name in ("numpy", "numba", "llvmlite", "ml_dtypes")},
        "cupy": _version("cupy", "cupy-cuda12x", "cupy-cuda13x"),
        "numba-cuda": _version("numba-cuda"),
        "threads": _threads(),
        "simd": _simd(),
        "cache": _cache(),
        "gpus": _gpus(),
    }


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _threads() -> str:
    from fastbn.cpu.crew import wait_ms
    from fastbn.cpu.threads import get_num_threads

    try:
        return f"{get_num_threads()} (FASTBN_NUM_THREADS, fastbn.set_num_threads), waiting {wait_ms():g} ms for a call (FASTBN_WAIT_MS)"
    except ValueError as error:  # what every large call raises: a bug report needs to show it
        return f"none: {error}"


# LLVM's names of the widest vector instructions, and their bits.
SIMD = (("avx512f", "AVX-512", 512), ("avx2", "AVX2", 256), ("avx", "AVX", 256), ("sse2", "SSE2", 128), ("neon", "NEON", 128))


def _simd() -> str:
    """What LLVM, and so Numba, takes the processor for."""
    from llvmlite import binding

    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        features = {}
    found = [(name, bits) for key, name, bits in SIMD if features.get(key)]
    name, bits = found[0] if found else ("unknown", 0)
    fma = ", FMA" if features.get("fma") else ""
    return f"{name}{fma}, {bits} bits, {binding.get_host_cpu_name()}" if bits else f"unknown, {binding.get_host_cpu_name()}"


def _cache() -> str:
    from fastbn.kernels.cpu.cache import folder

    path = folder()
    if path is None:
        return "off: FASTBN_CACHE=0, or no folder of your own can be written (FASTBN_CACHE_DIR)"
    files = list(path.glob("*.fastbn"))
    return f"{path}, {len(files)} kernels, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB"


def _gpus() -> str:
    if _version("cupy", "cupy-cuda12x", "cupy-cuda13x") == "not installed":
        return "none: CuPy is not installed (pip install 'fastbn[cuda12]' or 'fastbn[cuda13]')"
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
        found = [runtime.getDeviceProperties(d)["name"].decode() for d in range(runtime.getDeviceCount())]
    except Exception as error:  # no driver, no library, no device: CuPy raises various things
        return f"none: {type(error).__name__}: {error}"
    return ", ".join(f"{k}: {name}" for k, name in enumerate(found)) or "none"
