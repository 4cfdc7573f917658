"""Ctrl-C in a long call: KeyboardInterrupt soon, nothing written afterwards, running statistics as before, the next call works."""

import os
import signal
import threading

import inputs
import numpy as np
import pytest
import subprocesses

import fastbn
from fastbn.cpu import backend, uninterrupted

ALARM = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no interval timers")


@ALARM
def test_one_interrupt():
    """In the middle of a call of seconds: KeyboardInterrupt after a piece of it, with threads gone from its arrays."""
    out = subprocesses.run("""
import signal, time
import numpy as np, fastbn, inputs
from fastbn.cpu import crew, dispatch
from fastbn.kernels import rows
dispatch.PIECE = 1 << 16  # a long call, of many pieces
x = np.tile(inputs.normal((1, 64, 56, 56)), (64, 1, 1, 1))
p, out = inputs.parameters(64), np.zeros_like(x)
for number in (1, 3):
    fastbn.set_num_threads(number)
    def work():
        for _ in range(10_000):
            fastbn.batch_norm_inference(x, *p, out=out)
    fastbn.batch_norm_inference(x, *p, out=out)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    start = time.perf_counter()
    try:
        work()
        print("no interrupt")
    except KeyboardInterrupt:
        print(time.perf_counter() - start < 1.0)  # 0.1 s, a piece, and what a busy machine adds
    out[...] = 0
    time.sleep(0.05)
    print(not out.any(), not crew.crew.desk[[rows.OWNER, rows.INSIDE]].any())
""")
    assert out.split() == ["True"] * 6


@ALARM
def test_a_storm_of_interrupts():
    """Every millisecond for 2 s, over many calls: each call ends, with no thread left at work, and the next one is right."""
    out = subprocesses.run("""
import signal, time
import numpy as np, fastbn, inputs
from fastbn.cpu import crew, dispatch
from fastbn.kernels import rows
dispatch.PIECE = 1 << 16
fastbn.set_num_threads(3)
x = inputs.normal((16, 64, 28, 28))
p = inputs.parameters(64)
right, out = fastbn.batch_norm_inference(x, *p), np.zeros_like(x)
interrupts, left, wrong, armed = 0, 0, 0, False

def handler(number, frame):
    if armed:
        raise KeyboardInterrupt

stop = time.perf_counter() + 2
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while time.perf_counter() < stop:
    try:
        armed = True
        for _ in range(3):
            fastbn.batch_norm_inference(x, *p, out=out)
        armed = False
    except KeyboardInterrupt:
        armed = False
        interrupts += 1
        left += bool(crew.crew.desk[[rows.OWNER, rows.INSIDE]].any())
        wrong += fastbn.batch_norm_inference(x, *p).tobytes() != right.tobytes()
signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupts > 20, left, wrong)
""")
    assert out.split() == ["True", "0", "0"]


@ALARM
def test_a_call_of_the_library():
    """Real kernels: one Ctrl-C at 20 moments of a training forward into `out`, and of a backward."""
    out = subprocesses.run("""
import os, signal, threading, time
import numpy as np, fastbn, inputs
fastbn.set_num_threads(2)
x = np.tile(inputs.normal((1, 64, 56, 56)), (48, 1, 1, 1))  # 39 MB: two pieces and more
gamma, beta, mean, var = inputs.parameters(64)
out = np.zeros_like(x)
forward = lambda: fastbn.batch_norm_forward(x, gamma, beta, mean, var, out=out)
ctx = forward()[1]
y, dx = out.copy(), fastbn.batch_norm_backward(x, ctx)[0]
start = time.perf_counter()
forward()
length = time.perf_counter() - start
signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupts, problems = 0, []
for k in range(20):
    before, out[...] = (mean.copy(), var.copy()), 0
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, length * k / 20))
            if k % 2:
                fastbn.batch_norm_backward(x, ctx, out=out)
            else:
                forward()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
        taken = out.copy()
        if not ((mean == before[0]).all() and (var == before[1]).all()):
            problems.append("running statistics moved")
        time.sleep(0.005)
        if out.tobytes() != taken.tobytes():
            problems.append("written to afterwards")
forward()
print(interrupts >= 5, problems, out.tobytes() == y.tobytes(), fastbn.batch_norm_backward(x, ctx)[0].tobytes() == dx.tobytes())
""")
    assert out == "True [] True True\n"


# A first call in a fresh interpreter, with no cache: Ctrl-C at 60 moments of importing Numba and compiling.
COMPILING = """
import signal
import subprocesses, fastbn
from fastbn.cpu import dispatch
{change}
interrupts = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for k in range(60):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02 + 0.003 * (k % 13))
        subprocesses.digest("planes")
        break
    except KeyboardInterrupt:
        interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupts, subprocesses.digest("planes"))
"""


@ALARM
def test_in_the_compiler():
    """Kernels load on while calls are interrupted; then the same call works. Numba itself, interrupted, fails for good."""
    interrupts, digest = subprocesses.run(COMPILING.format(change=""), env={"FASTBN_CACHE": "0"}, timeout=120).split()
    assert int(interrupts) >= 3
    assert digest == subprocesses.digest("planes")


