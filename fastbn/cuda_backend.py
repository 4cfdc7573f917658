"""The GPU half on the host: which kernels run on which memory, on CuPy's current stream. Twin: cpu.py.

Arrays are anything with ``__cuda_array_interface__``, contiguous; workspace and contexts are CuPy arrays. Nothing here synchronises, and
nothing is allocated but contexts (O(C) and the activation's bits) and a workspace for each stream that grows to what the largest call
needed. Importing this module imports neither CuPy nor Numba.

What has been checked: all of it on Numba's CUDA simulator with NumPy arrays; kernels compiled to PTX and machine code for compute capability
8.0 and 9.0. What has not: nothing here has run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # cupy.ndarray or whatever else has __cuda_array_interface__; numpy.ndarray in the simulator
INSTALL = 'install it with pip install "fastbn[cuda13]" (CUDA 13) or pip install "fastbn[cuda12]" (CUDA 12)'
_TYPES = {"f4": "float32", "f8": "float64", "f2": "float16"}


@functools.cache
def kernels() -> Any:
    """The modules of the kernels, and the arrays' module: CuPy, or NumPy in the simulator.

    Raises
    ------
    ImportError
        Where numba-cuda or CuPy is missing, or Numba has only its bundled CUDA target; names the extra to install.
    """
    target = importlib.import_module("fastbn.kernels.cuda.target")
    target.require_target()
    if target.SIMULATED:
        arrays: Any = np
    else:
        if importlib.util.find_spec("cupy") is None:
            raise ImportError(f"arrays on a GPU need CuPy, which is not installed; {INSTALL}")
        arrays = importlib.import_module("cupy")
    names = ("channels", "launch", "plan", "variants")
    loaded = {name: importlib.import_module(f"fastbn.kernels.cuda.{name}") for name in names}
    return _Kernels(arrays=arrays, simulated=target.SIMULATED, **loaded)


@dataclass(frozen=True)
class _Kernels:
    arrays: Any
    simulated: bool
    channels: Any
    launch: Any
    plan: Any
    variants: Any


@dataclass
class State:
    """What a forward leaves for the backward; the GPU part of a context.

    `table` is float64, (7, C), with the rows of kernels/channels.py: gamma, beta, mean, low word of the mean, var, invstd, scale. `coefs`
    are the same in the type of arithmetic, `mask` the activation's bits in the order of `plan`.
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

    @property
    def mean(self) -> Array:
        """float64, (C,)."""
        return self.table[2]

    @property
    def var(self) -> Array:
        """Biased variance, float64, (C,)."""
        return self.table[4]

    @property
    def invstd(self) -> Array:
        """1 / sqrt(var + eps), float64, (C,)."""
        return self.table[5]

    @property
    def count(self) -> float:
        """Values per channel."""
        return float(self.shape[0] * self.shape[2])


@dataclass
class _Workspace:
    """Partial results and counters of one stream; kernels of one stream run one after the other, so they may share it."""

    partials: Array = None
    counters: Array = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_workspaces: dict[tuple[int, int], _Workspace] = {}
_workspaces_lock = threading.Lock()


def dtype_of(x: Array) -> str:
    """The name of x's data type, from its interface.

    Raises
    ------
    TypeError
        For anything but float32, float64 and float16. bfloat16 has no code in the interface: pass a uint16 view and ``dtype="bfloat16"``.
    """
    code = str(_interface(x)["typestr"])
    if code[0] in "<|=" and code[1:] in _TYPES:
        return _TYPES[code[1:]]
    raise TypeError(
        f"array has the type code {code!r}; GPU kernels take float32, float64 and float16, and bfloat16 as a uint16 view with "
        'dtype="bfloat16". Convert with x.astype(numpy.float32)'
    )


def _interface(x: Array) -> dict[str, Any]:
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None and kernels().simulated:
        interface = getattr(x, "__array_interface__", None)
    if interface is None:
        raise TypeError(f"{type(x).__name__} is not in GPU memory; move it there with cupy.asarray(x)")
    return dict(interface)


def _address(x: Array) -> int:
    return int(_interface(x)["data"][0])


