"""The kernels of each operation, with their arguments by name: the GPU's table. Twin: fastbn/cpu/dispatch.py.

What runs follows from shape, dtype, alignment and features alone, so it is worked out once for calls that are alike. A call brings a job,
every kernel argument by name as on the CPU, and None for arrays that are absent. Importing this module imports neither CuPy nor Numba.
"""

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from fastbn.kernels.cuda.host import Stream, kernels, nothing


@dataclass(frozen=True, eq=False)
class Setting:
    """How data of a shape, dtype and alignment is worked on.

    Attributes
    ----------
    compute, storage : str, str or None
        The type of arithmetic, and what kernels take elements as if not as themselves.
    constants : dict
        Kernel arguments that follow from the shape.
    """

    dtype: str
    shape: tuple[int, int, int]
    sizes: Any
    plan: Any
    compute: str
    storage: str | None
    constants: dict[str, int]


class Step(NamedTuple):
    """A launch: the variant of a kernel, how many blocks of how many threads, and what its arguments are called in the job."""

    variant: Any
    blocks: int
    threads: int
    names: tuple[str, ...]


def storage_of(dtype: str) -> str | None:
    """What kernels take elements of a dtype as, if not as themselves."""
    return "uint16" if dtype in ("float16", "bfloat16") else None


@lru_cache(maxsize=1024)
def setting(dtype: str, shape: tuple[int, int, int], aligned: bool, sizes: Any) -> Setting:
    """The setting of data of shape (N, C, S); `sizes` is what the planner may choose from."""
    N, C, S = shape
    plan = kernels().plan.plan(*shape, dtype, aligned, sizes)
    constants = {"N": N, "C": C, "S": S, "rows": N, "wide": plan.wide, "splits": plan.splits, "chunk": plan.chunk}
    compute = "float64" if dtype == "float64" else "float32"
    return Setting(dtype, shape, sizes, plan, compute, storage_of(dtype), constants)


def _step(
    s: Setting, name: str, blocks: int, parameters: str = "float32", running: str = "float32", absent: tuple[str, ...] = (), **flags: Any
) -> Step:
    """A launch of the kernel `name` of the setting's dtype; `absent` are arguments that this launch goes without."""
    plan, known = s.plan, kernels()
    bound = known.plan.largest_block(plan.family, plan.lanes, s.dtype, s.sizes)
    if name.endswith("_columns"):
        flags = {"lanes": plan.lanes, "threads": plan.threads, "widest": plan.widest, **flags}
    elif name.endswith("_planes"):
        flags = {"lanes": plan.lanes, **flags}
    variant = known.variants.Variant(name, s.dtype, tuple(flags.items()), bound, parameters, running)
    names = inspect.signature(variant.function()).parameters
    return Step(variant, blocks, plan.threads, tuple("absent" if name in absent else name for name in names))


_CHANNELS = ("gamma", "beta", "running_mean", "running_var")


@lru_cache(maxsize=1024)
def forward(s: Setting, parameters: str, running: str, training: bool, weighted: bool, relu: bool, residual: bool) -> tuple[Step, ...]:
    """Statistics, and normalising with them; one launch where a thread block holds a channel."""
    plan, C, flags = s.plan, s.shape[1], {"relu": relu, "residual": residual}
    if training and plan.held_forward and not weighted:
        return (_step(s, "forward_planes", C, parameters, running, held=plan.held_forward, **flags),)
    if training:
        first = _step(s, f"stats_{plan.family}", plan.blocks, parameters, running, weighted=weighted)
    else:
        first = _step(s, "finish_given", -(-C // plan.threads), parameters, running)
    return first, _step(s, f"normalise_{plan.family}", plan.blocks, absent=_CHANNELS, **flags, given=False)


@lru_cache(maxsize=1024)
def inference(s: Setting, parameters: str, running: str, relu: bool, residual: bool) -> tuple[Step, ...]:
    """Normalising with given statistics."""
    return (_step(s, f"normalise_{s.plan.family}", s.plan.blocks, parameters, running, relu=relu, residual=residual, given=True),)


@lru_cache(maxsize=1024)
def moments(s: Setting, weighted: bool) -> tuple[Step, ...]:
    """Statistics."""
    return (_step(s, f"stats_{s.plan.family}", s.plan.blocks, absent=_CHANNELS, weighted=weighted),)


@lru_cache(maxsize=1024)
def backward(s: Setting, parameters: str, frozen: bool, weighted: bool, relu: bool, residual: bool) -> tuple[Step, ...]:
    """The sums, and the gradients from them; one launch where a thread block holds a channel."""
    plan, flags = s.plan, {"relu": relu, "residual": residual}
    if plan.held_backward and not frozen and not weighted:
        return (_step(s, "backward_planes", s.shape[1], parameters, held=plan.held_backward, **flags),)
    return (
        _step(s, f"reduce_{plan.family}", plan.blocks, parameters, relu=relu, weighted=weighted),
        _step(s, f"apply_{plan.family}", plan.blocks, **flags, frozen=frozen, weighted=weighted),
    )


def run(steps: tuple[Step, ...], job: dict[str, Any], where: Stream) -> None:
    """Launch in order. All of it is compiled first: a failure to compile leaves running statistics as they were."""
    launch, none = kernels().launch, nothing(where.device, "float32")
    arguments = [[none if (value := job.get(name)) is None else value for name in step.names] for step in steps]
    for step in steps:
        launch.ready(step.variant, where.device)
    for step, given in zip(steps, arguments, strict=True):
        launch.launch(step.variant, step.blocks, step.threads, where.device, where.handle, given)
