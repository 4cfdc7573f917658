"""CuPy's own arrays, where CuPy is installed, with or without a GPU: their shapes, strides and views need none.

The arrays are made over NumPy's memory, and no kernel of CuPy's runs. What is seen here is how CuPy's arrays look: the attributes that
fastbn asks for, and the views that it makes of them. Results are test_hardware.py's.
"""

import threading

import numpy as np
import pytest

from fastbn.arguments import overlaps, plans
from fastbn.common.facts import Seen
from fastbn.cuda import arrays, backend, layout, loading, streams

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
    monkeypatch.setattr(loading, "kernels", lambda: known)


def seen(a):
    return Seen(a.shape, a.strides, a.dtype, a.data.ptr % 16)


def test_an_array_is_known_without_asking_for_its_interface():
    assert arrays.is_gpu_array(over(np.zeros(3, np.float32)))
    assert not arrays.is_gpu_array(np.float32(1))


@pytest.mark.parametrize("name", ["contiguous", "channels last", "Fortran"])
def test_dense_arrays_are_read_in_place(hardware, name):
    x = np.zeros((3, 4, 5, 6), np.float32)
    x = {"contiguous": x, "channels last": np.moveaxis(np.zeros((3, 5, 6, 4), np.float32), -1, 1), "Fortran": np.asfortranarray(x)}[name]
    given = over(x), over(np.ones(4, np.float32)), *[None] * 6
    plan, given, exchange = plans.look("forward", given, 1, True, None)
    assert exchange is None
    assert backend.separate(plan, given)
    assert plan.direct == {"x"}
    assert plan.parameters.direct == {"gamma"}
    flat = plan.layout.read(given[0], True)
    assert (flat.pointer, flat.size, flat.itemsize, flat.typestr) == (x.ctypes.data, x.size, 4, "<f4")
    assert flat.base is given[0]


def test_what_cannot_be_read_in_place_is_known():
    raw = np.zeros(4 * 360 + 16, np.uint8)
    start = -raw.ctypes.data % 16
    x = over(raw)[start + 2 : start + 2 + 1440].view(np.float32).reshape(3, 4, 5, 6)
    assert seen(x).offset == 2
    assert not seen(x).plain
    assert not seen(over(np.zeros(3, ">f4"))).plain
    assert seen(x[..., ::2]).reach == (0, 1440 - 4)
    assert seen(x[::-1]).reach == (-960, 480)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_memory_byte_by_byte(hardware, dtype):
    x = np.arange(1, 25, dtype=dtype).reshape(2, 3, 4)[::-1, :, ::2]
    found = layout._bytes(over(x))
    assert found.dtype == np.uint8
    read = np.ndarray(found.shape, np.uint8, x.base, found.data.ptr - x.base.ctypes.data, found.strides)  # where CuPy would read
    np.testing.assert_array_equal(np.ascontiguousarray(read).view(x.dtype.newbyteorder("=")).reshape(x.shape), x)


def test_overlaps_are_told_from_addresses(hardware):
    room = np.zeros((2, 4, 4), np.float32)
    x, out = over(room[0]), over(room.reshape(-1)[8:24].reshape(4, 4))
    plan, given, _ = plans.look("forward", (x, *[None] * 6, out), 1, True, None)
    assert not backend.separate(plan, given)
    with pytest.raises(ValueError, match="out overlaps x"):
        overlaps.check_forward(plan, *given)


def test_per_thread_default_streams_have_the_handle_that_is_told_apart():
    assert (cupy.cuda.Stream.null.ptr, cupy.cuda.Stream.ptds.ptr) == (0, streams.PER_THREAD_STREAM)
    assert threading.get_ident() > 0