def _flat(x: Array, storage: str | None = None) -> Any:
    """x as the 1-D contiguous array that kernels take: a numpy view in the simulator, else pointer and size."""
    kernel = kernels()
    if kernel.simulated:
        view = x.ravel(order="K")
        if x.size and not np.shares_memory(view, x):
            raise ValueError("GPU kernels need contiguous data; pass numpy.ascontiguousarray(x)")
        return view if storage is None else view.view(storage)
    interface = _interface(x)
    typestr = str(interface["typestr"]) if storage is None else np.dtype(storage).str
    itemsize = np.dtype(typestr).itemsize
    size = math.prod(interface["shape"])
    return kernel.launch.DeviceArray(int(interface["data"][0]), size, itemsize, typestr, x)


def _stream() -> tuple[int, int]:
    """(device, handle) of CuPy's current device and stream; (0, 0) in the simulator."""
    kernel = kernels()
    if kernel.simulated:
        return 0, 0
    return int(kernel.arrays.cuda.runtime.getDevice()), int(kernel.arrays.cuda.get_current_stream().ptr)


def _workspace(partials: int, counters: int, key: tuple[int, int]) -> _Workspace:
    """The stream's workspace with room for that many float64 and int32; the counters are 0 between launches."""
    arrays = kernels().arrays
    with _workspaces_lock:
        space = _workspaces.setdefault(key, _Workspace())
    with space.lock:
        if space.partials is None or space.partials.size < partials:
            space.partials = arrays.empty(partials, np.float64)
        if space.counters is None or space.counters.size < counters:
            space.counters = arrays.zeros(counters, np.int32)
    return space


@functools.cache
def _nothing(device: int, dtype: str) -> Any:
    """The empty array that stands for an absent one."""
    return _flat(kernels().arrays.empty(0, dtype))


class _Call:
    """One call's launches: kernel names to variants, argument names to arrays. Twin of the table in dispatch.py."""

    def __init__(self, dtype: str, plan: Any, shape: tuple[int, int, int]) -> None:
        self.kernels, self.dtype, self.plan, self.shape = kernels(), dtype, plan, shape
        self.device, self.stream = _stream()
        self.storage = "uint16" if dtype in ("float16", "bfloat16") else None
        self.compute = "float64" if dtype == "float64" else "float32"

    def tensor(self, x: Array | None) -> Any:
        """x, dy and the like, half types as uint16; an absent one is empty."""
        return _nothing(self.device, self.storage or self.dtype) if x is None else _flat(x, self.storage)

    def optional(self, x: Array | None, dtype: str) -> Any:
        """A per-channel array, or an empty one of `dtype`."""
        return _nothing(self.device, dtype) if x is None else _flat(x)

    def run(
        self, name: str, blocks: int, arguments: tuple[Any, ...], parameters: str = "float32", running: str = "float32", **flags: Any
    ) -> None:
        """Launch the kernel `name` of this call's dtype and plan."""
        plan = self.plan
        if name.endswith("_columns"):
            options = {"lanes": plan.lanes, "threads": plan.threads, "wide": plan.wide, **flags}
        elif name.endswith("_planes"):
            options = {"lanes": plan.lanes, **flags}
        else:
            options = flags
        variant = self.kernels.variants.Variant(name, self.dtype, tuple(options.items()), self._bound(name), parameters, running)
        self.kernels.launch.launch(variant, blocks, plan.threads, self.device, self.stream, arguments)

    def _bound(self, name: str) -> int:
        """The largest block that the variant is compiled for: two bounds, so that two block sizes do not mean two compilations."""
        sizes = self.kernels.plan.DEFAULT
        small = sizes.threads if self.plan.threads <= sizes.threads else sizes.persistent_threads
        return int(sizes.persistent_threads if name in ("forward_planes", "backward_planes") else small)


def _parameter_types(*arrays: Array | None) -> str:
    """The common type of per-channel arrays: "float32" or "float64"; all that are given must agree."""
    found = {dtype_of(a) for a in arrays if a is not None}
    if len(found) > 1:
        raise TypeError(f"per-channel arrays of one call are of one dtype, float32 or float64; these are {sorted(found)}")
    name = found.pop() if found else "float32"
    if name not in ("float32", "float64"):
        raise TypeError(f"per-channel arrays are float32 or float64, not {name}; convert them with .astype(numpy.float32)")
    return name


