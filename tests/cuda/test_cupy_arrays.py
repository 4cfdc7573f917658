"""CuPy's own arrays, where CuPy is installed, with or without a GPU: their shapes, strides and views need none.

The arrays are made over NumPy's memory, and no kernel of CuPy's runs. What is seen here is how CuPy's arrays look: the attributes that
fastbn asks for, and the views that it makes of them. Results are test_hardware.py's.
"""

import threading

import numpy as np
import pytest

from fastbn.cuda import arrays as gpu_arrays
from fastbn.cuda import layout as gpu_layout
from fastbn.cuda.backend import _forward_plan
from fastbn.kernels.cuda import host

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


def over(a):
    """A CuPy array over a NumPy array's memory, of its strides."""
    memory = cupy.cuda.memory.UnownedMemory(a.ctypes.data, max(a.nbytes, 1), a, 0)
    return cupy.ndarray(a.shape, a.dtype, cupy.cuda.memory.MemoryPointer(memory, 0), strides=a.strides)


@pytest.fixture
def hardware(monkeypatch):
    """CuPy as the arrays' module; the launcher's arrays, without Numba's target."""
    from types import SimpleNamespace

    class DeviceArray:
        def __init__(self, pointer, size, itemsize, typestr, base=None):
            self.pointer, self.size, self.itemsize, self.typestr, self.base = pointer, size, itemsize, typestr, base

    known = SimpleNamespace(arrays=cupy, simulated=False, launch=SimpleNamespace(DeviceArray=DeviceArray))
    monkeypatch.setattr(host, "kernels", lambda: known)


def test_an_array_is_known_without_asking_for_its_interface():
    assert gpu_arrays.is_gpu_array(over(np.zeros(3, np.float32)))
    assert not gpu_arrays.is_gpu_array(np.float32(1))


@pytest.mark.parametrize("name", ["contiguous", "channels last", "Fortran"])
def test_dense_arrays_are_read_in_place(hardware, name):
    x = np.zeros((3, 4, 5, 6), np.float32)
    x = {"contiguous": x, "channels last": np.moveaxis(np.zeros((3, 5, 6, 4), np.float32), -1, 1), "Fortran": np.asfortranarray(x)}[name]
    a = gpu_arrays.Arrays(x=over(x), gamma=over(np.ones(4, np.float32)))
    plan = _forward_plan(a.facts, 1, True)
    a.writable("x")
    a.apart(plan.reach, None, True)
    assert plan.direct == {"x"}
    assert plan.parameters.direct == {"gamma"}
    flat = plan.layout.read(cupy, a.x, True)
    assert (flat.pointer, flat.size, flat.itemsize, flat.typestr) == (x.ctypes.data, x.size, 4, "<f4")
    assert flat.base is a.x


def test_what_cannot_be_read_in_place_is_known():
    raw = np.zeros(4 * 360 + 16, np.uint8)
    start = -raw.ctypes.data % 16
    x = over(raw)[start + 2 : start + 2 + 1440].view(np.float32).reshape(3, 4, 5, 6)
    seen = gpu_layout.seen(x)
    assert seen.offset == 2
    assert not seen.plain
    assert not gpu_layout.seen(over(np.zeros(3, ">f4"))).plain
    assert gpu_layout.seen(x[..., ::2]).reach == (0, 1440 - 4)
    assert gpu_layout.seen(x[::-1]).reach == (-960, 480)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_memory_byte_by_byte(dtype):
    x = np.arange(1, 25, dtype=dtype).reshape(2, 3, 4)[::-1, :, ::2]
    found = gpu_layout._bytes(cupy, over(x))
    assert found.dtype == np.uint8
    read = np.ndarray(found.shape, np.uint8, x.base, found.data.ptr - x.base.ctypes.data, found.strides)  # where CuPy would read
    np.testing.assert_array_equal(np.ascontiguousarray(read).view(x.dtype.newbyteorder("=")).reshape(x.shape), x)


def test_overlaps_are_told_from_addresses(hardware):
    room = np.zeros((2, 4, 4), np.float32)
    a = gpu_arrays.Arrays(x=over(room[0]), out=over(room.reshape(-1)[8:24].reshape(4, 4)))
    with pytest.raises(ValueError, match="out overlaps x"):
        a.apart(_forward_plan(a.facts, 1, True).reach, None, True)


def test_per_thread_default_streams_have_the_handle_that_is_told_apart():
    assert (cupy.cuda.Stream.null.ptr, cupy.cuda.Stream.ptds.ptr) == (0, host.PER_THREAD_STREAM)
    assert threading.get_ident() > 0
