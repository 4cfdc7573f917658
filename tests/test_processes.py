"""Forks at every moment, other start methods, and the end of a process: right bits, no hang. One process tree a test."""

import multiprocessing
import os

import pytest
import subprocesses

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
# Runs before each test's code: what a child must find, and how a child that was forked raw reports it.
START = """
import multiprocessing, os, sys, threading, time, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # forking such a process is the test
import fastbn, subprocesses
fastbn.set_num_threads(3)

def in_fork(function):
    \"\"\"The text that function() returns in a forked child.\"\"\"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text
"""


def run(code, **options):
    return subprocesses.run(START + code, **options).split()


@FORKS
def test_raw_fork_after_use():
    """Parent and child, child of a child, and a child that used another number of threads before."""
    assert run("""
right = subprocesses.digest()
print(in_fork(subprocesses.digest) == right)
print(in_fork(lambda: in_fork(subprocesses.digest)) == right)
print(in_fork(lambda: subprocesses.digest("planes") and in_fork(lambda: subprocesses.digest())) == right)
print(subprocesses.digest() == right)
""") == ["True"] * 4


@FORKS
def test_fork_pool_and_joblib():
    pytest.importorskip("joblib", reason="joblib is not installed")
    assert run("""
import joblib
right = subprocesses.digest("planes")
with multiprocessing.get_context("fork").Pool(3) as pool:
    print(set(pool.map(subprocesses.digest, ["planes"] * 8)) == {right})
with joblib.parallel_backend("multiprocessing", n_jobs=3):
    print(set(joblib.Parallel()(joblib.delayed(subprocesses.digest)("planes") for _ in range(8))) == {right})
print(subprocesses.digest("planes") == right)
""") == ["True"] * 3


@FORKS
def test_fork_while_other_threads_compute():
    """As a server that forks workers while requests are served."""
    assert run("""
right = subprocesses.digest("planes")
stop, wrong = threading.Event(), []

def serve():
    while not stop.is_set():
        if subprocesses.digest("planes") != right:
            wrong.append(1)

servers = [threading.Thread(target=serve) for _ in range(3)]
for server in servers: server.start()
print({in_fork(lambda: subprocesses.digest("planes")) for _ in range(12)} == {right})
stop.set()
for server in servers: server.join()
print(wrong == [])
""") == ["True", "True"]


@FORKS
def test_fork_while_another_thread_compiles():
    """The child finds Numba's compiler lock free, and a compiler that was not stopped in the middle."""
    assert run("""
from numba.core.compiler_lock import global_compiler_lock
import fastbn.kernels.cpu.variants, numba
compiling, go_on = threading.Event(), threading.Event()

def compile():
    with global_compiler_lock:  # as numba.njit in another thread, at a moment that the test knows
        compiling.set()
        go_on.wait(2)

thread = threading.Thread(target=compile)
thread.start()
compiling.wait()
threading.Timer(0.3, go_on.set).start()
print(in_fork(lambda: numba.njit(lambda x: x + 1)(1)))  # compiles
thread.join()
print(numba.njit(lambda x: x + 2)(1))
thread = threading.Thread(target=subprocesses.digest, args=("small",))
thread.start()
time.sleep(0.05)  # now it loads or compiles
child = in_fork(lambda: subprocesses.digest("small"))
thread.join()
print(child == subprocesses.digest("small"))
""") == ["2", "3", "True"]


@FORKS
def test_fork_while_another_thread_makes_the_first_call():
    """That call is importing Numba: the child must not inherit half of it."""
    assert run("""
assert "numba" not in sys.modules
thread = threading.Thread(target=subprocesses.digest, args=("small",))
thread.start()
while "numba" not in sys.modules:
    time.sleep(0.001)
child = in_fork(lambda: subprocesses.digest("small"))
thread.join()
print(child == subprocesses.digest("small"))
""") == ["True"]


@FORKS
def test_fork_while_a_call_is_on_the_desk():
    """The moment is made certain: the child starts with a desk that is taken, its threads gone, and makes its own."""
    assert run("""
from fastbn.cpu import crew
from fastbn.kernels import rows
fastbn.set_num_threads(2)
right = subprocesses.digest("planes")
crew.crew.desk[rows.OWNER] = crew.crew.desk[rows.JOB] = crew.crew.desk[rows.INSIDE] = 1  # as in the middle of a call

def threads_take_part():
    stop = time.perf_counter() + 20
    while time.perf_counter() < stop:
        crew.crew.desk[rows.NAP] = 0
        if subprocesses.digest("planes") != right:
            return "wrong"
        if crew.crew.desk[rows.SEATS]:
            return "shared"

print(in_fork(threads_take_part))
""") == ["shared"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"the system has no {method}")
    script = tmp_path / "main.py"
    script.write_text(START + f"""
if __name__ == "__main__":
    right = subprocesses.digest("planes")
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        print(set(pool.map(subprocesses.digest, ["planes"] * 4)) == {{right}})
""")
    assert subprocesses.run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')").split() == ["True"]


def test_use_at_exit():
    """In atexit and in a `__del__` that runs when modules are torn down, with threads that have been used and with none yet."""
    code = """
import atexit, inputs
x, p = inputs.normal((48, 20, 29, 31)), inputs.parameters(20)

def work():
    mean, var = p[2].copy(), p[3].copy()
    y, ctx = fastbn.batch_norm_forward(x, p[0], p[1], mean, var)
    return [a.tobytes() for a in (y, *fastbn.batch_norm_backward(x, ctx), mean, var)]

right = work()
if PRISTINE:
    from fastbn.cpu import crew
    crew.crew = crew.Crew()  # no thread yet: the system refuses to start one at exit

class Last:
    def __del__(self, work=work, right=right, write=os.write, ending=sys.is_finalizing):
        write(1, f"del {work() == right} {ending()}".encode())

last = Last()
atexit.register(lambda: print("atexit", work() == right, flush=True))
"""
    for pristine in (False, True):
        assert run(f"PRISTINE = {pristine}\n{code}") == ["atexit", "True", "del", "True", "True"]


def test_daemon_threads_that_are_calling_at_exit():
    assert run("""
subprocesses.digest("planes")

def forever():
    while True:
        subprocesses.results("planes")

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.1)
print("end")
""") == ["end"]
