"""The GPU half on the host: forward, backward, inference and moments of contiguous arrays, on CuPy's current stream. Twin: cpu.py.

Nothing here synchronises, and nothing is allocated but contexts (O(C), and the activation's bits) and a workspace for each stream
that grows to what the largest call needed. Importing this module imports neither CuPy nor Numba.

What has been checked, and what waits for a GPU, is in docs/gpu.md: nothing here has run on one yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn.arguments import checks
from fastbn.kernels import rows
from fastbn.kernels.cuda import steps
from fastbn.kernels.cuda.host import (
    Weights,
    aligned,
    check_shape,
    dtype_of,
    flat,
    kernels,
    parameter_types,
    size_and_type,
    stream,
    tables,
    weights,
    workspace,
)

Array = Any  # cupy.ndarray, whatever else has __cuda_array_interface__, or what host.flat made of it; numpy.ndarray in the simulator
_UNWEIGHTED = {"weight": None, "counts": None, "weight_n": 0, "weight_s": 0}


@dataclass
class State:
    """What a forward leaves for the backward; the GPU part of a context.

    `table` is float64 with the rows of kernels/rows.py but ANCHOR, behind which `coefs` lies: what kernels read of it, in the type of
    arithmetic. `mask` is the activation's bits in the order of `setting.plan`.
    """

    x: Any
    setting: steps.Setting
    table: Array
    table_flat: Any
    coefs: Any
    mask: Any
    relu: bool
    residual: bool
    frozen: bool
    weights: Weights | None

    @property
    def plan(self) -> Any:
        """How the forward's kernels have cut the work."""
        return self.setting.plan

    @property
    def mean(self) -> Array:
        """float64, (C,)."""
        return self.table[rows.MEAN]

    @property
    def var(self) -> Array:
        """Biased variance, float64, (C,)."""
        return self.table[rows.VAR]

    @property
    def invstd(self) -> Array:
        """1 / sqrt(var + eps), float64, (C,)."""
        return self.table[rows.INVSTD]

    @property
    def count(self) -> Any:
        """Values per channel, or the sum of their weights: a float64 array of no dimensions, on the GPU."""
        N, _, S = self.setting.shape
        return float(N * S) if self.weights is None else self.weights.counts[0]


def _setting(x: Any, shape: tuple[int, int, int], dtype: str, *others: Any) -> steps.Setting:
    """How x, with others like it, is worked on."""
    return steps.setting(dtype, check_shape(x, shape), aligned(x, *others), kernels().plan.DEFAULT)


def _flat(a: Array | None, storage: str | None = None) -> Any:
    """An array as kernels take it, or None for an absent one."""
    return None if a is None else flat(a, storage)


def _shared(setting: steps.Setting, fields: int, where: Any) -> dict[str, Any]:
    """The stream's workspace as kernel arguments, with `fields` float64 for each block of a channel."""
    plan = setting.plan
    space = workspace(fields * setting.shape[1] * plan.splits, plan.groups, where.key)
    return {"partials": space.partials, "counters": space.counters}


