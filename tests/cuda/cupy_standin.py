"""As much of CuPy as fastbn uses, over NumPy memory: for the simulator, whose kernels take NumPy arrays.

Its arrays offer ``__cuda_array_interface__``, live on a device, and refuse to be mixed with NumPy's in arithmetic, as CuPy's do. It stands
for CuPy's surface, not for CuPy: strides, flags and dtypes are NumPy's own.
"""

import threading
import time
import types
from types import SimpleNamespace

import numpy as np

CURRENT = [0]  # the current device
STREAM = [0]  # the handle of the current stream
SET = []  # (thread, device) of calls that make a device's context current


class _Memory:
    """Memory as CuPy's arrays point to it, and as NumPy takes it back."""

    def __init__(self, array):
        self.array, self.device_id = array, array.device.id

    @property
    def ptr(self):
        return self.array.ctypes.data


class _Addressed:
    """Memory at an address, for np.asarray; the array that owns it stays alive."""

    def __init__(self, memory, shape, dtype, strides):
        data = {"data": (memory.ptr, False), "typestr": np.dtype(dtype).str, "shape": shape, "strides": strides}
        self.owner, self.__array_interface__ = memory.array, {"version": 3, **data}


class ndarray(np.ndarray):
    """An array that says it is on a GPU."""

    __module__ = "cupy"
    device = None  # instead of NumPy's own attribute

    def __new__(cls, shape, dtype=float, memptr=None, strides=None):
        with Device(memptr.device_id):
            return np.asarray(_Addressed(memptr, shape, dtype, strides)).view(cls)

    def __array_finalize__(self, source):
        self.device = source.device if isinstance(source, ndarray) else Device(CURRENT[0])

    @property
    def data(self):
        """CuPy's pointer, not NumPy's buffer."""
        return _Memory(self)

    @property
    def __cuda_array_interface__(self):
        found = dict(super().__array_interface__)
        return {**found, "version": 3, "strides": None if self.flags.c_contiguous else self.strides}

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        for a in (*inputs, *kwargs.get("out", ())):
            if type(a) is np.ndarray and a.ndim:
                raise TypeError(f"Unsupported type {type(a)}")
        if "out" in kwargs:
            kwargs["out"] = tuple(_plain(a) for a in kwargs["out"])
        return wrap(getattr(ufunc, method)(*(_plain(a) for a in inputs), **kwargs))

    def __setitem__(self, key, value):
        if type(value) is np.ndarray and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        super().__setitem__(key, value)


def _plain(a):
    return a.view(np.ndarray) if isinstance(a, ndarray) else a


def wrap(result):
    """A NumPy result as an array of the current device, scalars included: CuPy's reductions give arrays of no dimensions."""
    return np.asarray(result).view(ndarray) if isinstance(result, (np.ndarray, np.generic)) else result


def on_device(a, device=0):
    """A NumPy array's memory, strides included, as an array of a device."""
    with Device(device):
        return a.view(ndarray)


class Device:
    """The device that arrays are made on, while it is entered."""

    def __init__(self, index):
        self.id, self.before = index, []

    def __enter__(self):
        self.before.append(CURRENT[0])
        CURRENT[0] = self.id

    def __exit__(self, *error):
        CURRENT[0] = self.before.pop()


class Event:
    """A mark in time; nothing runs beside the host here."""

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


def _cuda():
    """The module `cupy.cuda`: two devices, one stream each unless `STREAM` says otherwise."""
    properties = {"name": b"stand-in", "major": 0, "minor": 0, "multiProcessorCount": 1, "l2CacheSize": 64, "totalGlobalMem": 1 << 30}
    runtime = SimpleNamespace(
        getDevice=lambda: CURRENT[0],
        setDevice=lambda device: SET.append((threading.get_ident(), device)),
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda device: properties,
        driverGetVersion=lambda: 0,
        runtimeGetVersion=lambda: 0,
        memGetInfo=lambda: (1 << 28, 1 << 30),
    )
    return SimpleNamespace(
        Device=Device,
        Event=Event,
        runtime=runtime,
        get_current_stream=lambda: SimpleNamespace(ptr=STREAM[0]),
        get_elapsed_time=lambda begin, end: 1e3 * (end.at - begin.at),
    )


NAMES = (
    *("empty", "zeros", "ones", "asarray", "array", "empty_like", "zeros_like", "ones_like", "ascontiguousarray"),
    *("repeat", "stack", "sqrt", "array_equal", "from_dlpack", "isfinite", "where"),
)


def _wrapped(function):
    return lambda *arguments, **options: wrap(function(*arguments, **options))


def module():
    """The module `cupy`."""
    made = types.ModuleType("cupy")
    for name in NAMES:
        setattr(made, name, _wrapped(getattr(np, name)))
    made.broadcast_to = lambda a, shape: np.broadcast_to(a, shape, subok=True)
    made.asarray = lambda a, *rest: a if type(a) is ndarray and not rest else wrap(np.asarray(a, *rest))
    made.ndarray, made.float64 = ndarray, np.float64
    made.copyto = lambda to, source: to.__setitem__(Ellipsis, source)
    made.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)
    made.__version__ = "stand-in"
    made.cuda = _cuda()
    return made
