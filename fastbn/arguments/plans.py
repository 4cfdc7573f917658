"""One look at each array of a call, and one plan for all calls that are alike.

`look` makes a key of what it sees: shape, dtype, alignment, contiguity and writability of each array, which optional ones are there, axis
and flags. For a key there is one plan (fastbn/common/plan.py), made by `_make`: checks, then the backend's part. A call whose key is known
goes on at once. Any other takes the longer way through `_look_closely`: arrays of other kinds, and those that are not contiguous, for
which a second key has the strides too.
"""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np

from fastbn.arguments import checks, kinds, scalars
from fastbn.common.context import Context
from fastbn.common.facts import brief_facts_of, contiguous, facts_of, regular
from fastbn.common.plan import Plan
from fastbn.cpu.backend import CpuPlan
from fastbn.cuda.arrays import Exchange
from fastbn.cuda.backend import GpuPlan

Array = Any
Arrays = tuple[Any, ...]

# The arrays of each operation, in the order in which they are passed to `look` and to the backend.
NAMES: dict[str, tuple[str, ...]] = {
    "forward": ("x", "gamma", "beta", "running_mean", "running_var", "residual", "sample_weight", "out"),
    "inference": ("x", "gamma", "beta", "mean", "var", "residual", "out"),
    "moments": ("x", "sample_weight"),
    "backward": ("x", "dy", "out"),
    "reduce": ("x", "dy"),
    "apply": ("x", "dy", "sum_dy", "sum_dy_xmu", "out"),
}
NAMES["forward_apply"] = NAMES["forward"]
# Plans are small, and a program has few kinds of calls. One that has many makes them again.
MOST_PLANS, MOST_BACKWARDS = 4096, 64

# Stands in a key for what is neither a NumPy array nor None: no plan has such a key.
_OTHER = object()

_plans: dict[Any, Plan] = {}
_ndarray = np.ndarray


def look(operation: str, arrays: Arrays, axis: Any, training: bool, activation: Any) -> tuple[Any, Arrays, Exchange | None]:
    """The plan of a forward's, an inference's or a moments' call; its arrays as the backend takes them; and how results go back.

    Raises
    ------
    TypeError, ValueError
        All that checks.py and kinds.py raise for the facts of arrays.
    """
    if type(axis) is not int:
        axis = scalars.whole(axis, "axis")
    seen = [brief_facts_of(a) if type(a) is _ndarray else None if a is None else _OTHER for a in arrays]
    key = operation, axis, training, activation, *seen
    try:
        return _plans[key], arrays, None
    except (KeyError, TypeError):  # TypeError: something that has no hash
        return _look_closely(operation, arrays, axis, training, activation)


def look_back(operation: str, ctx: Context, arrays: Arrays) -> tuple[Any, Arrays, Exchange | None]:
    """The same of a backward's call; `arrays` are those behind x."""
    seen = tuple([brief_facts_of(a) if type(a) is _ndarray else None if a is None else _OTHER for a in arrays])
    x = ctx.x
    if type(x) is _ndarray:
        try:
            return ctx.plan.backwards[operation, seen], (x, *arrays), None
        except (KeyError, TypeError):
            pass
    return _look_closely(operation, (x, *arrays), ctx.axis, ctx.training, None, ctx.plan)


def _look_closely(
    operation: str, arrays: Arrays, axis: int, training: bool, activation: Any, forward: Plan | None = None
) -> tuple[Any, Arrays, Exchange | None]:
    """What `look` returns, for calls that are seen for the first time and for arrays of any kind."""
    names = NAMES[operation]
    arrays, exchange = kinds.taken(names, arrays)
    on_gpu = type(arrays[0]) is not _ndarray
    if not on_gpu:
        seen: list[Any] = [None if a is None else facts_of(a) for a in arrays]
    else:
        # CuPy's arrays can always be written, and their flags do not know the word.
        seen = [None if a is None else (a.shape, a.strides, a.dtype, a.data.ptr % 16, getattr(a.flags, "writeable", True)) for a in arrays]
    relu = scalars.activation(activation)
    facts = seen
    if not on_gpu and all(f is None or contiguous(f) for f in seen):  # the key that a quick look makes
        facts, seen = [f and (f[0], *f[2:]) for f in seen], [f and regular(f) for f in seen]
    if forward is None:
        plans, most, key = _plans, MOST_PLANS, (operation, axis, training, activation, *facts)
    else:
        plans, most, key = forward.backwards, MOST_BACKWARDS, (operation, tuple(facts[1:]))
    plan = plans.get(key)
    if plan is None:
        plan = _make(on_gpu, operation, tuple(seen), axis, training, relu, forward)
        if len(plans) >= most:
            plans.clear()
        plans[key] = plan
    return plan, arrays, exchange


def _make(on_gpu: bool, operation: str, facts: Arrays, axis: int, training: bool, relu: bool, forward: Plan | None) -> Plan:
    """Check what can be checked of facts alone, and let the backend plan the rest."""
    kind: Any = GpuPlan if on_gpu else CpuPlan
    backend = kind.backend
    seen = {name: backend.seen(f) for name, f in zip(NAMES[operation], facts, strict=True) if f is not None}
    dtype, channels = checks.x_and_axis(seen["x"], axis)
    if operation in ("forward", "forward_apply"):
        checks.forward(seen, channels, training, backend.LIBRARY)
    elif operation == "inference":
        checks.inference(seen, channels, backend.LIBRARY)
    elif operation == "moments":
        checks.weights(seen.get("sample_weight"), seen["x"], channels)
    else:
        checks.backward(seen, channels, backend.LIBRARY)
    key = on_gpu, operation, facts, axis, training, relu, forward
    plan: Plan = kind(operation, key, seen, channels, dtype, training, relu, forward)
    if operation == "forward" and training and plan.count == 1 and not (plan.weighted and backend.COUNTS_WEIGHTS):
        raise checks.one_value_per_channel(seen["x"], channels)
    return plan


def _remake(*key: Any) -> Plan:
    """What a pickled plan becomes: a plan of this process, with its own compiled kernels."""
    return _make(*key)


for _kind in (CpuPlan, GpuPlan):
    copyreg.pickle(_kind, lambda plan: (_remake, plan.key))
