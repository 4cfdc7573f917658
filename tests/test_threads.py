"""Many Python threads at once, thread counts, threads that wait, and Numba's threading layers, which must never start."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import checks
import inputs
import numpy as np
import pytest
import subprocesses

import fastbn
from fastbn.cpu import crew, dispatch, processors, threads
from fastbn.kernels import rows


@pytest.fixture(autouse=True)
def three_threads():
    """Three threads, so that calls are shared whatever the machine; afterwards as before."""
    before = fastbn.get_num_threads()
    fastbn.set_num_threads(3)
    yield
    fastbn.set_num_threads(before)


def single_threaded(name):
    fastbn.set_num_threads(1)
    expected = subprocesses.results(name)
    fastbn.set_num_threads(3)
    return expected


def assert_same(actual, expected, what):
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert checks.same_bits(a, b), f"{what}: result {k} of shape {a.shape} differs from the single-threaded one"


@pytest.mark.parametrize("name", subprocesses.WORK)
def test_sixteen_python_threads_give_the_single_threaded_bits(name):
    expected = single_threaded(name)
    start = threading.Barrier(16)

    def work(_):
        start.wait(timeout=60)
        return [subprocesses.results(name) for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        for rounds in pool.map(work, range(16)):
            for actual in rounds:
                assert_same(actual, expected, name)


def test_threads_take_part(monkeypatch):
    """Or the tests of this module would hold nothing."""
    monkeypatch.setattr(crew, "crew", crew.Crew())
    fastbn.set_num_threads(2)
    x, parameters, stop = inputs.normal((48, 16, 32, 32)), inputs.parameters(16), time.perf_counter() + 30
    came = 0
    while came < 5:
        assert time.perf_counter() < stop, "no thread came to any call"
        crew.crew.desk[rows.NAP] = 0
        fastbn.batch_norm_inference(x, *parameters)
        came += crew.crew.desk[rows.SEATS] > 0
    crew.crew.dismiss()


def right_without_help(monkeypatch):
    """Whether calls are right, and nobody takes part in them."""
    expected = single_threaded("planes")
    monkeypatch.setattr(crew, "crew", crew.Crew())
    assert_same(subprocesses.results("planes"), expected, "alone")
    return not crew.crew.desk[rows.SEATS]


def test_dead_threads_cost_nothing_but_speed(monkeypatch):
    monkeypatch.setattr(crew, "_stand_by", lambda serve, desk, asleep: None)  # a thread that ends at once
    assert right_without_help(monkeypatch)


def test_no_more_threads(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert right_without_help(monkeypatch)
    assert crew.crew.hired == crew.crew.most == 0


def test_a_system_without_futex():
    """Threads sleep in the interpreter, and are woken there; the bits are the same."""
    out = subprocesses.run(
        """
from fastbn.kernels.cpu import atomics
atomics.FUTEX = None
import time, fastbn, subprocesses
from fastbn.cpu import crew
from fastbn.kernels import rows
fastbn.set_num_threads(2)
right, came, slept = subprocesses.digest("planes"), 0, 0
stop = time.perf_counter() + 30
while (came < 3 or slept < 3) and time.perf_counter() < stop:
    came += subprocesses.digest("planes") == right and crew.crew.desk[rows.SEATS] > 0
    time.sleep(0.02)
    slept += crew.crew.desk[rows.SLEEPERS] > 0
print(right, came >= 3, slept >= 3, crew.crew.sleeps_in_kernel)
""",
        env={"FASTBN_CACHE": "0"},
        timeout=120,
    )
    assert out.split() == [subprocesses.digest("planes"), "True", "True", "False"]


def test_threads_sleep_when_nobody_calls():
    """They use no processor then."""
    out = subprocesses.run("""
import time, fastbn, subprocesses
from fastbn.cpu import crew
from fastbn.kernels import rows
fastbn.set_num_threads(2)
subprocesses.digest("planes")
stop = time.perf_counter() + 20
while not crew.crew.desk[rows.SLEEPERS] and time.perf_counter() < stop:
    time.sleep(0.01)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before < 0.1)
""")
    assert out == "True\n"


def test_joblib_threads():
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    expected = single_threaded("planes")
    with joblib.parallel_backend("threading", n_jobs=4):
        for actual in joblib.Parallel()(joblib.delayed(subprocesses.results)("planes") for _ in range(8)):
            assert_same(actual, expected, "joblib threading")


def test_numbas_own_threads_never_start():
    """And a parallel kernel of another library beside ours gives its own results: Numba's layer is left to it."""
    out = subprocesses.run("""
import threading, numba, numpy as np, fastbn, subprocesses
fastbn.set_num_threads(3)
before = subprocesses.digest("planes")
try:
    numba.threading_layer()
except ValueError:  # Numba's way to say that none has been initialised
    print("not started")

@numba.njit(parallel=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s

found = []
thread = threading.Thread(target=lambda: found.extend(total(np.ones(100_000)) for _ in range(200)))
thread.start()
same = {subprocesses.digest("planes") for _ in range(5)} == {before}
thread.join()
print(same, set(found) == {100_000.0})
""")
    assert out.split() == ["not", "started", "True", "True"]