def _aligned(*arrays: Array | None) -> bool:
    return all(_address(a) % 16 == 0 for a in arrays if a is not None)


def _geometry(plan: Any, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape arguments of a kernel: (N, C, S) of planes, (rows, C) of columns."""
    N, C, S = shape
    return (N, C, S) if plan.family == "planes" else (N, C)


def _check_shape(x: Array, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    N, C, S = (int(n) for n in shape)
    size = math.prod(_interface(x)["shape"])
    if min(N, C, S) < 1 or N * C * S != size:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)} but the array has {size} elements; all three are at least 1")
    if max(N, C, S) >= 2**31 or N * S >= 2**32:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)}; N, C and S are below 2**31 and N * S below 2**32. Split the batch")
    return N, C, S


def _begin(x: Array, shape: tuple[int, int, int], dtype: str | None, *others: Array | None) -> tuple[str, Any, tuple[int, int, int], _Call]:
    shape = _check_shape(x, shape)
    dtype = dtype or dtype_of(x)
    plan = kernels().plan.plan(*shape, dtype, _aligned(x, *others))
    return dtype, plan, shape, _Call(dtype, plan, shape)


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
    parameters, running = _parameter_types(gamma, beta), _parameter_types(running_mean, running_var)
    arrays = kernels().arrays
    table = arrays.empty((7, C), np.float64)
    coefs = arrays.empty((5, C), call.compute)
    mask = arrays.empty(plan.words if relu else 0, np.uint32)
    state = State(x, dtype, shape, plan, table, coefs, mask, relu, residual is not None, not training)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("training=False normalises with the running statistics; pass running_mean and running_var")
    count = N * S
    correction = count / (count - 1.0) if unbiased and count > 1 else 1.0
    moments = (
        *(_flat(table), _flat(coefs)),
        *(call.optional(gamma, parameters), call.optional(beta, parameters)),
        *(call.optional(running_mean, running), call.optional(running_var, running)),
    )
    scalars = float(momentum), float(eps), correction
    geometry = _geometry(plan, shape)
    tensors = call.tensor(x), call.tensor(y), call.tensor(residual), _flat(mask)
    flags = {"relu": relu, "residual": residual is not None}
    if training and plan.held_forward:
        arguments = (*tensors, *geometry, *moments, *scalars)
        call.run("forward_planes", C, arguments, parameters, running, held=plan.held_forward, **flags)
        return state
    if training:
        space = _workspace(4 * C * plan.splits, plan.groups, (call.device, call.stream))
        work = _flat(space.partials), _flat(space.counters)
        arguments = (tensors[0], *geometry, plan.splits, plan.chunk, *work, *moments, *scalars)
        call.run(f"stats_{plan.family}", plan.blocks, arguments, parameters, running)
    else:
        _given(call, moments, C, parameters, running, eps)
    _normalise(call, tensors, geometry, coefs, flags)
    return state


def _given(call: _Call, moments: tuple[Any, ...], C: int, parameters: str, running: str, eps: float) -> None:
    """Table and coefficients from given statistics."""
    table, coefs, *rest = moments
    call.run("given_channels", -(-C // call.plan.threads), (table, coefs, C, *rest, float(eps)), parameters, running)


def _normalise(call: _Call, tensors: tuple[Any, ...], geometry: tuple[int, ...], coefs: Array, flags: dict[str, bool]) -> None:
    plan = call.plan
    shares = (plan.splits, plan.chunk) if plan.family == "planes" else (plan.chunk,)
    call.run(f"normalise_{plan.family}", plan.blocks, (*tensors, *geometry, *shares, _flat(coefs)), **flags)


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
    C = shape[1]
    parameters, running = _parameter_types(gamma, beta), _parameter_types(mean, var)
    arrays = kernels().arrays
    table, coefs = arrays.empty((7, C), np.float64), arrays.empty((5, C), call.compute)
    moments = (
        *(_flat(table), _flat(coefs)),
        *(call.optional(gamma, parameters), call.optional(beta, parameters), _flat(mean), _flat(var)),
    )
    _given(call, moments, C, parameters, running, eps)
    # A variant with the activation also writes its bits; the fused clamp costs 1/32 of a write.
    mask = arrays.empty(plan.words if relu else 0, np.uint32)
    tensors = call.tensor(x), call.tensor(y), call.tensor(residual), _flat(mask)
    _normalise(call, tensors, _geometry(plan, shape), coefs, {"relu": relu, "residual": residual is not None})


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
    if plan.lanes > 1 and not _aligned(dy, dx, dresidual):
        if state.relu:
            return _backward_of_copies(dy, dx, state, dgamma, dbeta, dresidual)
        plan = kernels().plan.plan(*shape, dtype, False)
    call = _Call(dtype, plan, shape)
    parameters = _parameter_types(dgamma, dbeta)
    N, C, S = shape
    grads, grad_coefs = arrays.empty((5, C), np.float64), arrays.empty((3, C), call.compute)
    geometry = _geometry(plan, shape)
    inputs = call.tensor(x), call.tensor(dy)
    outputs = call.tensor(dx), call.tensor(dresidual), _flat(state.mask)
    tables = _flat(state.table), _flat(grads), _flat(state.coefs), _flat(grad_coefs)
    gradients = call.optional(dgamma, parameters), call.optional(dbeta, parameters)
    if plan.held_backward and not state.frozen:
        arguments = (*inputs, *outputs, *geometry, *tables, *gradients)
        call.run(
            "backward_planes", C, arguments, parameters, held=plan.held_backward, relu=state.relu, residual=state.residual
        )
        return grads[:2]
    space = _workspace(2 * C * plan.splits, plan.groups, (call.device, call.stream))
    work = plan.splits, plan.chunk, _flat(space.partials), _flat(space.counters)
    arguments = (*inputs, outputs[2], *geometry, *work, *tables, *gradients, int(state.frozen))
    call.run(f"reduce_{plan.family}", plan.blocks, arguments, parameters, relu=state.relu)
    shares = (plan.splits, plan.chunk) if plan.family == "planes" else (plan.chunk,)
    arguments = (*inputs, *outputs, *geometry, *shares, *tables[2:])
    call.run(f"apply_{plan.family}", plan.blocks, arguments, relu=state.relu, residual=state.residual, frozen=state.frozen)
    return grads[:2]


def _size_and_type(x: Array) -> tuple[int, str]:
    interface = _interface(x)
    return math.prod(interface["shape"]), str(interface["typestr"])


def _backward_of_copies(
    dy: Array, dx: Array, state: State, dgamma: Array | None, dbeta: Array | None, dresidual: Array | None
) -> Array:
    """dy, dx or dresidual start off a 16-byte boundary, but the activation's bits are in the order of whole vectors: work on copies."""
    arrays = kernels().arrays
    copy, result = arrays.array(dy), arrays.empty_like(dx)
    extra = None if dresidual is None else arrays.empty_like(dresidual)
    sums = backward(copy, result, state, dgamma=dgamma, dbeta=dbeta, dresidual=extra)
    arrays.asarray(dx)[...] = result
    if dresidual is not None:
        arrays.asarray(dresidual)[...] = extra
    return sums


def moments(x: Array, shape: tuple[int, int, int], *, dtype: str | None = None) -> tuple[float, Array, Array]:
    """(count, mean, m2) of each channel, mean and m2 float64 (C,) on the GPU; x and shape as in `forward`."""
    dtype, plan, shape, call = _begin(x, shape, dtype)
    C = shape[1]
    arrays = kernels().arrays
    table, coefs = arrays.empty((7, C), np.float64), arrays.empty((5, C), call.compute)
    space = _workspace(4 * C * plan.splits, plan.groups, (call.device, call.stream))
    nothing = call.optional(None, "float32")
    arguments = (
        *(call.tensor(x), *_geometry(plan, shape), plan.splits, plan.chunk, _flat(space.partials), _flat(space.counters)),
        *(_flat(table), _flat(coefs), nothing, nothing, nothing, nothing, 0.0, 1.0, 1.0),
    )
    call.run(f"stats_{plan.family}", plan.blocks, arguments)
    count = float(shape[0] * shape[2])
    return count, table[2].copy(), table[4] * count
