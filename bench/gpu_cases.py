"""What the GPU benchmark measures, and the arithmetic of its results: cases, bytes, statistics, table. Needs no GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from shapes import OPS, RESNET
from timing import geometric_mean

BATCHES = (32, 256)
LAYOUTS = ("channels-first", "channels-last")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
TITLES = {"copy": "device copy", "fastbn": "fastbn", "cupy": "CuPy, two passes", "cudnn": "PyTorch, cuDNN", "native": "PyTorch, native"}
BEYOND_L2 = 3  # the inputs of all calls between two uses of one are this many times the L2 cache


@dataclass(frozen=True)
class GpuCase:
    """One operation on one array: what a row of the table stands for. `shape` is (N, C, *spatial) whatever the layout."""

    op: str
    shape: tuple[int, ...]
    layout: str = "channels-first"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (("op", OPS), ("layout", LAYOUTS), ("dtype", tuple(ITEMSIZE))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if len(self.shape) < 3:
            raise ValueError(f"shape {self.shape} is too short; pass (N, C, *spatial)")

    @property
    def storage(self) -> tuple[int, ...]:
        """The shape as it lies in memory."""
        N, C, *spatial = self.shape
        return self.shape if self.layout == "channels-first" else (N, *spatial, C)

    @property
    def axis(self) -> int:
        return 1 if self.layout == "channels-first" else -1

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def tensors(self) -> int:
        """Tensors that have to move at least once: x and y; backward: x, dy and dx."""
        return 3 if self.op == "backward" else 2

    @property
    def floor_bytes(self) -> int:
        return self.nbytes * self.tensors

    @property
    def label(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.layout} {self.dtype}"


def cases(
    shapes: Iterable[tuple[int, ...]] = RESNET,
    batches: Iterable[int] | None = BATCHES,
    layouts: Iterable[str] = LAYOUTS,
    dtypes: Iterable[str] = tuple(ITEMSIZE),
    ops: Iterable[str] = OPS,
) -> list[GpuCase]:
    """Every case in the table's order; each shape with each of the batch sizes, or as it is where `batches` is None."""
    sized = [(n, *shape[1:]) for n in batches for shape in shapes] if batches is not None else list(shapes)
    dtypes, ops = tuple(dtypes), tuple(ops)
    return [GpuCase(op, shape, layout, dtype) for op in ops for layout in layouts for dtype in dtypes for shape in sized]


def input_sets(case: GpuCase, l2: int, free: int) -> int:
    """How many sets of arrays the calls take in turn, so that none finds its input in an L2 cache of `l2` bytes.

    Raises
    ------
    ValueError
        Where `free` bytes of memory do not hold two sets, with as much again for what contenders allocate.
    """
    wanted = max(2, math.ceil(BEYOND_L2 * l2 / case.floor_bytes) + 1)
    possible = free // (2 * case.floor_bytes)
    if possible < 2:
        needed = 4 * case.floor_bytes / 1e9
        raise ValueError(f"{case.label} needs {needed:.1f} GB of GPU memory, {free / 1e9:.1f} GB are free; use --shapes")
    return min(wanted, possible)


def statistics_of(milliseconds: list[float], host_microseconds: list[float], nbytes: int) -> dict[str, float]:
    """Medians over the rounds, the quartiles' distance as a share of the median, and the bandwidth of the floor's bytes."""
    median = statistics.median(milliseconds)
    spread = 0.0
    if len(milliseconds) > 1:
        low, _, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        spread = (high - low) / median
    return {
        "ms": median,
        "spread": spread,
        "gb_per_s": nbytes / median / 1e6,
        "host_us": statistics.median(host_microseconds),
    }


def with_shares(row: dict) -> dict:
    """The row, with each contender's bandwidth as a share of the device copy's, and its time over fastbn's."""
    found = row["contenders"]
    for each in found.values():
        each["share"] = each["gb_per_s"] / found["copy"]["gb_per_s"]
        each["over_fastbn"] = each["ms"] / found["fastbn"]["ms"]
    return row


def table(rows: list[dict]) -> str:
    """Markdown: a line a case; GB/s of the floor's bytes with the share of the copy's, times of the others over fastbn's."""
    others = [name for name in ("cupy", "cudnn", "native") if any(name in row["contenders"] for row in rows)]
    head = ["case", "copy GB/s", "fastbn GB/s", "share", "ms", "launches", "host us", *(TITLES[name] for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        found = row["contenders"]
        mine = found["fastbn"]
        cells = [row["label"], f"{found['copy']['gb_per_s']:.0f}", f"{mine['gb_per_s']:.0f}", f"{mine['share']:.0%}"]
        cells += [f"{mine['ms']:.3f}", str(mine["launches"]), f"{mine['host_us']:.1f}"]
        cells += [f"{found[name]['over_fastbn']:.2f}" if name in found else "-" for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means(rows: list[dict]) -> str:
    """A line an operation: the geometric mean of the shares, the slowest case against each peer."""
    lines = []
    for op in OPS:
        found = [row["contenders"] for row in rows if row["op"] == op]
        if not found:
            continue
        share = geometric_mean(c["fastbn"]["share"] for c in found)
        text = f"- {op}: {share:.0%} of the copy's bandwidth, geometric mean of {len(found)} cases"
        for name in ("cudnn", "native", "cupy"):
            ratios = [c[name]["over_fastbn"] for c in found if name in c]
            if ratios:
                text += f"; {TITLES[name]} takes {geometric_mean(ratios):.2f} times fastbn's time (least {min(ratios):.2f})"
        lines.append(text)
    return "\n".join(lines)
