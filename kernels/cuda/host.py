"""What a call needs around its kernels: arrays as pointers, the current stream, a workspace, variants by name.

Arrays are anything with ``__cuda_array_interface__``, contiguous; in the simulator NumPy arrays. Importing this module imports
neither CuPy nor Numba.
"""

import functools
import importlib
import importlib.util
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any
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
    return Kernels(arrays=arrays, simulated=target.SIMULATED, **loaded)


@dataclass(frozen=True)
class Kernels:
    arrays: Any
    simulated: bool
    channels: Any
    launch: Any
    plan: Any
    variants: Any


@dataclass
class Workspace:
    """Partial results and counters of one stream; kernels of one stream run one after the other, so they may share it."""

    partials: Array = None
    counters: Array = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_workspaces: dict[tuple[int, int], Workspace] = {}
_lock = threading.Lock()


def dtype_of(x: Array) -> str:
    """The name of x's data type, from its interface.

    Raises
    ------
    TypeError
        For anything but float32, float64 and float16. bfloat16 has no code in the interface: pass a uint16 view and
        ``dtype="bfloat16"``.
    """
    code = str(interface(x)["typestr"])
    if code[0] in "<|=" and code[1:] in _TYPES:
        return _TYPES[code[1:]]
    raise TypeError(
        f"array has the type code {code!r}; GPU kernels take float32, float64 and float16, and bfloat16 as a uint16 view with "
        'dtype="bfloat16". Convert with x.astype(numpy.float32)'
    )


def interface(x: Array) -> dict[str, Any]:
    found = getattr(x, "__cuda_array_interface__", None)
    if found is None and kernels().simulated:
        found = getattr(x, "__array_interface__", None)
    if found is None:
        raise TypeError(f"{type(x).__name__} is not in GPU memory; move it there with cupy.asarray(x)")
    return dict(found)


def address(x: Array) -> int:
    return int(interface(x)["data"][0])


