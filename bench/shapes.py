"""What is measured: one table of cases, and the bars that the results are held against.

A shape is written as (N, C, *spatial) whatever the layout; `layout` says how it lies in memory:

    channels-first   (N, C, *spatial), axis=1
    channels-last    (N, *spatial, C), axis=-1
    nc               (N, C), axis=1: rows of channels, the MLP case
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OPS = ("forward", "backward", "inference")
LAYOUTS = ("channels-first", "channels-last", "nc")

# What networks that are trained with NumPy have: 75 kB to 6 MB, which the cache holds. LeNet's, then small residual networks'.
TRAINING = ((32, 6, 28, 28), (128, 16, 12, 12), (16, 16, 28, 28), (32, 64, 14, 14), (32, 64, 28, 28))
RESNET = (  # ResNet-50 at N=32; the last two have short planes
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 64, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
)
MLP = ((64, 128), (1024, 64), (256, 512), (256, 1024), (4096, 1024), (65536, 256))
ODD = ((3, 257, 27, 33), (5, 33, 101, 3), (13, 3, 223, 225))  # nothing divides a vector; few, many and odd channels

# The subset of --quick: a large, a middle and a short plane, one MLP shape and the small call.
QUICK = ((32, 64, 56, 56), (32, 2048, 7, 7), (4096, 1024), (64, 128))

LARGE_BYTES = 12_000_000  # the bars speak of tensors of 12 MB and more


@dataclass(frozen=True)
class Case:
    """One operation on one array: what a row of a result table stands for."""

    op: str
    shape: tuple[int, ...]
    layout: str = "channels-first"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op {self.op!r} is unknown; use one of {', '.join(OPS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
        if len(self.shape) < 2 or (len(self.shape) == 2) != (self.layout == "nc"):
            raise ValueError(f"shape {self.shape} does not fit layout {self.layout!r}; (N, C), and only that, is 'nc'")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype {self.dtype!r} is not measured here; use float32 or float64")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        return self.size * (4 if self.dtype == "float32" else 8)

    @property
    def plane(self) -> int:
        """Values of one channel of one sample: H*W."""
        return math.prod(self.shape[2:])

    @property
    def floor_bytes(self) -> int:
        """Bytes that have to move at least: x and y; backward: x, dy and dx."""
        return self.nbytes * (3 if self.op == "backward" else 2)

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def group(self) -> str:
        """The pytest-benchmark group: everything that may be compared stands in one group."""
        return f"{self.op} {self.label} {self.layout}" + ("" if self.dtype == "float32" else f" {self.dtype}")


def cases(
    op: str, layouts: tuple[str, ...] = LAYOUTS, quick: bool = False, shapes: tuple[tuple[int, ...], ...] | None = None
) -> list[Case]:
    """Every case of one operation in the given layouts, in the table's order."""
    table = shapes if shapes is not None else QUICK if quick else (*TRAINING, *RESNET, *ODD, *MLP)
    found = []
    for layout in layouts:
        found += [Case(op, shape, layout) for shape in table if (len(shape) == 2) == (layout == "nc")]
    return found


@dataclass(frozen=True)
class Bar:
    """One line of the performance contract: a geometric mean of ratios over the cases it selects.

    `over` is the denominator: with over="limit" the ratio is fastbn's time / the limit's (small is good), with
    over="torch" it is PyTorch's time / fastbn's (large is good).
    """

    name: str
    op: str
    layouts: tuple[str, ...]
    over: str
    bar: float
    goal: float
    planes: tuple[int, float] = (1, math.inf)

    def selects(self, case: Case) -> bool:
        return (
            case.op == self.op
            and case.layout in self.layouts
            and case.nbytes >= LARGE_BYTES
            and self.planes[0] <= case.plane <= self.planes[1]
            and case.shape not in ODD
        )

    def met(self, value: float, mark: float) -> bool:
        return value <= mark if self.over == "limit" else value >= mark


FIRST, LAST = ("channels-first",), ("channels-last",)
LONG, SHORT = (784, math.inf), (2, 783)  # planes of 28x28 and more; the shorter ones
BARS = (
    Bar("training forward NCHW, planes from 28x28: time / limit", "forward", FIRST, "limit", 1.5, 1.1, LONG),
    Bar("training forward NCHW, 14x14 and 7x7: time / limit", "forward", FIRST, "limit", 1.9, 1.2, SHORT),
    Bar("training forward channels last: time / limit", "forward", LAST, "limit", 1.8, 1.5),
    Bar("backward NCHW: time / its limit", "backward", FIRST, "limit", 1.7, 1.15),
    Bar("inference, any layout: time / limit", "inference", LAYOUTS, "limit", 1.15, 1.02),
    Bar("forward NCHW: PyTorch's time / fastbn's", "forward", FIRST, "torch", 4.0, 6.0),
    Bar("backward NCHW: PyTorch's time / fastbn's", "backward", FIRST, "torch", 3.0, 5.0),
    Bar("forward channels last: PyTorch's time / fastbn's", "forward", LAST, "torch", 1.3, 1.7),
    Bar("backward channels last: PyTorch's time / fastbn's", "backward", LAST, "torch", 1.5, 3.0),
)