@ALARM
def test_an_interrupt_ends_the_wait_for_the_compiler():
    """At once, though the compiler takes longer; the work is done all the same, once, and an error of it is raised where it was asked."""
    out = subprocesses.run("""
import signal, time
from fastbn.cpu.uninterrupted import uninterrupted
signal.signal(signal.SIGALRM, signal.default_int_handler)
done = []

def work():
    time.sleep(1.0)
    done.append(1)

signal.setitimer(signal.ITIMER_REAL, 0.1)
start = time.perf_counter()
try:
    uninterrupted(work)
except KeyboardInterrupt:
    print(time.perf_counter() - start < 0.8, done)
time.sleep(1.2)
print(done, uninterrupted(lambda: "result"))
try:
    uninterrupted(lambda: 1 // 0)
except ZeroDivisionError:
    print("raised")
""")
    assert out.split() == ["True", "[]", "[1]", "result", "raised"]


def test_a_thread_that_does_not_begin(monkeypatch):
    """Short of memory a thread may end before its first line, unheard. Then the caller does the work, and a late thread does not."""
    late = []
    monkeypatch.setattr(uninterrupted._thread, "start_new_thread", lambda run, arguments: late.append(run))
    monkeypatch.setattr(uninterrupted, "PATIENCE", 0.02)
    done = []
    uninterrupted.uninterrupted(lambda: done.append(threading.current_thread()))
    late[0]()
    assert done == [threading.main_thread()]
    assert not uninterrupted._running


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent():
    """Neither at its exit, nor in a handler's fork in the middle of the wait."""
    out = subprocesses.run("""
import atexit, os, signal, time
from fastbn.cpu.uninterrupted import uninterrupted

def fork(number, frame):
    global child
    child = os.fork()

child = None
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    uninterrupted(lambda: time.sleep(0.6))
    print("parent", flush=True)
except RuntimeError as error:
    print("child", "call again" in str(error), flush=True)
    atexit._run_exitfuncs()
    os._exit(0)  # a full exit would wait for the watchdog that these tests start, which no child has
if child:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert sorted(out.split()) == ["0", "True", "child", "parent"]


def test_no_memory_to_compile(monkeypatch):
    """LLVM would end the process."""
    monkeypatch.setattr(uninterrupted, "MEMORY", 1 << 60)
    with pytest.raises(MemoryError, match="to compile a kernel; free some"):
        uninterrupted.uninterrupted(lambda: 1)


def test_a_thread_that_others_may_wait_for_compiles_itself(tmp_path):
    """As a `__del__` does while Numba compiles or is imported: another thread would wait for this one's lock, and this one for that."""
    out = subprocesses.run("""
import sys, threading
from numba.core.compiler_lock import global_compiler_lock
from fastbn.cpu.uninterrupted import uninterrupted

def work():
    with global_compiler_lock:
        return threading.current_thread() is threading.main_thread()

print(uninterrupted(work))
with global_compiler_lock:
    print(uninterrupted(work))
with open("imported.py", "w") as file:
    file.write("import __main__; print(__main__.uninterrupted(__main__.work))")
sys.path.insert(0, "")
import imported
""", cwd=tmp_path)
    assert out.split() == ["False", "True", "True"]


def training_arguments():
    gamma, beta, mean, var = inputs.parameters(5)
    return inputs.normal((6, 5, 7)), gamma, beta, mean, var


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("dtypes", ["float32", "float64, float32", "big-endian"])
@pytest.mark.parametrize("place", ["Context", "before the kernels", "after the kernels"])
def test_running_statistics_are_all_or_nothing(place, dtypes, error, monkeypatch):
    """An exception anywhere, even after the kernels have moved them."""
    x, gamma, beta, mean, var = training_arguments()
    if dtypes == "float64, float32":
        mean = mean.astype(np.float64)
    if dtypes == "big-endian":
        mean, var = mean.astype(">f4"), var.astype(">f4")
    before = mean.tobytes(), var.tobytes()
    original = backend.run

    def fail(*args, **kwargs):
        raise error("in the middle")

    def fail_after(*args, **kwargs):
        original(*args, **kwargs)
        raise error("in the middle")

    if place == "Context":
        monkeypatch.setattr(backend, "Context", fail)
    else:
        monkeypatch.setattr(backend, "run", fail if place == "before the kernels" else fail_after)
    with pytest.raises(error, match="in the middle"):
        fastbn.batch_norm_forward(x, gamma, beta, mean, var)
    assert (mean.tobytes(), var.tobytes()) == before
    monkeypatch.undo()
    fastbn.batch_norm_forward(x, gamma, beta, mean, var)
    assert mean.tobytes() != before[0]


def test_a_warning_that_is_an_error_moves_nothing():
    """The warning of a channel that is not finite comes before the others are moved. (Warnings are errors in these tests.)"""
    x, gamma, beta, mean, var = training_arguments()
    x[1, 2, 3] = np.nan
    before = mean.tobytes(), var.tobytes()
    with pytest.raises(RuntimeWarning, match="1 of 5 channels"):
        fastbn.batch_norm_forward(x, gamma, beta, mean, var)
    assert (mean.tobytes(), var.tobytes()) == before
