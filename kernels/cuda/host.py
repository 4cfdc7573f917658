"""What a call needs around its kernels: arrays as pointers, the current stream, a workspace, sample weights.

Arrays are CuPy's or anything else with ``__cuda_array_interface__``, contiguous; in the simulator NumPy arrays. Importing this module
imports neither CuPy nor Numba.
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
# CUDA's handles of the two default streams. CuPy says 0 for the first, which libraries can be told to take for the second; 1 they cannot.
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
MOST_WORKSPACES = 256


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
    """Partial results and counters of one stream, as kernels take them. Kernels of one stream run one after the other, and share it.

    What is replaced by something larger is given back to CuPy's pool while kernels that use it may still be queued. That is right, as
    the pool orders by stream: it gives the memory to arrays that are made on the same stream, whose kernels come later. The counters
    are set to 0 on that stream too. So are they where two Python threads share a stream, as the lock is held until the zeros are queued.
    """

    partials: Array = None
    counters: Array = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_workspaces: dict[tuple[int, int, int], Workspace] = {}
_lock = threading.Lock()
_threads = threading.local()


@dataclass(frozen=True)
class Stream:
    """Where a call's kernels run: CuPy's current device and stream.

    `thread` tells per-thread default streams apart, which all have the handle 2; it is 0 for others, which threads may share.
    """

    device: int
    handle: int
    thread: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """What a workspace belongs to."""
        return self.device, self.handle, self.thread


_SIMULATED = Stream(0, 0)


def stream() -> Stream:
    """CuPy's current device and stream, whose context is current in this thread; device 0 and handle 0 in the simulator."""
    kernel = kernels()
    if kernel.simulated:
        return _SIMULATED
    cuda = kernel.arrays.cuda
    device = cuda.runtime.getDevice()
    known = _threads.__dict__.setdefault("devices", set())
    if device not in known:
        # In a thread that has not used CUDA yet no context is current, and the driver launches nothing. CuPy's own calls see to that by
        # themselves, but a call whose memory comes from the pool makes none.
        cuda.runtime.setDevice(device)
        known.add(device)
    handle = cuda.get_current_stream().ptr or LEGACY_STREAM
    return Stream(device, handle, threading.get_ident() if handle == PER_THREAD_STREAM else 0)


def workspace(partials: int, counters: int, key: tuple[int, int, int]) -> Workspace:
    """The stream's workspace with room for that many float64 and int32; the counters are 0 between launches.

    Of more than MOST_WORKSPACES streams, which a program that makes and drops streams or threads comes to, the oldest gives its own
    back; that is right for the same reason as replacing it is. Where a dropped stream's handle is given to a new stream while the old
    one's kernels still run, both would share a workspace, as they share CuPy's pool: synchronise a stream before dropping it.
    """
    with _lock:
        space = _workspaces.get(key)
        if space is None:
            while len(_workspaces) >= MOST_WORKSPACES:
                del _workspaces[next(iter(_workspaces))]
            space = _workspaces[key] = Workspace()
    with space.lock:
        if space.partials is None or space.partials.size < partials:
            space.partials = flat(kernels().arrays.empty(partials, np.float64))
        if space.counters is None or space.counters.size < counters:
            space.counters = flat(kernels().arrays.zeros(counters, np.int32))
    return space


# ------------------------------------------------------------------------------------------------------------- arrays


def interface(x: Array) -> dict[str, Any]:
    """What an array of any library says of its memory."""
    found = getattr(x, "__cuda_array_interface__", None)
    if found is None and kernels().simulated:
        found = getattr(x, "__array_interface__", None)
    if found is None:
        raise TypeError(f"{type(x).__name__} is not in GPU memory; move it there with cupy.asarray(x)")
    return dict(found)


def dtype_of(x: Array) -> str:
    """The name of x's data type.

    Raises
    ------
    TypeError
        For anything but float32, float64 and float16. bfloat16 has no code in the interface: pass a uint16 view and
        ``dtype="bfloat16"``.
    """
    code = str(x.typestr if type(x) is kernels().launch.DeviceArray else interface(x)["typestr"])
    if code[0] in "<|=" and code[1:] in _TYPES:
        return _TYPES[code[1:]]
    raise TypeError(
        f"array has the type code {code!r}; GPU kernels take float32, float64 and float16, and bfloat16 as a uint16 view with "
        'dtype="bfloat16". Convert with x.astype(numpy.float32)'
    )


def address(x: Array) -> int:
    """Where an array that `flat` gave begins."""
    return int(interface(x)["data"][0]) if kernels().simulated else int(x.pointer)


