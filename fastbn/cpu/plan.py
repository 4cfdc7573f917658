"""The plan of calls on NumPy arrays that are alike: how each array is reached, how work is cut, which kernels run.

Making one compiles nothing: `explain` and `warmup` make them too. The program is compiled, or loaded, when it first runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.common.plan import Plan
from fastbn.cpu import dispatch, layout
from fastbn.cpu.dispatch import Program
from fastbn.cpu.layout import Layout
from fastbn.cpu.memory import Frame
from fastbn.cpu.weights import kind_of
from fastbn.kernels import rows
from fastbn.kernels.cpu.arguments import FORWARD_TENSORS, PLACES, Gradients, whole_lines

# What running statistics can hold.
LARGEST = {size: float(np.finfo(name).max) for size, name in ((4, "float32"), (8, "float64"))}
# How many tensors a group of channels keeps in the cache.
TENSORS = {"forward": 1, "inference": 1, "moments": 1, "forward_apply": 1, "backward": 2, "reduce": 2, "apply": 2}


def mask_shape(p: Layout) -> tuple[int, int, int]:
    """(words, row stride, channel stride) of the packed ReLU mask; one word more, as words are read in pairs."""
    if p.family == "planes":
        words = -(-p.S // layout.LANES)
        return p.N * p.C * words + 1, p.C * words, words
    words = -(-p.C * p.S * p.folded // layout.LANES)
    return (p.rows + 1) * words + 1, words, 1


def present_arguments(
    run: str,
    traversal: str,
    dtype: str,
    *,
    residual: bool = False,
    weights: str | None = None,
    mask: bool = False,
    relu: bool = False,
    dresidual: bool = False,
    frozen: bool = False,
) -> tuple[str, ...]:
    """Names of the optional arguments that are there: they choose the variant of a program.

    y is computed in float64 lanes (`lanes64`) for float64, and for the sum with a residual, which may cancel. A backward is computed in
    float32 lanes where they do (`lanes32`, see kernels/cpu/planes_backward.py): without weights, for half types, and for float32 where
    arithmetic takes the time, and where it is decided for each channel, so that a channel's bits do not depend on its neighbours.
    """
    forward, half = run in ("forward", "inference"), dtype in ("float16", "bfloat16")
    flags = {
        "residual": residual,
        "mask": mask,
        "relu": relu,
        "dresidual": dresidual,
        "frozen": frozen,
        "lanes64": forward and (dtype == "float64" or residual),
        "lanes32": run == "backward" and (half or (dtype == "float32" and traversal == "cached")) and weights is None and not frozen,
    }
    names = tuple(name for name, there in flags.items() if there)
    return names if weights is None else (*names, weights)


class CpuPlan(Plan):
    """What the CPU's backend adds to a `Plan`. Twin: fastbn/cuda/plan.py.

    Attributes
    ----------
    frame : Frame
        How arrays of x's shape lie in memory; a backward's is its forward's. Only where x is not empty, as all that follows.
    weights_kind : str or None
        Which optional argument sample weights are.
    frozen : bool
        A backward's: statistics are constants.
    run, traversal : str, str
        The keys of `dispatch.TABLE`: what the kernels do, and how they cross memory.
    schedule : Schedule
        How the work is cut.
    kernel_shape : Shape
        Its group of arguments of that name, with as many blocks as this operation has.
    present, options : tuple
        Names of the optional arguments that are there; compile-time flags as kernels take them.
    mask : (words, row stride, channel stride) or None
        Of the ReLU's mask.
    channels : tuple of int
        Bytes of a value of gamma, beta, mean and var; 0 for what is absent.
    x_at, out_at, residual_at, dy_at : (int, int) or None
        The strides of arrays of x's shape that kernels reach where they are; None for those that are copied, or absent.
    """

    backend: Any  # fastbn.cpu.backend, which sets it

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        seen, before = self.seen, self.forward
        self.weighted = "sample_weight" in (before or self).seen
        self.frozen = before is not None and not before.training
        self.channels = self._channels()
        if before is not None:
            self.has_residual = before.has_residual
            given = before.dtype_of("gamma"), before.dtype_of("beta")
            self.foreign = any(d is not None and not d.isnative for d in given)
            self.parameters = tuple(None if d is None else d.newbyteorder("=") for d in given)
            self.parameter_sizes = tuple(0 if d is None else d.itemsize for d in given)
        if self.empty:
            return
        self.frame: Frame
        self.weights_kind: str | None
        self.mask: tuple[int, int, int] | None
        if isinstance(before, CpuPlan):
            self.frame, self.weights_kind = before.frame, None if self.frozen else before.weights_kind
            self.relu, self.mask = before.relu, before.mask
        else:
            self.frame = Frame(seen["x"], self.axis, self.dtype, self.weighted, self.operation == "inference")
            self.weights_kind = kind_of(seen.get("sample_weight"), self.frame)
            self.mask = mask_shape(self.frame.layout) if self.relu and self.operation != "inference" else None
        at = {name: self.frame.strides(seen.get(name)) for name in ("x", "residual", "dy", "out")}
        self.x_at, self.out_at, self.residual_at, self.dy_at = (at[name] for name in ("x", "out", "residual", "dy"))
        self.x_dtype, self.most_threads = seen["x"].dtype, dispatch.most_threads(self.frame.size)
        # An output in memory of its own, which is what most calls want, and all that it takes.
        writes = self.operation not in ("moments", "reduce") and "out" not in seen
        self.fresh = self.frame.maker(self.x_dtype) if writes and self.x_dtype.isnative else None
        self.table_shape = rows.TABLE_ROWS, self.C
        self.values = float(self.count)
        self._plan_kernels()
        self.constants = self._constants()

    def _plan_kernels(self) -> None:
        """Which kernels run, how the work is cut, and which optional arguments they have."""
        operation, p = self.operation, self.frame.layout
        from_x = operation == "forward" and self.training  # moments, and y from them
        whole = from_x or (operation == "backward" and not self.frozen)
        # Frozen statistics, and those of the whole batch, are given: x is read once, as in inference.
        self.run = "inference" if operation in ("forward", "forward_apply") and not from_x else operation
        residual = self.has_residual and TENSORS[operation] == 1
        self.schedule = self.frame.schedule(TENSORS[operation], residual, whole)
        self.traversal = self.schedule.traversal if whole else "sweeps"
        forward = self.run in ("forward", "inference")
        self.present = present_arguments(
            self.run,
            self.traversal,
            self.dtype,
            residual=residual and forward,
            weights=None if self.run == "inference" else self.weights_kind,
            mask=self.mask is not None and self.run != "moments",
            relu=self.relu and forward,
            dresidual=self.has_residual and operation in ("backward", "apply"),
            frozen=self.frozen,
        )
        self.family = p.family
        self.program: Program | None = None
        self.options = self._options(self.present)
        self.constant = self.frozen or operation == "reduce"
        shape = self.schedule.shape
        # Given statistics are those of no block, given sums as if of one.
        blocks = {"inference": 0, "apply": 1}.get(self.run, shape.blocks)
        self.kernel_shape = shape._replace(blocks=blocks)
        grads = rows.BACKWARD_ROWS * self.C if TENSORS[operation] == 2 else 0
        self.workspace = whole_lines(grads) + whole_lines(4 * self.C * blocks)
        self.scratch = shape.scratch_rows * shape.scratch_columns
        # Whether a call is one of machine code, after which nobody reads the workspace.
        self.one_call = self.schedule.pieces == 1 and operation not in ("reduce", "apply")

    def _channels(self) -> tuple[int, ...]:
        """Bytes of a value of gamma, beta, mean and var; 0 for what is absent. Kernels read contiguous ones, and copies of others."""
        names = ("mean", "var") if self.operation == "inference" else ("running_mean", "running_var")
        given = [self.seen.get(name) for name in ("gamma", "beta", *names)]
        self.copied_channels = any(a is not None and not (a.plain and a.strides[0] == a.dtype.itemsize) for a in given)
        sizes = tuple(0 if a is None else a.dtype.itemsize for a in given)
        self.limit = LARGEST[min((size for size in sizes[2:] if size), default=8)]
        return sizes

    def _options(self, present: tuple[str, ...]) -> tuple[bool | None, ...]:
        """The group of arguments of that name (kernels/cpu/arguments.py): True or None."""
        names = ("relu", "lanes64", "leftovers") if TENSORS[self.operation] == 1 else ("frozen", "lanes32")
        return tuple(True if name in present else None for name in names)

    def compiled(self) -> Program:
        """The kernels, compiled or loaded when they are first asked for.

        Not a cached property: that of Python 3.11 holds a lock meanwhile, which a child that is forked then would wait for, for ever.
        """
        self.program = dispatch.program(self.run, self.family, self.traversal, self.dtype, self.present)
        return self.program

    def in_float64(self) -> Program:
        """A backward's kernels in float64 lanes, for where float32 lanes do not do."""
        present = tuple(name for name in self.present if name != "lanes32")
        return dispatch.program(self.run, self.family, self.traversal, self.dtype, present)

    def of_leftovers(self) -> Program:
        """The kernel that normalises, in float64 lanes, the channels that float32 lanes cannot do."""
        present = (*(name for name in self.present if not name.endswith("weight")), "lanes64", "leftovers")
        return dispatch.program("leftovers", self.family, "sweeps", self.dtype, present)

    def _constants(self) -> NDArray[np.int64]:
        """The integers that all calls have in common, in the order of kernels/cpu/arguments.py."""
        fresh, p = self.frame.fresh, self.frame.layout
        x = self.x_at or fresh
        y = self.written = x if self.operation in ("moments", "reduce") else self.out_at or fresh
        weight = (1, 0) if self.weights_kind == "row_weight" else (p.S + (layout.LANES if p.family == "columns" else 0), 1)
        mask = (0, 0) if self.mask is None else self.mask[1:]
        if self.forward is None:
            tensors = {"x": x, "y": y, "residual": self.residual_at or fresh, "weight": weight, "mask": mask}
            vectors = [*self.channels[:2], *([8] * 3 if self.operation == "forward_apply" else (*self.channels[2:], 0))]
            order = FORWARD_TENSORS
            places = self._places(self.frame.shift_places)
        else:
            tensors = {"x": x, "dy": self.dy_at or fresh, "dx": y, "dresidual": fresh, "weight": weight, "mask": mask}
            vectors = [*self.parameter_sizes] if self.operation == "backward" else [0, 0]
            order, places = Gradients._fields, ()
        strides = (stride for name in order for stride in tensors[name])
        return np.array([*self.kernel_shape, *strides, *vectors, *places], np.int64)

    def constants_at(self, three: tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
        """The same with other places for the shift."""
        constants: NDArray[np.int64] = self.constants.copy()
        constants[PLACES:] = self._places(three)
        return constants

    def _places(self, three: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        """Places (n, s) of a channel as offsets in it."""
        stride = (self.x_at or self.frame.fresh)[0] // self.frame.layout.folded
        return tuple(n * stride + s for n, s in three)

    def new_mask(self) -> Any:
        """Memory for a mask, or None."""
        return None if self.mask is None else np.empty(self.mask[0], np.uint16)