def is_compact(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> bool:
    """Whether an array fills its memory without gaps, in whatever order of axes (channels last is a permuted (N, C, H, W))."""
    expected = itemsize
    for stride, length in sorted((s, n) for s, n in zip(strides or (), shape, strict=False) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def flat(x: Array, storage: str | None = None) -> Any:
    """x as the 1-D contiguous array that kernels take: a numpy view in the simulator, else pointer and size."""
    kernel = kernels()
    if kernel.simulated:
        view = x.ravel(order="K")
        if x.size and not np.shares_memory(view, x):
            raise ValueError("GPU kernels need contiguous data; pass numpy.ascontiguousarray(x)")
        return view if storage is None else view.view(storage)
    found = interface(x)
    if not is_compact(found["shape"], found.get("strides"), np.dtype(found["typestr"]).itemsize):
        raise ValueError(f"GPU kernels need contiguous data, not shape {found['shape']} with strides {found['strides']}; copy it")
    typestr = str(found["typestr"]) if storage is None else np.dtype(storage).str
    itemsize = np.dtype(typestr).itemsize
    size = math.prod(found["shape"])
    return kernel.launch.DeviceArray(int(found["data"][0]), size, itemsize, typestr, x)


def stream() -> tuple[int, int]:
    """(device, handle) of CuPy's current device and stream; (0, 0) in the simulator."""
    kernel = kernels()
    if kernel.simulated:
        return 0, 0
    return int(kernel.arrays.cuda.runtime.getDevice()), int(kernel.arrays.cuda.get_current_stream().ptr)


def workspace(partials: int, counters: int, key: tuple[int, int]) -> Workspace:
    """The stream's workspace with room for that many float64 and int32; the counters are 0 between launches."""
    arrays = kernels().arrays
    with _lock:
        space = _workspaces.setdefault(key, Workspace())
    with space.lock:
        if space.partials is None or space.partials.size < partials:
            space.partials = arrays.empty(partials, np.float64)
        if space.counters is None or space.counters.size < counters:
            space.counters = arrays.zeros(counters, np.int32)
    return space


@functools.cache
def nothing(device: int, dtype: str) -> Any:
    """The empty array that stands for an absent one."""
    return flat(kernels().arrays.empty(0, dtype))


@dataclass(frozen=True)
class Weights:
    """Sample weights as kernels/cuda/weights.py reads them; empty arrays where there are none."""

    weight: Array
    counts: Array
    stride_n: int = 0
    stride_s: int = 0

    @property
    def given(self) -> bool:
        """Whether there are weights."""
        return bool(self.counts.size)

    def of(self, plan: Any) -> tuple[Any, ...]:
        """The arguments of a kernel: the array and its strides."""
        strides = (self.stride_n, self.stride_s) if plan.family == "planes" else (self.stride_n,)
        return flat(self.weight), *strides


class Call:
    """One call's launches: kernel names to variants, argument names to arrays. Twin of the table in dispatch.py."""

    def __init__(self, dtype: str, plan: Any, shape: tuple[int, int, int]) -> None:
        self.kernels, self.dtype, self.plan, self.shape = kernels(), dtype, plan, shape
        self.device, self.stream = stream()
        self.todo: list[tuple[Any, ...]] = []
        self.storage = "uint16" if dtype in ("float16", "bfloat16") else None
        self.compute = "float64" if dtype == "float64" else "float32"

    def tensor(self, x: Array | None) -> Any:
        """x, dy and the like, half types as uint16; an absent one is empty."""
        return nothing(self.device, self.storage or self.dtype) if x is None else flat(x, self.storage)

    def optional(self, x: Array | None, dtype: str) -> Any:
        """A per-channel array, or an empty one of `dtype`."""
        return nothing(self.device, dtype) if x is None else flat(x)

    def weights(self, weight: Array | None, unbiased: bool) -> Weights:
        """Weights, their sum and the correction of the variance; computed on the GPU, nothing is waited for."""
        arrays = self.kernels.arrays
        if weight is None:
            return Weights(arrays.empty(0, self.compute), arrays.empty(0, np.float64))
        N, _, S = self.shape
        weight = arrays.asarray(weight).reshape(-1).astype(self.compute)
        if S == 1 and 0 < weight.size < N and N % weight.size == 0:
            weight = arrays.repeat(weight, N // weight.size)
        if weight.size not in (N, N * S):
            raise ValueError(
                f"sample_weight has {weight.size} elements; it needs {N} or {N * S} for data of shape (N, C, S) = {self.shape}"
            )
        each = S if weight.size == N else 1  # values that a weight stands for
        wide = weight.astype(np.float64)
        total, squares = wide.sum() * each, (wide * wide).sum() * each
        correction = total * total / (total * total - squares) if unbiased else arrays.ones_like(total)
        return Weights(weight, arrays.stack([total, correction]), S // each, 1 if each == 1 else 0)

    def run(self, name: str, blocks: int, arguments: tuple[Any, ...], parameters="float32", running="float32", **flags) -> None:
        """Add the kernel `name` of this call's dtype and plan to what `go` launches."""
        plan, sizes = self.plan, self.kernels.plan.DEFAULT
        bound = self.kernels.plan.largest_block(plan.family, plan.lanes, self.dtype, sizes)
        if name.endswith("_columns"):
            options = {"lanes": plan.lanes, "threads": plan.threads, "widest": plan.widest, **flags}
        elif name.endswith("_planes"):
            options = {"lanes": plan.lanes, **flags}
        else:
            options = flags
        variant = self.kernels.variants.Variant(name, self.dtype, tuple(options.items()), bound, parameters, running)
        self.todo.append((variant, blocks, plan.threads, self.device, self.stream, arguments))

    def go(self) -> None:
        """Launch what `run` was given, in order. All of it is compiled first: a failure leaves running statistics as they were."""
        launch = self.kernels.launch
        for variant, *_ in self.todo:
            launch.ready(variant, self.device)
        for each in self.todo:
            launch.launch(*each)


def parameter_types(*arrays: Array | None) -> str:
    """The common type of per-channel arrays: "float32" or "float64"; all that are given must agree."""
    found = {dtype_of(a) for a in arrays if a is not None}
    if len(found) > 1:
        raise TypeError(f"per-channel arrays of one call are of one dtype, float32 or float64; these are {sorted(found)}")
    name = found.pop() if found else "float32"
    if name not in ("float32", "float64"):
        raise TypeError(f"per-channel arrays are float32 or float64, not {name}; convert them with .astype(numpy.float32)")
    return name


def aligned(*arrays: Array | None) -> bool:
    return all(address(a) % 16 == 0 for a in arrays if a is not None)


def geometry(plan: Any, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape arguments of a kernel: (N, C, S) of planes, (rows, C, wide) of columns."""
    N, C, S = shape
    return (N, C, S) if plan.family == "planes" else (N, C, plan.wide)


def check_shape(x: Array, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    N, C, S = (int(n) for n in shape)
    size = math.prod(interface(x)["shape"])
    if min(N, C, S) < 1 or size != N * C * S:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)} but the array has {size} elements; all three are at least 1")
    if max(N, C, S) >= 2**31 or N * S >= 2**32:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)}; N, C and S are below 2**31 and N * S below 2**32. Split the batch")
    return N, C, S