def test_set_num_threads():
    fastbn.set_num_threads(np.int64(5))
    assert fastbn.get_num_threads() == 5
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)):
        with pytest.raises(error, match="whole number"):
            fastbn.set_num_threads(bad)
    assert fastbn.get_num_threads() == 5


def test_the_number_set_is_the_number_used(monkeypatch):
    used = []
    monkeypatch.setattr(crew.Crew, "gather", lambda self, others: used.append(others + 1))
    large, middle = inputs.normal((48, 16, 32, 32)), inputs.normal((20, 16, 8, 8))
    for n in (1, 2, 3):
        fastbn.set_num_threads(n)
        for x, most in ((large, 3), (middle, middle.size // dispatch.LEAST_SHARE)):
            used.clear()
            fastbn.batch_norm_inference(x, *inputs.parameters(16))
            assert set(used) == ({min(n, most)} if n > 1 else set())


@pytest.mark.parametrize("text", ["-1", "two", "1001", "nan"])
def test_a_wait_that_is_no_number_of_milliseconds(text, monkeypatch):
    """Said by the first call that threads may share, and nothing is written."""
    monkeypatch.setenv("FASTBN_WAIT_MS", text)
    monkeypatch.setattr(crew, "crew", crew.Crew())
    x, out = inputs.normal((48, 16, 32, 32)), np.zeros((48, 16, 32, 32), np.float32)
    with pytest.raises(ValueError, match=r"FASTBN_WAIT_MS is .*milliseconds from 0 to 1000"):
        fastbn.batch_norm_inference(x, *inputs.parameters(16), out=out)
    assert not out.any()


@pytest.mark.parametrize(("text", "number", "turns"), [("", 2, 500), ("0", 2, 0), ("2.5", 2, 250), ("2.5", 5, 0)])
def test_wait(text, number, turns, monkeypatch):
    """A setting; and none waits where there are more threads than processors."""
    monkeypatch.setenv("FASTBN_WAIT_MS", text)
    monkeypatch.setattr(processors, "available", lambda: 4)
    made = crew.Crew()
    made.gather(number - 1)
    assert made.desk[rows.PATIENCE] == turns
    made.dismiss()


NUMBER = "import fastbn; print(fastbn.get_num_threads())"


@pytest.mark.parametrize("text", ["1", "2"])
def test_environment(text):
    available = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), processors.quota() or 1024)
    assert int(subprocesses.run(NUMBER, env={"FASTBN_NUM_THREADS": text})) == min(int(text), available)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", " "])
def test_environment_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv("FASTBN_NUM_THREADS", text)
    monkeypatch.setattr(threads, "_threads", None)
    threads._default_threads.cache_clear()
    with pytest.raises(ValueError, match=r"FASTBN_NUM_THREADS is .*whole number"):
        fastbn.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason=f"{sys.platform} has no processor affinity")
def test_affinity():
    assert subprocesses.run("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + NUMBER) == "1\n"


def control_groups(root, own, **files):
    """A /proc and a /sys below `root`: this process's groups, and the files that limit them."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return processors.quota(root)


def test_quota_of_a_container(tmp_path):
    assert control_groups(tmp_path, "0::/\n", **{"sys/fs/cgroup/cpu.max": "150000 100000\n"}) == 2


def test_no_quota(tmp_path):
    assert processors.quota(tmp_path) is None
    assert control_groups(tmp_path, "0::/\n", **{"sys/fs/cgroup/cpu.max": "max 100000\n"}) is None


def test_quota_of_a_group_above(tmp_path):
    files = {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}
    assert control_groups(tmp_path, "0::/a/b\n", **files) == 3


def test_quota_version_1(tmp_path):
    folder = "sys/fs/cgroup/cpu/a/"
    files = {folder + "cpu.cfs_quota_us": "50000\n", folder + "cpu.cfs_period_us": "100000\n"}
    own = "5:memory:/elsewhere\n3:cpuset:/x\n2:cpu,cpuacct:/a\n0::/\n"
    assert control_groups(tmp_path, own, **files) == 1


def test_version_1_without_a_limit(tmp_path):
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    assert control_groups(tmp_path, "1:cpu:/\n0::/\n", **files) is None


def test_the_quota_is_obeyed(monkeypatch):
    monkeypatch.delenv("FASTBN_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_threads", None)
    monkeypatch.setattr(processors, "quota", lambda: 1)
    threads._default_threads.cache_clear()
    assert fastbn.get_num_threads() == 1
    threads._default_threads.cache_clear()