def forward(
    x: Array,
    y: Array,
    shape: tuple[int, int, int],
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    unbiased: bool = True,
    relu: bool = False,
    residual: Array | None = None,
    sample_weight: Array | None = None,
    dtype: str | None = None,
) -> State:
    """Normalise x into y; in training update the running statistics in place, on the GPU.

    Parameters
    ----------
    x, y : GPU array of N * C * S elements, contiguous
        In the order (N, C, S); S == 1 means rows of channels, (N, C) or channels last.
    shape : (N, C, S)
    gamma, beta : (C,) or None
        float32 or float64, both alike.
    running_mean, running_var : (C,) or None
        Likewise. A channel whose statistic is not finite leaves them untouched; there is no warning, which would have to wait for
        the GPU.
    training : bool
        False: normalise with the running statistics, and let the backward treat them as constants.
    momentum, eps, unbiased, relu
        As in `fastbn.batch_norm_forward`.
    residual : like x, or None
        Added before the activation.
    sample_weight : GPU array of N or N * S elements, or None
        bool or real, >= 0, at least two of them above 0 (not checked: that would have to wait for the GPU). Weighs the batch's
        statistics. For rows of channels (S == 1) also of any number that divides the rows: one weight for each run of rows.
    dtype : str, optional
        "bfloat16" or "float16" where x and y are uint16 views.

    Returns
    -------
    State
        For `backward`.

    Raises
    ------
    TypeError
        For arrays that are not on a GPU, or of another dtype.
    ValueError
        Where shape does not fit x.
    """
    dtype = dtype or dtype_of(x)
    storage = steps.storage_of(dtype)
    x, y, residual = flat(x, storage), flat(y, storage), _flat(residual, storage)
    setting = _setting(x, shape, dtype, y, residual)
    count = setting.shape[0] * setting.shape[2]
    job = {
        **setting.constants,
        "x": x,
        "y": y,
        "residual_x": residual,
        "gamma": _flat(gamma),
        "beta": _flat(beta),
        "running_mean": _flat(running_mean),
        "running_var": _flat(running_var),
        "momentum": float(momentum),
        "eps": float(eps),
        "correction": count / (count - 1.0) if unbiased and count > 1 else 1.0,
    }
    parameters = parameter_types(job["gamma"], job["beta"])
    running = parameter_types(job["running_mean"], job["running_var"])
    if not training and (running_mean is None or running_var is None):
        raise checks.no_running_statistics()
    where, known = stream(), kernels()
    weighing = weights(sample_weight, setting.shape, setting.compute, unbiased) if training and sample_weight is not None else None
    table, job["table"], job["coefs"] = tables(rows.ANCHOR, setting.shape[1], known.channels.COEF_ROWS, setting.compute)
    job["mask"] = flat(known.arrays.empty(setting.plan.words, np.uint32)) if relu else None
    todo = steps.forward(setting, parameters, running, training, weighing is not None, relu, residual is not None)
    if training and len(todo) > 1:
        job |= _shared(setting, known.channels.FIELDS, where)
    job |= _UNWEIGHTED if weighing is None else weighing.arguments()
    steps.run(todo, job, where)
    state = job["table"], job["coefs"], job["mask"]
    return State(x, setting, table, *state, relu, residual is not None, not training, weighing)


def inference(
    x: Array,
    y: Array,
    shape: tuple[int, int, int],
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    relu: bool = False,
    residual: Array | None = None,
    dtype: str | None = None,
) -> None:
    """Normalise x into y with given statistics; y may be x. Parameters as in `forward`."""
    dtype = dtype or dtype_of(x)
    storage = steps.storage_of(dtype)
    x, y, residual = flat(x, storage), flat(y, storage), _flat(residual, storage)
    setting = _setting(x, shape, dtype, y, residual)
    job = setting.constants | {"x": x, "y": y, "residual_x": residual, "eps": float(eps)}
    job |= {"gamma": _flat(gamma), "beta": _flat(beta), "running_mean": flat(mean), "running_var": flat(var)}
    parameters = parameter_types(job["gamma"], job["beta"])
    running = parameter_types(job["running_mean"], job["running_var"])
    steps.run(steps.inference(setting, parameters, running, relu, residual is not None), job, stream())


