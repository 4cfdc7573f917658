"""How many processors this process may use: what the system, and the control groups that containers are made of, leave it."""

from __future__ import annotations

import os
from contextlib import suppress
from math import ceil
from pathlib import Path


def _text(path: Path) -> str:
    """A small file's text; empty if there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def quota(root: Path = Path("/")) -> int | None:
    """Whole processors that the control groups of this process grant, rounded up; None if they set no limit.

    Reads cgroup v2 (``cpu.max``) and v1 (``cpu.cfs_quota_us``), for the process's group and all groups above it.
    """
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = top / group.strip("/")  # in a container it may not be there; `top` is
        for folder in (inner, *inner.parents):
            v1 = _text(folder / "cpu.cfs_quota_us") + " " + _text(folder / "cpu.cfs_period_us")
            with suppress(ValueError, ZeroDivisionError):  # "max", or no such files: no limit
                granted, period = (int(word) for word in (_text(folder / "cpu.max") or v1).split())
                if granted > 0:
                    limits.append(max(1, ceil(granted / period)))
            if folder == top:
                break
    return min(limits, default=None)


def available() -> int:
    """The smaller of the processors this process may run on and its control groups' quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, quota() or affinity)
