"""The GPU half on the host: forward, backward, inference and moments of contiguous arrays, on CuPy's current stream. Twin: cpu.py.

Nothing here synchronises, and nothing is allocated but contexts (O(C), and the activation's bits) and a workspace for each stream
that grows to what the largest call needed. Importing this module imports neither CuPy nor Numba.

What has been checked: results on Numba's CUDA simulator with NumPy arrays; kernels compiled to PTX and machine code for compute
capability 8.0 and 9.0. What has not: nothing here has run on a GPU yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn.kernels import rows
from fastbn.kernels.cuda.host import (
    Call,
    Weights,
    aligned,
    check_shape,
    dtype_of,
    flat,
    geometry,
    interface,
    kernels,
    nothing,
    parameter_types,
    workspace,
)

Array = Any  # cupy.ndarray or whatever else has __cuda_array_interface__; numpy.ndarray in the simulator


@dataclass
class State:
    """What a forward leaves for the backward; the GPU part of a context.

    `table` is float64, (7, C), with the rows of kernels/rows.py but ANCHOR. `coefs` is what kernels read of it, in the type of
    arithmetic (kernels/cuda/channels.py), `mask` the activation's bits in the order of `plan`.
    """

    x: Array
    dtype: str
    shape: tuple[int, int, int]
    plan: Any
    table: Array
    coefs: Array
    mask: Array
    relu: bool
    residual: bool
    frozen: bool
    weights: Weights

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
        return self.weights.counts[0] if self.weights.given else float(self.shape[0] * self.shape[2])


def _begin(
    x: Array, shape: tuple[int, int, int], dtype: str | None, *others: Array | None
) -> tuple[str, Any, tuple[int, int, int], Call]:
    shape = check_shape(x, shape)
    dtype = dtype or dtype_of(x)
    plan = kernels().plan.plan(*shape, dtype, aligned(x, *others))
    return dtype, plan, shape, Call(dtype, plan, shape)


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
    dtype, plan, shape, call = _begin(x, shape, dtype, y, residual)
    N, C, S = shape
    parameters, running = parameter_types(gamma, beta), parameter_types(running_mean, running_var)
    arrays = kernels().arrays
    table = arrays.empty((rows.ANCHOR, C), np.float64)
    coefs = arrays.empty((5, C), call.compute)
    mask = arrays.empty(plan.words if relu else 0, np.uint32)
    weights = call.weights(sample_weight if training else None, unbiased)
    state = State(x, dtype, shape, plan, table, coefs, mask, relu, residual is not None, not training, weights)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("training=False normalises with the running statistics; pass running_mean and running_var")
    count = N * S
    correction = count / (count - 1.0) if unbiased and count > 1 else 1.0
    moments = (
        *(flat(table), flat(coefs)),
        *(call.optional(gamma, parameters), call.optional(beta, parameters)),
        *(call.optional(running_mean, running), call.optional(running_var, running)),
    )
    scalars = float(momentum), float(eps), correction
    sizes = geometry(plan, shape)
    tensors = call.tensor(x), call.tensor(y), call.tensor(residual), flat(mask)
    flags = {"relu": relu, "residual": residual is not None}
    if training and plan.held_forward and not weights.given:
        arguments = (*tensors, *sizes, *moments, *scalars)
        call.run("forward_planes", C, arguments, parameters, running, held=plan.held_forward, **flags)
        call.go()
        return state
    if training:
        space = workspace(4 * C * plan.splits, plan.groups, (call.device, call.stream))
        work = flat(space.partials), flat(space.counters)
        weighing = *weights.of(plan), flat(weights.counts)
        arguments = (tensors[0], *weighing, *sizes, plan.splits, plan.chunk, *work, *moments, *scalars)
        call.run(f"stats_{plan.family}", plan.blocks, arguments, parameters, running, weighted=weights.given)
    else:
        _given(call, moments, C, parameters, running, eps)
    none = call.optional(None, "float32")
    channels = flat(coefs), none, none, none, none, 0.0
    _normalise(call, tensors, sizes, channels, ("float32", "float32"), given=False, **flags)
    call.go()
    return state


def _given(call: Call, moments: tuple[Any, ...], C: int, parameters: str, running: str, eps: float) -> None:
    """Table and coefficients from given statistics."""
    table, coefs, *rest = moments
    call.run("finish_given", -(-C // call.plan.threads), (table, coefs, C, *rest, float(eps)), parameters, running)


def _normalise(
    call: Call, tensors: tuple[Any, ...], sizes: tuple[int, ...], channels: tuple[Any, ...], types: tuple[str, str], **flags: bool
) -> None:
    """y, from coefs or, if `given`, from statistics; channels are coefs, gamma, beta, mean, var, eps."""
    plan = call.plan
    shares = (plan.splits, plan.chunk) if plan.family == "planes" else (plan.chunk,)
    call.run(f"normalise_{plan.family}", plan.blocks, (*tensors, *sizes, *shares, *channels), *types, **flags)


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
    dtype, plan, shape, call = _begin(x, shape, dtype, y, residual)
    parameters, running = parameter_types(gamma, beta), parameter_types(mean, var)
    channels = (
        nothing(call.device, call.compute),
        *(call.optional(gamma, parameters), call.optional(beta, parameters), flat(mean), flat(var), float(eps)),
    )
    no_bits = nothing(call.device, "uint32")
    tensors = call.tensor(x), call.tensor(y), call.tensor(residual), no_bits
    flags = {"relu": relu, "residual": residual is not None, "given": True}
    _normalise(call, tensors, geometry(plan, shape), channels, (parameters, running), **flags)
    call.go()


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
    sums : float64, (2, C)
        The sums over each channel of dy and of dy * (x - mean), dy where the activation passed.

    Raises
    ------
    ValueError
        Where dresidual is missing or superfluous, or dy, dx or dresidual differ from x in size or dtype.
    """
    if (dresidual is not None) != state.residual:
        raise ValueError("dresidual is needed where the forward had a residual, and only there")
    x, shape, dtype = state.x, state.shape, state.dtype
    for name, array in (("dy", dy), ("dx", dx), ("dresidual", dresidual)):
        if array is not None and _size_and_type(array) != _size_and_type(x):
            raise ValueError(f"{name} has (elements, type) {_size_and_type(array)}, x of the forward {_size_and_type(x)}")
    arrays, plan = kernels().arrays, state.plan
    if plan.lanes > 1 and not aligned(dy, dx, dresidual):
        if state.relu:
            return _backward_of_copies(dy, dx, state, dgamma, dbeta, dresidual)
        plan = kernels().plan.plan(*shape, dtype, False)
    call = Call(dtype, plan, shape)
    parameters = parameter_types(dgamma, dbeta)
    C = shape[1]
    grads, grad_coefs = arrays.empty((rows.BACKWARD_ROWS, C), np.float64), arrays.empty((3, C), call.compute)
    sizes = geometry(plan, shape)
    inputs = call.tensor(x), call.tensor(dy)
    outputs = call.tensor(dx), call.tensor(dresidual), flat(state.mask)
    tables = flat(state.table), flat(grads), flat(state.coefs), flat(grad_coefs)
    gradients = call.optional(dgamma, parameters), call.optional(dbeta, parameters)
    weights = state.weights
    if plan.held_backward and not state.frozen and not weights.given:
        arguments = (*inputs, *outputs, *sizes, *tables, *gradients)
        call.run(
            "backward_planes", C, arguments, parameters, held=plan.held_backward, relu=state.relu, residual=state.residual
        )
        call.go()
        return grads[:2]
    space = workspace(2 * C * plan.splits, plan.groups, (call.device, call.stream))
    work = plan.splits, plan.chunk, flat(space.partials), flat(space.counters)
    arguments = (*inputs, flat(weights.counts), outputs[2], *sizes, *work, *tables, *gradients, int(state.frozen))
    call.run(f"reduce_{plan.family}", plan.blocks, arguments, parameters, relu=state.relu, weighted=weights.given)
    shares = (plan.splits, plan.chunk) if plan.family == "planes" else (plan.chunk,)
    arguments = (*inputs, *outputs[:2], *weights.of(plan), outputs[2], *sizes, *shares, *tables[2:])
    flags = {"relu": state.relu, "residual": state.residual, "frozen": state.frozen, "weighted": weights.given}
    call.run(f"apply_{plan.family}", plan.blocks, arguments, **flags)
    call.go()
    return grads[:2]


