"""Streams, threads and devices on the host's side, with a stand-in for CuPy: what kernels share, and what they must not."""

import threading
from dataclasses import replace

import cupy_standin
import numpy as np
import pytest
from numba import types

import fastbn
from fastbn.cuda import loading, memory, streams
from fastbn.kernels.cuda import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what no kernel has written is converted

PER_THREAD = 2  # CUDA's handle of every thread's own default stream


@pytest.fixture
def hardware(cupy, monkeypatch):
    """The stand-in, seen as on a GPU: streams are asked for, arrays become pointers."""
    known = replace(loading.kernels(), simulated=False)
    monkeypatch.setattr(loading, "kernels", lambda: known)
    monkeypatch.setattr(streams, "_threads", threading.local())
    monkeypatch.setattr(cupy_standin, "SET", [])
    memory.nothing.cache_clear()  # an array of the simulator's, if other tests have run
    yield cupy
    memory.nothing.cache_clear()


def in_thread(function):
    """The function's result in a thread of its own, while this one waits."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_streams_have_workspaces_of_their_own(hardware, monkeypatch):
    keys = [streams.stream()]
    monkeypatch.setattr(cupy_standin, "STREAM", [1234])
    keys.append(streams.stream())
    with hardware.cuda.Device(1):
        keys.append(streams.stream())
    assert keys == [(0, 1, 0), (0, 1234, 0), (1, 1234, 0)]
    spaces = [streams.workspace(8, 2, key) for key in (*keys, keys[1])]
    assert spaces[1] is spaces[3]
    assert len({id(space) for space in spaces}) == 3


def test_cupys_null_stream_is_the_legacy_one_whatever_cuda_core_takes_0_for(hardware):
    assert streams.stream().handle == 1


def test_threads_share_a_stream_but_not_their_own_default_streams(hardware, monkeypatch):
    monkeypatch.setattr(cupy_standin, "STREAM", [1234])
    assert in_thread(streams.stream) == streams.stream()
    monkeypatch.setattr(cupy_standin, "STREAM", [PER_THREAD])
    here = streams.stream()
    there = in_thread(streams.stream)
    assert here.handle == there.handle == PER_THREAD
    assert streams.workspace(8, 2, here) is not streams.workspace(8, 2, there)
    assert streams.stream() == here


def test_a_thread_makes_each_devices_context_current_once(hardware):
    me = threading.get_ident()
    for device in (0, 1, 0):
        with hardware.cuda.Device(device):
            streams.stream()
    made_current = cupy_standin.SET
    assert made_current == [(me, 0), (me, 1)]
    in_thread(streams.stream)
    assert [device for _, device in made_current] == [0, 1, 0]


def test_workspaces_of_dropped_streams_do_not_pile_up(hardware, monkeypatch):
    monkeypatch.setattr(streams, "MOST_WORKSPACES", 4)
    spaces = [streams.workspace(8, 2, (0, handle, 0)) for handle in range(10)]
    assert list(streams._workspaces) == [(0, handle, 0) for handle in range(6, 10)]
    assert streams.workspace(8, 2, (0, 9, 0)) is spaces[9]


def test_a_workspace_that_is_too_small_is_replaced_and_its_counters_are_zero(hardware):
    small = streams.workspace(8, 2, (0, 7, 0))
    first = small.partials, small.counters
    assert streams.workspace(8, 2, (0, 7, 0)).partials is first[0]
    large = streams.workspace(9, 3, (0, 7, 0))
    assert large is small
    assert (large.partials.size, large.counters.size) == (9, 3)
    assert not large.counters.base.any()
    assert first[0].base.size == 8  # what a call has packed already stays its own


def test_elements_off_their_boundary_reach_no_kernel(hardware):
    room = hardware.zeros(68, "u1")
    off = room[1:65].view("f4")
    with pytest.raises(ValueError, match="multiples of their 4 bytes"):
        memory.flat(off)
    assert memory.flat(room[:64].view("f4")).size == 16


def test_gaps_reach_no_kernel(hardware):
    with pytest.raises(ValueError, match="contiguous"):
        memory.flat(hardware.zeros((4, 8), "f4")[:, ::2])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 40, 60), (30, 8)], ids=str)
def test_kernels_get_plain_words_of_their_types(hardware, monkeypatch, shape, dtype):
    """cuda.core packs NumPy's numbers in their own sizes and knows no others than int and float: a kernel would read something else."""
    launched = []
    monkeypatch.setattr(launch, "ready", lambda *rest: None)
    monkeypatch.setattr(launch, "launch", lambda *given: launched.append(given))
    x, channels = hardware.ones(shape, dtype), [hardware.ones(shape[1], "f4") for _ in range(4)]
    options = {"axis": np.int64(1), "eps": np.float32(1e-3)}
    for extra in ({"momentum": np.float64(0.5)}, {"training": np.False_}, {"activation": "relu", "residual": x}):
        _, ctx = fastbn.batch_norm_forward(x, *channels, **options, **extra)
        fastbn.batch_norm_backward(x, ctx)
    fastbn.batch_norm_forward(x, sample_weight=hardware.ones(shape[0], "?"), momentum=0)
    fastbn.batch_norm_inference(x, *channels, **options)
    m = fastbn.moments(x)
    _, ctx = fastbn.batch_norm_forward_apply(x, m, *channels, unbiased=False, **options)
    fastbn.batch_norm_backward_apply(x, ctx, *fastbn.batch_norm_backward_reduce(x, ctx), np.float32(7))
    assert len(launched) >= 14
    for variant, blocks, threads, device, stream, arguments in launched:
        assert [type(n) for n in (blocks, threads, device, stream)] == [int] * 4
        for argument, wanted in zip(arguments, variant.signature(), strict=True):
            if isinstance(wanted, types.Array):
                assert type(argument) is launch.DeviceArray
                assert argument.size == 0 or argument.itemsize == wanted.dtype.bitwidth // 8
            else:
                assert type(argument) is {types.int64: int, types.float64: float}[wanted]
