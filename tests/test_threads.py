"""Many Python threads at once, thread counts, and Numba's threading layers, which must never start."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import checks
import inputs
import numpy as np
import pytest
import subprocesses
import teams

import fastbn
from fastbn.cpu import dispatch, processors, threads


@pytest.fixture(autouse=True)
def three_threads():
    """Three threads, so that the pool is used whatever the machine; afterwards as before."""
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


def test_the_pool_is_used():
    """Or the tests of this module would hold nothing. A worker takes its share unless the caller is done before it wakes."""
    seen = set()

    def kernel(thread, first, last):
        seen.add(threading.get_ident())
        inside.wait(timeout=30)

    inside = threading.Barrier(3)  # passes only with three threads in the kernel at once
    teams.parallel(kernel, 3, 1, 3)
    assert len(seen) == 3


def test_a_second_caller_does_not_wait_for_the_first():
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def slow(thread, first, last):
        inside.set()
        assert go_on.wait(timeout=30)

    first = threading.Thread(target=teams.parallel, args=(slow, 2, 1, 2))
    first.start()
    assert inside.wait(timeout=30)
    teams.parallel(lambda thread, first, last: seen.append((first, threading.get_ident())), 4, 1, 2)
    go_on.set()
    first.join(timeout=30)
    assert sorted(seen) == [(k, threading.get_ident()) for k in range(4)]


def test_a_call_inside_a_kernel_is_served():
    """As from a `__del__` that the garbage collector runs in the middle of a call."""
    seen = []

    def kernel(thread, first, last):
        teams.parallel(lambda t, a, b: seen.append((first, a)), 2, 1, 2)

    teams.parallel(kernel, 2, 1, 2)
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_dead_workers_cost_nothing_but_speed(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "_serve", lambda queue: None)  # a worker that ends at once
    seen = []
    teams.parallel(lambda t, a, b: seen.extend(range(a, b)), 100, 7, 3)
    assert seen == list(range(100))


def test_no_more_threads(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    seen = []
    teams.parallel(lambda t, a, b: seen.extend(range(a, b)), 100, 7, 3)
    assert seen == list(range(100))


def test_an_error_in_a_worker_reaches_the_caller_after_all_have_stopped():
    running = []
    both = threading.Barrier(2)

    def kernel(thread, first, last):
        if first < 2:
            both.wait(timeout=30)
        running.append(first)
        if thread == 1:
            raise MemoryError("in a worker")

    with pytest.raises(MemoryError, match="in a worker"):
        teams.parallel(kernel, 100, 1, 2)
    count = len(running)
    threading.Event().wait(0.02)
    assert len(running) == count, "a kernel ran after the call had raised"
    test_the_pool_is_used()


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
    original = threads._Call.__init__

    def spy(self, work, board, pieces, number):
        used.append(number)
        original(self, work, board, pieces, number)

    monkeypatch.setattr(threads._Call, "__init__", spy)
    x = inputs.normal((48, 16, 32, 32))
    assert x.size >= dispatch.PARALLEL_FROM
    for n in (1, 2, 3):
        fastbn.set_num_threads(n)
        used.clear()
        fastbn.batch_norm_inference(x, *inputs.parameters(16))
        assert set(used) == ({n} if n > 1 else set())


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