def is_compact(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> bool:
    """Whether an array fills its memory without gaps, in whatever order of axes (channels last is a permuted (N, C, H, W))."""
    expected = itemsize
    for stride, length in sorted((s, n) for s, n in zip(strides or (), shape, strict=False) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def flat(x: Array, storage: str | None = None, dense: bool = False) -> Any:
    """x as the 1-D array that kernels take: a NumPy view in the simulator, else pointer and size; half types as `storage`.

    Raises
    ------
    TypeError
        For what is not in GPU memory.
    ValueError
        For gaps, unless the caller knows that x is `dense`, and for elements off their boundary, at which a kernel would fail in a way
        that no later call survives.
    """
    kernel = kernels()
    if kernel.simulated:
        interface(x)
        view = x.ravel(order="K")
        if x.size and not np.shares_memory(view, x):
            raise ValueError("GPU kernels need contiguous data; pass numpy.ascontiguousarray(x)")
        pointer, itemsize = int(interface(view)["data"][0]), view.itemsize
        found = view if storage is None or view.dtype == storage else view.view(storage)
    else:
        made = kernel.launch.DeviceArray
        if type(x) is made:
            return x
        if type(x) is kernel.arrays.ndarray:
            pointer, size, itemsize, typestr = x.data.ptr, x.size, x.itemsize, x.dtype.str
            dense = dense or x.flags.c_contiguous or is_compact(x.shape, x.strides, itemsize)
        else:
            seen = interface(x)
            pointer, size, typestr = int(seen["data"][0]), math.prod(seen["shape"]), str(seen["typestr"])
            itemsize = np.dtype(typestr).itemsize
            dense = dense or is_compact(seen["shape"], seen.get("strides"), itemsize)
        if not dense:
            raise ValueError(f"GPU kernels need contiguous data, not shape {x.shape} with gaps or negative strides; copy it")
        found = made(pointer, size, itemsize, "<u2" if storage is not None and itemsize == 2 else typestr, x)
    if pointer % itemsize:
        raise ValueError(f"GPU kernels need elements at multiples of their {itemsize} bytes, not at address {pointer:#x}; copy the array")
    return found


def size_and_type(x: Any) -> tuple[int, str]:
    """Elements of an array that `flat` gave, and their type."""
    return x.size, str(x.dtype.str if kernels().simulated else x.typestr)


@functools.cache
def nothing(device: int, dtype: str) -> Any:
    """The empty array that stands for an absent one."""
    return flat(kernels().arrays.empty(0, dtype))


def tables(rows: int, columns: int, more: int, dtype: str) -> tuple[Array, Any, Any]:
    """(float64 array (rows, columns), it and `more` rows of `dtype` as kernels take them): one allocation, as each costs a microsecond.

    The array has the extra rows behind the others; `dtype` is float32 or float64.
    """
    kernel = kernels()
    itemsize = 4 if dtype == "float32" else 8
    table = kernel.arrays.empty((rows + -(-more * itemsize // 8), columns), np.float64)
    whole = flat(table, dense=True)
    if kernel.simulated:
        return table, whole[: rows * columns], whole[rows * columns :].view(dtype)[: more * columns]
    made = kernel.launch.DeviceArray
    first = made(whole.pointer, rows * columns, 8, "<f8", table)
    return table, first, made(whole.pointer + 8 * rows * columns, more * columns, itemsize, f"<f{itemsize}", table)


# ------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weights:
    """Sample weights as kernels/cuda/weights.py reads them."""

    weight: Any
    counts: Array
    stride_n: int
    stride_s: int

    def arguments(self) -> dict[str, Any]:
        """The arguments of a kernel, by name."""
        return {"weight": self.weight, "counts": flat(self.counts), "weight_n": self.stride_n, "weight_s": self.stride_s}


def weights(weight: Array, shape: tuple[int, int, int], compute: str, unbiased: bool) -> Weights:
    """Weights, their sum and the correction of the variance; computed on the GPU, nothing is waited for."""
    arrays = kernels().arrays
    N, _, S = shape
    weight = arrays.asarray(weight).reshape(-1).astype(compute)
    if S == 1 and 0 < weight.size < N and N % weight.size == 0:
        weight = arrays.repeat(weight, N // weight.size)
    if weight.size not in (N, N * S):
        raise ValueError(f"sample_weight has {weight.size} elements; it needs {N} or {N * S} for data of shape (N, C, S) = {shape}")
    each = S if weight.size == N else 1  # values that a weight stands for
    wide = weight.astype(np.float64)
    total, squares = wide.sum() * each, (wide * wide).sum() * each
    correction = total * total / (total * total - squares) if unbiased else arrays.ones_like(total)
    return Weights(flat(weight), arrays.stack([total, correction]), S // each, 1 if each == 1 else 0)


# ------------------------------------------------------------------------------------------------------------- checks


def parameter_types(*arrays: Any) -> str:
    """The common type of per-channel arrays: "float32" or "float64"; all that are given must agree."""
    found = {dtype_of(a) for a in arrays if a is not None}
    if len(found) > 1:
        raise TypeError(f"per-channel arrays of one call are of one dtype, float32 or float64; these are {sorted(found)}")
    name = found.pop() if found else "float32"
    if name not in ("float32", "float64"):
        raise TypeError(f"per-channel arrays are float32 or float64, not {name}; convert them with .astype(numpy.float32)")
    return name


def aligned(*arrays: Any) -> bool:
    """Whether arrays that `flat` gave begin at 16-byte boundaries, as vectors do."""
    return all(address(a) % 16 == 0 for a in arrays if a is not None)


def check_shape(x: Any, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(N, C, S) as int; they fit an array that `flat` gave, and what kernels count with."""
    N, C, S = (int(n) for n in shape)
    if min(N, C, S) < 1 or x.size != N * C * S:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)} but the array has {x.size} elements; all three are at least 1")
    if max(N, C, S) >= 2**31 or N * S >= 2**32:
        raise ValueError(f"shape (N, C, S) is {tuple(shape)}; N, C and S are below 2**31 and N * S below 2**32. Split the batch")
    return N, C, S
