"""Thousands of calls leave nothing behind, and a MemoryError leaves everything as it was."""

import gc
import os
import sys
import threading
import time
import weakref

import inputs
import numpy as np
import pytest
import subprocesses

import fastbn
from fastbn.cpu import dispatch

CALLS = int(os.environ.get("FASTBN_TEST_SOAK_CALLS", "10000"))
# An array of 64 KiB kept by each call would be 320 MB after half of the calls; a Python object of 200 bytes, 1 MB. Arenas of the
# allocator grow and shrink by 1 MiB or less, those of other threads too: 4 MB tell one from the other.
GROWTH = 4 << 20


def errors_of(x, p):
    for bad in (lambda: fastbn.batch_norm_forward(x[0, 0, 0]), lambda: fastbn.batch_norm_forward(x, p[0][1:])):
        try:
            bad()
        except ValueError:
            continue
        raise AssertionError("accepted")


def mixed_calls(count):
    """`count` calls over layouts, dtypes, functions, errors and the pool, of arrays of 64 KiB and, now and then, of 3 MB."""
    small = {d: inputs.normal((4, 8, 16, 32)).astype(d) for d in (np.float32, np.float64)}
    views = [(x, 1) for x in small.values()] + [(np.moveaxis(small[np.float32], 1, -1), -1), (small[np.float32][:, :, :, ::-1], 1)]
    large, p = inputs.normal((32, 8, 64, 48)), inputs.parameters(8)
    assert large.size >= dispatch.PARALLEL_FROM
    done = 0
    while done < count:
        for x, axis in views:
            y, ctx = fastbn.batch_norm_forward(x, *p, axis=axis)
            fastbn.batch_norm_backward(y, ctx)
            fastbn.batch_norm_inference(x, *p, axis=axis)
            fastbn.moments(x, axis=axis)
            done += 4
        errors_of(small[np.float32], p)
        done += 2
        if done % 90 == 0:
            _, ctx = fastbn.batch_norm_forward(large, *p)
            fastbn.batch_norm_backward(large, ctx)
            done += 2


def test_nothing_grows():
    pytest.importorskip("psutil", reason="psutil is not installed")
    # In a process of its own: in one that ran thousands of tests, other allocations come and go by megabytes.
    subprocesses.run("import test_soak; test_soak.soak()", timeout=300)


def soak():
    import psutil

    process, before = psutil.Process(), fastbn.get_num_threads()

    def state():
        gc.collect()
        files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        return process.memory_info().rss, process.num_threads(), files, len(gc.get_objects())

    fastbn.set_num_threads(3)
    try:
        mixed_calls(CALLS // 2)  # caches of plans and schedules fill, arenas reach their size
        memory, threads, files, objects = state()
        mixed_calls(CALLS // 2)
        later = state()
    finally:
        fastbn.set_num_threads(before)
    assert later[0] - memory < GROWTH, f"memory grew by {(later[0] - memory) / 1e6:.1f} MB in {CALLS // 2} calls"
    assert later[1:3] == (threads, files), "threads or open files grew"
    assert later[3] - objects < 50, f"{later[3] - objects} Python objects more"


def test_short_lived_callers_leave_no_threads():
    """A server starts a thread a request: workers belong to the process, not to the caller."""
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(3)
    try:
        subprocesses.digest("planes")
        count = threading.active_count()
        for _ in range(50):
            thread = threading.Thread(target=subprocesses.results, args=("planes",))
            thread.start()
            thread.join()
        assert threading.active_count() == count
    finally:
        fastbn.set_num_threads(before)


def test_contexts_are_freed():
    """Without the garbage collector: no cycle keeps x alive, nor do workers, once they have seen that a share is done."""
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(3)
    gc.disable()
    try:
        x = inputs.normal((32, 8, 64, 48))
        assert x.size >= dispatch.PARALLEL_FROM
        y, ctx = fastbn.batch_norm_forward(x)
        fastbn.batch_norm_backward(y, ctx)
        seen = weakref.ref(x)
        del x, y, ctx
        deadline = time.monotonic() + 20
        while seen() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen() is None
    finally:
        gc.enable()
        fastbn.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits a process's memory on Linux only")
def test_out_of_memory():
    """A real MemoryError at several sizes: inputs and running statistics as before; with memory again, the right result."""
    out = subprocesses.run("""
import resource
import numpy as np, fastbn, inputs
x, dy = (np.tile(inputs.normal((1, 8, 64, 64), seed=s), (64, 1, 1, 1)) for s in (0, 1))  # 8 MB
gamma, beta, mean, var = inputs.parameters(8)
y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var)
right = fastbn.batch_norm_backward(dy, ctx)
transposed = x.transpose(0, 2, 1, 3)[:, ::2]  # will be copied
arrays = (x, dy, gamma, beta, mean, var)
before = [a.tobytes() for a in arrays]
errors = 0
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
for spare in (0, 1 << 20, 3 << 20, 5 << 20, 9 << 20):
    calls = (lambda: fastbn.batch_norm_forward(x, gamma, beta, mean, var), lambda: fastbn.batch_norm_backward(dy, ctx),
             lambda: fastbn.batch_norm_forward(transposed, axis=2), lambda: fastbn.batch_norm_inference(x, gamma, beta, mean, var))
    for k, call in enumerate(calls):
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, -1))
        try:
            call()
            raised = False
        except MemoryError:
            raised = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        errors += raised
        if raised or k:
            assert [a.tobytes() for a in arrays] == before, (spare, k)
        else:
            mean[...], var[...] = (np.frombuffer(b, np.float32) for b in before[4:])
print(errors >= 4, all(a.tobytes() == b.tobytes() for a, b in zip(fastbn.batch_norm_backward(dy, ctx), right)))
""")
    assert out == "True True\n"
