"""Every GPU kernel variant: what it is built from, the types of its arguments, and one compilation each.

An argument of one name has one type in every kernel, so signatures follow from the parameter lists. Features (`relu`, `residual`,
`frozen`) are constants that a kernel is built with: the compiler drops what is off. Absent per-channel arrays are empty, absent
tensors are not read.
"""

import inspect
import itertools
import threading
from dataclasses import dataclass
from functools import cached_property

from numba import float32, float64, int32, int64, types, uint32

from fastbn.kernels.cuda import channels, columns, columns_backward, persistent, planes, planes_backward
from fastbn.kernels.cuda.plan import DEFAULT, largest_block, widest_block
from fastbn.kernels.cuda.target import kernel as compile_kernel
from fastbn.kernels.cuda.vectors import KINDS

FACTORIES = {
    "stats_planes": planes.stats_planes,
    "normalise_planes": planes.normalise_planes,
    "reduce_planes": planes_backward.reduce_planes,
    "apply_planes": planes_backward.apply_planes,
    "forward_planes": persistent.forward_planes,
    "backward_planes": persistent.backward_planes,
    "stats_columns": columns.stats_columns,
    "normalise_columns": columns.normalise_columns,
    "reduce_columns": columns_backward.reduce_columns,
    "apply_columns": columns_backward.apply_columns,
    "finish_given": lambda kind: channels.finish_given,
}
ELEMENTWISE = ("normalise_planes", "normalise_columns", "apply_planes", "apply_columns")
PARAMETER_TYPES = {"float32": float32, "float64": float64}
TENSORS = ("x", "y", "dy", "dx", "residual_x", "dresidual")
PARAMETERS = ("gamma", "beta", "dgamma", "dbeta")
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Variant:
    """One kernel: name, data type, the options its factory takes, largest block, types of parameters and running statistics."""

    name: str
    dtype: str
    options: tuple[tuple[str, object], ...]
    threads: int
    parameters: str = "float32"
    running: str = "float32"

    def __hash__(self):
        return self._hash

    @cached_property
    def _hash(self):  # once: it is looked up at every launch
        return hash((self.name, self.dtype, self.options, self.threads, self.parameters, self.running))

    def __getstate__(self):  # strings hash to something else in another process
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    @property
    def label(self):
        """A file name: stats_planes-float32-lanes4."""
        parts = [f"{k}{int(v)}" if not isinstance(v, bool) else k for k, v in self.options if v is not False]
        types_ = [] if (self.parameters, self.running) == ("float32", "float32") else [self.parameters, self.running]
        return "-".join([self.name, self.dtype, *parts, *types_])

    @property
    def resident(self):
        """Blocks of the largest size that are to fit a multiprocessor at once, by their registers: 65536 of four bytes.

        It is told to the compiler even where it is 1. Left to guess, ptxas tries for more blocks and pays with spills: with no more
        than the size of blocks 26 of 592 reports showed spills of 8 to 56 bytes, at 64, 80 or 128 registers. Kernels that read whole tiles
        before they use them may take more than the 128 registers that two blocks of 256 threads leave, and so may float64 and weights.
        """
        needy = self.name not in ELEMENTWISE or self.dtype == "float64" or ("weighted", True) in self.options
        return 1 if needy or self.threads > 256 else 2

    @property
    def bounds(self):
        """What the compiler is told: threads of the largest block, and `resident`."""
        return self.threads, self.resident

    def function(self):
        """The kernel as a Python function."""
        return FACTORIES[self.name](KINDS[self.dtype], **dict(self.options))

    def signature(self):
        """The Numba types of its arguments."""
        kind = KINDS[self.dtype]

        def vector(element):
            return types.Array(element, 1, "C")

        by_name = {
            "mask": vector(uint32),
            "counters": vector(int32),
            "coefs": vector(kind.compute),
            "grad_coefs": vector(kind.compute),
            "weight": vector(kind.compute),
            "counts": vector(float64),
            **dict.fromkeys(("table", "grads", "partials"), vector(float64)),
            **dict.fromkeys(TENSORS, vector(kind.storage)),
            **dict.fromkeys(PARAMETERS, vector(PARAMETER_TYPES[self.parameters])),
            **dict.fromkeys(RUNNING, vector(PARAMETER_TYPES[self.running])),
            **dict.fromkeys(("momentum", "eps", "correction"), float64),
        }
        return tuple(by_name.get(name, int64) for name in inspect.signature(self.function()).parameters)


_compiled = {}
_lock = threading.Lock()


def compiled(variant):
    """The launchable kernel of a variant, compiled on first use (0.3 to 2.5 s to PTX, seen on one core)."""
    if variant not in _compiled:
        with _lock:
            if variant not in _compiled:
                _compiled[variant] = compile_kernel(variant.function(), variant.signature(), variant.bounds)
    return _compiled[variant]


def _combinations(names):
    for values in itertools.product((False, True), repeat=len(names)):
        yield tuple(zip(names, values, strict=True))


def all_variants(sizes=DEFAULT):
    """Every variant, in a fixed order, with float32 parameters (float64 for float64 data)."""
    for dtype, kind in KINDS.items():
        parameters = "float64" if dtype == "float64" else "float32"
        common = {"dtype": dtype, "parameters": parameters, "running": parameters}
        yield Variant(name="finish_given", options=(), threads=sizes.persistent_threads, **common)
        for lanes in (1, kind.lanes):
            vectors = (("lanes", lanes),)
            columns_ = (*vectors, ("threads", sizes.threads), ("widest", widest_block(lanes, sizes)))
            for family, shape in (("planes", vectors), ("columns", columns_)):
                threads = largest_block(family, lanes, dtype, sizes)
                for verb, flags in (
                    ("stats", ("weighted",)),
                    ("normalise", ("relu", "residual", "given")),
                    ("reduce", ("relu", "weighted")),
                    ("apply", ("relu", "residual", "frozen", "weighted")),
                ):
                    for chosen in _combinations(flags):
                        if {("frozen", True), ("weighted", True)} <= set(chosen):
                            continue  # weights act through the batch's statistics alone
                        yield Variant(name=f"{verb}_{family}", options=shape + chosen, threads=threads, **common)
            if dtype == "float64":
                continue
            threads = largest_block("planes", lanes, dtype, sizes)
            held = [("forward_planes", each) for each in (sizes.persistent if lanes > 1 else sizes.persistent[:1])]
            held += [("backward_planes", each // 2) for each in sizes.persistent]
            for name, each in held:
                for chosen in _combinations(("relu", "residual")):
                    yield Variant(name=name, options=(*vectors, ("held", each), *chosen), threads=threads, **common)
