"""What a result file says about where and when it was measured, and the settings that make timings comparable."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _caches() -> dict[str, str]:
    """Sizes of the first CPU's caches, such as {"L1d": "48K", "L2": "1024K", "L3": "32768K"}; empty where unknown."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}" + ("d" if kind == "Data" and level == "1" else "")] = size
    return sizes


def _simd() -> str:
    """The widest vector instructions the CPU offers."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "unknown"
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), platform.machine())


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def busy_elsewhere(seconds: float = 0.3) -> float | None:
    """The share of all cores that other processes take while this one sleeps; None where /proc/stat does not say.

    With both cores taken, whoever needs its threads at the same time (OpenMP's barriers) is measured tens of times too slow.
    """

    def used_and_total() -> tuple[int, int]:
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        used = user + nice + system + irq + softirq + steal
        return used, used + idle + iowait

    try:
        time.sleep(0.05)  # OpenMP's workers of this process stop spinning
        used, total = used_and_total()
        time.sleep(seconds)
        used_after, total_after = used_and_total()
    except (OSError, ValueError):
        return None
    return round((used_after - used) / max(1, total_after - total), 2)


def describe() -> dict:
    """Hardware, versions, date, command and neighbours of this run, as they go into every result file."""
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "simd": _simd(),
        "caches": _caches(),
        "system": platform.system() + " " + platform.machine(),
        "busy_elsewhere": busy_elsewhere(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("fastbn", "numpy", "numba", "llvmlite", "torch")},
        },
    }


def save(name: str, body: dict, folder: Path = RESULTS) -> Path:
    """Write `folder/name.json`: this machine, then the results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **body}, indent=1) + "\n")
    return path


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory, so that no contender pays for fresh pages.

    A fresh 100 MB array costs 25,000 page faults, more than the normalisation itself. Contenders that allocate their
    result (naive NumPy; PyTorch's backward) would be measured at that. Nothing changes for those with an `out`.

    Returns
    -------
    bool
        False where the C library is not glibc: then those contenders do pay.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