def backward(
    dy: Array,
    dx: Array,
    state: State,
    *,
    dgamma: Array | None = None,
    dbeta: Array | None = None,
    dresidual: Array | None = None,
) -> Array:
    """Gradients of a forward: dx, and what else is given, are written on the GPU.

    Parameters
    ----------
    dy, dx : like x of the forward
        dx may be dy.
    state : State
        From `forward`; it can be used again.
    dgamma, dbeta : (C,) or None
        float32 or float64, both alike.
    dresidual : like x, or None
        Required if the forward had a residual: dy where the activation passed.

    Returns
    -------
    sums : float64, (rows, C)
        Its first two rows are the sums over each channel of dy and of dy * (x - mean), dy where the activation passed.

    Raises
    ------
    ValueError
        Where dresidual is missing or superfluous, or dy, dx or dresidual differ from x in size or dtype.
    """
    if (dresidual is not None) != state.residual:
        raise ValueError("dresidual is needed where the forward had a residual, and only there")
    setting = state.setting
    dy, dx, dresidual = (_flat(a, setting.storage) for a in (dy, dx, dresidual))
    for name, array in (("dy", dy), ("dx", dx), ("dresidual", dresidual)):
        if array is not None and size_and_type(array) != size_and_type(state.x):
            raise ValueError(f"{name} has (elements, type) {size_and_type(array)}, x of the forward {size_and_type(state.x)}")
    if setting.plan.lanes > 1 and not aligned(dy, dx, dresidual):
        if state.relu:
            return _backward_of_copies(dy, dx, dresidual, state, dgamma, dbeta)
        setting = steps.setting(setting.dtype, setting.shape, False, setting.sizes)
    where, known = stream(), kernels()
    job = setting.constants | {"x": state.x, "dy": dy, "dx": dx, "dresidual": dresidual, "mask": state.mask}
    job |= {"dgamma": _flat(dgamma), "dbeta": _flat(dbeta), "table": state.table_flat, "coefs": state.coefs, "frozen": int(state.frozen)}
    parameters = parameter_types(job["dgamma"], job["dbeta"])
    grads, job["grads"], job["grad_coefs"] = tables(rows.BACKWARD_ROWS, setting.shape[1], known.channels.GRAD_ROWS, setting.compute)
    todo = steps.backward(setting, parameters, state.frozen, state.weights is not None, state.relu, state.residual)
    if len(todo) > 1:
        job |= _shared(setting, known.channels.SUM_FIELDS, where)
    job |= _UNWEIGHTED if state.weights is None else state.weights.arguments()
    steps.run(todo, job, where)
    return grads


def _backward_of_copies(dy: Any, dx: Any, dresidual: Any, state: State, dgamma: Array | None, dbeta: Array | None) -> Array:
    """The backward by way of aligned copies of arrays that `flat` gave.

    For where dy, dx or dresidual start off a 16-byte boundary, but the activation's bits are in the order of whole vectors.
    """
    arrays = kernels().arrays
    copy = arrays.array(dy)
    result, extra = arrays.empty_like(copy), None if dresidual is None else arrays.empty_like(copy)
    sums = backward(copy, result, state, dgamma=dgamma, dbeta=dbeta, dresidual=extra)
    arrays.asarray(dx)[...] = result
    if dresidual is not None:
        arrays.asarray(dresidual)[...] = extra
    return sums


def moments(
    x: Array, shape: tuple[int, int, int], *, sample_weight: Array | None = None, dtype: str | None = None
) -> tuple[Any, Array, Array, Array]:
    """(count, mean, m2, low word of the mean) of each channel, float64 (C,) on the GPU; arguments as in `forward`.

    With weights, count is their sum, a float64 array of no dimensions on the GPU.
    """
    dtype = dtype or dtype_of(x)
    x = flat(x, steps.storage_of(dtype))
    setting, where, known = _setting(x, shape, dtype), stream(), kernels()
    weighing = None if sample_weight is None else weights(sample_weight, setting.shape, setting.compute, False)
    table, table_flat, coefs = tables(rows.ANCHOR, setting.shape[1], known.channels.COEF_ROWS, setting.compute)
    job = setting.constants | {"x": x, "table": table_flat, "coefs": coefs, "momentum": 0.0, "eps": 1.0, "correction": 1.0}
    job |= _shared(setting, known.channels.FIELDS, where)
    job |= _UNWEIGHTED if weighing is None else weighing.arguments()
    steps.run(steps.moments(setting, weighing is not None), job, where)
    count = float(setting.shape[0] * setting.shape[2]) if weighing is None else weighing.counts[0]
    return count, table[rows.MEAN].copy(), table[rows.VAR] * count, table[rows.LOW].copy()