def _size_and_type(x: Array) -> tuple[int, str]:
    found = interface(x)
    return math.prod(found["shape"]), str(found["typestr"])


def _backward_of_copies(
    dy: Array, dx: Array, state: State, dgamma: Array | None, dbeta: Array | None, dresidual: Array | None
) -> Array:
    """The backward by way of aligned copies.

    For where dy, dx or dresidual start off a 16-byte boundary, but the activation's bits are in the order of whole vectors.
    """
    arrays = kernels().arrays
    copy, result = arrays.array(dy), arrays.empty_like(dx)
    extra = None if dresidual is None else arrays.empty_like(dresidual)
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
    dtype, plan, shape, call = _begin(x, shape, dtype)
    C = shape[1]
    arrays = kernels().arrays
    table, coefs = arrays.empty((rows.ANCHOR, C), np.float64), arrays.empty((5, C), call.compute)
    space = workspace(4 * C * plan.splits, plan.groups, (call.device, call.stream))
    none = call.optional(None, "float32")
    weights = call.weights(sample_weight, False)
    arguments = (
        *(call.tensor(x), *weights.of(plan), flat(weights.counts), *geometry(plan, shape), plan.splits, plan.chunk),
        *(flat(space.partials), flat(space.counters)),
        *(flat(table), flat(coefs), none, none, none, none, 0.0, 1.0, 1.0),
    )
    call.run(f"stats_{plan.family}", plan.blocks, arguments, weighted=weights.given)
    call.go()
    count = weights.counts[0] if weights.given else float(shape[0] * shape[2])
    return count, table[rows.MEAN].copy(), table[rows.VAR] * count, table[rows.LOW].copy()
