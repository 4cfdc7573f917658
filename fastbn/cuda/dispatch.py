"""The kernels of each operation, with their arguments by name: the GPU's table. Twin: fastbn/cpu/dispatch.py.

What runs follows from shape, dtype, alignment and features alone, so a plan works it out once. A call brings a job, every kernel argument
by name as on the CPU, and None for arrays that are absent.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastbn.cuda import loading, memory, streams


@dataclass(frozen=True, eq=False)
class Setting:
    """How data of a shape, dtype and alignment is worked on.

    Attributes
    ----------
    shape : (N, C, S)
    sizes, plan : kernels/cuda/plan.py's Sizes and Plan
        What was chosen from, and what was chosen.
    compute : str
        The type of arithmetic.
    constants : dict
        Kernel arguments that follow from the shape.
    """

    dtype: str
    shape: tuple[int, int, int]
    sizes: Any
    plan: Any
    compute: str
    constants: dict[str, int]


class Step(NamedTuple):
    """A launch: the variant of a kernel, how many blocks of how many threads, and what its arguments are called in the job.

    `fields` is how many float64 of workspace it needs for each of a channel's blocks.
    """

    variant: Any
    blocks: int
    threads: int
    names: tuple[str, ...]
    fields: int


Steps = tuple[Step, ...]


def setting(dtype: str, shape: tuple[int, int, int], aligned: bool) -> Setting:
    """The setting of data of shape (N, C, S)."""
    known = loading.kernels().plan
    (N, C, S), sizes = shape, known.DEFAULT
    plan = known.plan(N, C, S, dtype, aligned, sizes)
    constants = {"N": N, "C": C, "S": S, "rows": N, "wide": plan.wide, "splits": plan.splits, "chunk": plan.chunk}
    return Setting(dtype, shape, sizes, plan, "float64" if dtype == "float64" else "float32", constants)


def _step(
    s: Setting, name: str, blocks: int, flags: dict[str, Any], parameters: str = "float32", running: str = "float32",
    absent: tuple[str, ...] = (),
) -> Step:  # fmt: skip
    """A launch of the kernel `name` of the setting's dtype; `absent` are arguments that this launch goes without."""
    plan, known = s.plan, loading.kernels()
    bound = known.plan.largest_block(plan.family, plan.lanes, s.dtype, s.sizes)
    if name.endswith("_columns"):
        flags = {"lanes": plan.lanes, "threads": plan.threads, "widest": plan.widest, **flags}
    elif name.endswith("_planes"):
        flags = {"lanes": plan.lanes, **flags}
    variant = known.variants.Variant(name, s.dtype, tuple(flags.items()), bound, parameters, running)
    names = tuple(inspect.signature(variant.function()).parameters)
    fields = known.channels.SUM_FIELDS if name.startswith("reduce") else known.channels.FIELDS
    taken = tuple("absent" if n in absent else n for n in names)
    return Step(variant, blocks, plan.threads, taken, fields if "partials" in names else 0)


_CHANNELS = ("gamma", "beta", "running_mean", "running_var")


def forward(s: Setting, parameters: str, running: str, training: bool, weighted: bool, relu: bool, residual: bool) -> Steps:
    """Statistics, and normalising with them; one launch where a thread block holds a channel."""
    plan, C, flags = s.plan, s.shape[1], {"relu": relu, "residual": residual}
    if training and plan.held_forward and not weighted:
        return (_step(s, "forward_planes", C, {"held": plan.held_forward, **flags}, parameters, running),)
    if training:
        first = _step(s, f"stats_{plan.family}", plan.blocks, {"weighted": weighted}, parameters, running)
    else:
        first = _step(s, "finish_given", -(-C // plan.threads), {}, parameters, running)
    return first, _step(s, f"normalise_{plan.family}", plan.blocks, {**flags, "given": False}, absent=_CHANNELS)


def inference(s: Setting, parameters: str, running: str, relu: bool, residual: bool) -> Steps:
    """Normalising with given statistics."""
    flags = {"relu": relu, "residual": residual, "given": True}
    return (_step(s, f"normalise_{s.plan.family}", s.plan.blocks, flags, parameters, running),)


def moments(s: Setting, weighted: bool) -> Steps:
    """Statistics."""
    return (_step(s, f"stats_{s.plan.family}", s.plan.blocks, {"weighted": weighted}, absent=_CHANNELS),)


def backward(s: Setting, parameters: str, frozen: bool, weighted: bool, relu: bool, residual: bool) -> Steps:
    """The sums, and the gradients from them; one launch where a thread block holds a channel."""
    plan = s.plan
    if plan.held_backward and not frozen and not weighted:
        flags = {"held": plan.held_backward, "relu": relu, "residual": residual}
        return (_step(s, "backward_planes", s.shape[1], flags, parameters),)
    return *reduce(s, parameters, weighted, relu), *apply(s, frozen, weighted, relu, residual)


def reduce(s: Setting, parameters: str, weighted: bool, relu: bool) -> Steps:
    """The sums of a backward."""
    return (_step(s, f"reduce_{s.plan.family}", s.plan.blocks, {"relu": relu, "weighted": weighted}, parameters),)


def apply(s: Setting, frozen: bool, weighted: bool, relu: bool, residual: bool) -> Steps:
    """The gradients from the sums."""
    flags = {"relu": relu, "residual": residual, "frozen": frozen, "weighted": weighted}
    return (_step(s, f"apply_{s.plan.family}", s.plan.blocks, flags),)


def run(s: Setting, steps: Steps, job: dict[str, Any]) -> None:
    """Launch in order. All of it is compiled first: a failure to compile leaves running statistics as they were."""
    where, launch = streams.stream(), loading.kernels().launch
    for step in steps:
        if step.fields:
            space = streams.workspace(step.fields * s.shape[1] * s.plan.splits, s.plan.groups, where)
            job |= {"partials": space.partials, "counters": space.counters}
    none = memory.nothing(where.device)
    arguments = [[none if (value := job.get(name)) is None else value for name in step.names] for step in steps]
    for step in steps:
        launch.ready(step.variant, where.device)
    for step, given in zip(steps, arguments, strict=True):
        launch.launch(step.variant, step.blocks, step.threads, where.device, where.handle, given)
