"""The benchmarks' own parts: the limit moves the right bytes, the peers compute the right numbers, the report writes what
was recorded. No time is asserted anywhere.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

import fastbn

BENCH = Path(__file__).resolve().parents[1] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import contenders  # noqa: E402  (found through the path above)
import limit  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import paired  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import startup  # noqa: E402
import timing  # noqa: E402
import training  # noqa: E402
from shapes import BARS, LARGE_BYTES, LAYOUTS, OPS, Case, cases  # noqa: E402

# --- the limit ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 3])
def test_limit_copies_and_adds_at_any_size_and_alignment(dtype, threads, monkeypatch):
    monkeypatch.setattr(limit, "SERIAL_BYTES", 0)  # small arrays go through the threads as well
    yardstick = limit.Limit(threads)
    rng = np.random.default_rng(0)
    for n, start in itertools.product((0, 1, 7, 15, 16, 17, 33, 64, 257, 1023), (0, 1, 5, 15)):
        x, dy = rng.standard_normal((2, n + 1)).astype(dtype)
        whole = np.full(n + 40, -1.0, dtype)
        skip = -whole.ctypes.data % 64 // whole.itemsize + start
        out = whole[skip : skip + n]
        yardstick.copy(x[1:], out)
        np.testing.assert_array_equal(out, x[1:])
        yardstick.add(x[1:], dy[1:], out)
        np.testing.assert_array_equal(out, x[1:] + dy[1:])
        np.testing.assert_array_equal(np.r_[whole[:skip], whole[skip + n :]], -1.0)  # nothing beside it is touched
    yardstick.close()


def test_limit_refuses_arrays_that_differ():
    yardstick = limit.Limit(1)
    x = np.zeros(8, np.float32)
    for other in (np.zeros(9, np.float32), np.zeros(8), np.zeros((2, 4), np.float32), np.zeros(16, np.float32)[::2]):
        with pytest.raises(ValueError, match="flat contiguous arrays alike"):
            yardstick.copy(x, other)
    with pytest.raises(ValueError, match="threads is 0"):
        limit.Limit(0)


# --- the peers ---

SHAPES = {"channels-first": (5, 6, 3, 4), "channels-last": (5, 6, 3, 4), "nc": (9, 6)}

# The peers work in the dtype of x: a few float32 roundings of values below 10, and sums of 60 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def problem(op, layout):
    return contenders.Problem(Case(op, SHAPES[layout], layout), threads=2)


def oracle(p):
    """y and batch statistics, or gradients, from the test-suite's own reference."""
    if p.case.op == "inference":
        return reference.forward(p.x, p.gamma, p.beta, eps=contenders.EPS, axis=p.axis, mean=p.mean, var=p.var)
    if p.case.op == "forward":
        return reference.forward(p.x, p.gamma, p.beta, eps=contenders.EPS, axis=p.axis)
    return reference.backward(p.dy, p.x, p.gamma, eps=contenders.EPS, axis=p.axis)


def running(p, exact):
    n = p.case.size // p.case.shape[1]
    m = contenders.MOMENTUM
    return reference.running_update(p.mean, exact.mean, m), reference.running_update(p.var, exact.var * n / (n - 1), m)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_naive_forwards_match_the_reference(layout):
    p = problem("forward", layout)
    exact = oracle(p)
    statistics = running(p, exact)
    for name in ("numpy", "numba"):
        mean, var, x = p.mean.copy(), p.var.copy(), p.plan(p.x)
        if name == "numpy":
            y = peers.numpy_forward(x, p.gamma, p.beta, mean, var, contenders.MOMENTUM, contenders.EPS)
        else:  # the loops as plain Python: compiled, they are checked whenever they are timed
            y = p.plan(p.out)
            kernel, more = (peers.numba_forward_planes, ()) if x.ndim == 3 else (peers.numba_forward_rows, (2,))
            kernel.py_func(x, p.gamma, p.beta, mean, var, contenders.MOMENTUM, contenders.EPS, y, *more)
        np.testing.assert_allclose(y.reshape(p.storage), exact.y.astype(float), **CLOSE, err_msg=name)
        np.testing.assert_allclose((mean, var), statistics, **CLOSE, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_naive_inference_matches_the_reference(layout):
    p = problem("inference", layout)
    exact, x, y = oracle(p).y.astype(float), p.plan(p.x), p.plan(p.out)
    kernel = peers.numba_inference_planes if x.ndim == 3 else peers.numba_inference_rows
    kernel.py_func(x, p.gamma, p.beta, p.mean, p.var, contenders.EPS, y)
    np.testing.assert_allclose(p.out, exact, **CLOSE)
    y = peers.numpy_normalise(x, p.gamma, p.beta, p.mean, p.var, contenders.EPS)
    np.testing.assert_allclose(y.reshape(p.storage), exact, **CLOSE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_naive_backwards_match_the_reference(layout):
    p = problem("backward", layout)
    exact, x, dy, dx = oracle(p), p.plan(p.x), p.plan(p.dy), p.plan(p.out)
    mean, var = p.batch_statistics
    found = {"numpy": peers.numpy_backward(dy, x, p.gamma, mean, var, contenders.EPS)}
    dgamma, dbeta = np.empty_like(p.gamma), np.empty_like(p.gamma)
    kernel, more = (peers.numba_backward_planes, ()) if x.ndim == 3 else (peers.numba_backward_rows, (2,))
    kernel.py_func(dy, x, p.gamma, mean, var, contenders.EPS, dx, dgamma, dbeta, *more)
    found["numba"] = dx, dgamma, dbeta
    for name, gradients in found.items():
        for got, want in zip(gradients, (exact.dx, exact.dgamma, exact.dbeta), strict=True):
            np.testing.assert_allclose(got.reshape(want.shape), want.astype(float), **CLOSE, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_the_benchmarks_reference_is_the_test_suites(op, layout):
    p = problem(op, layout)
    exact = oracle(p)
    for name, value in p.reference().items():
        want = dict(zip(("running_mean", "running_var"), running(p, exact), strict=True)).get(name) if op == "forward" else None
        want = getattr(exact, name) if want is None else want
        np.testing.assert_allclose(value, want.astype(float), rtol=1e-11, atol=1e-11)  # both at least float64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_pytorch_is_called_rightly(op, layout):
    pytest.importorskip("torch", reason="PyTorch is an optional peer")
    p = problem(op, layout)
    contender = contenders.BUILDERS["torch"](p, None)
    assert contenders.check(contender, p, p.reference()) < 1e-5  # a float32 rounding or some; 0 would be suspicious
    assert contender.results()["dx" if op == "backward" else "y"].shape == p.storage


def test_a_missing_pytorch_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "torch", None)
    assert contenders.BUILDERS["torch"](problem("forward", "nc"), None) is None


# --- checks before timing ---


def test_wrong_results_are_not_timed():
    p = problem("inference", "nc")
    exact = p.reference()

    def contender(run):
        return contenders.Contender("numba", run, lambda: {"y": p.out})

    def right():
        p.out[...] = exact["y"]

    def one_off():
        right()
        p.out[2, 3] += 0.01

    assert contenders.check(contender(right), p, exact) < 1e-6  # rounded to float32 once
    with pytest.raises(contenders.WrongResult, match=r"numba, inference 9x6 nc: y is off by"):
        contenders.check(contender(one_off), p, exact)
    with pytest.raises(contenders.WrongResult, match="inf"):
        contenders.check(contender(lambda: None), p, exact)  # writes nothing


@pytest.mark.parametrize("start", [0, 1, 7])
def test_problems_start_where_asked(start):
    p = contenders.Problem(Case("forward", (2, 3, 5)), threads=1, start=start)
    assert {a.ctypes.data % 64 for a in (p.x, p.dy, p.out)} == {4 * start}


def test_every_contender_agrees_and_is_recorded(tmp_path):
    """The whole road in a process of its own: Numba's parallel kernels compile there, and its threads stay there."""
    command = [sys.executable, "-W", "error", str(BENCH / "paired.py"), "--op", "forward", "--layout", "nc"]
    command += ["--shapes", "40x6", "--rounds", "2", "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "forward.json").read_text())
    names = set(contenders.NAMES) - (set() if peers.torch else {"torch"})
    (record,) = saved["records"]
    assert set(record["times"]) == names
    assert all(0 < t["min"] <= t["median"] for t in record["times"].values())
    assert record["times"]["fastbn"]["ratio"] == 1
    assert saved["machine"]["versions"]["numpy"] == np.__version__
    assert "| 40x6 | nc |" in done.stdout


# --- shapes and bars ---


def test_cases_reject_what_is_not_measured():
    for fields, match in [
        (("sideways", (2, 3)), "op 'sideways'"),
        (("forward", (2, 3), "diagonal"), "layout 'diagonal'"),
        (("forward", (2, 3), "channels-first"), "does not fit"),
        (("forward", (2, 3, 4), "nc"), "does not fit"),
        (("forward", (2, 3), "nc", "int8"), "dtype 'int8'"),
    ]:
        with pytest.raises(ValueError, match=match):
            Case(*fields)


@pytest.mark.parametrize("quick", [False, True])
def test_every_bar_has_cases(quick):
    if quick:  # the subset has to show each bar too
        assert all(any(bar.selects(c) for c in cases(bar.op, quick=True)) for bar in BARS)
    selected = [[c for c in cases(bar.op) if bar.selects(c)] for bar in BARS]
    assert all(len(found) >= 2 for found in selected)
    assert all(c.nbytes >= LARGE_BYTES for found in selected for c in found)


def test_bars_take_the_geometric_mean_and_know_which_way_is_good():
    def made(shape, ours, limit_time, torch_time):
        times = timing.summarise({"fastbn": [ours], "limit": [limit_time], "torch": [torch_time]})
        return paired.record(Case("forward", shape), times)

    records = [made((32, 64, 112, 112), 4.0, 2.0, 8.0), made((32, 64, 56, 56), 4.0, 8.0, 32.0)]
    records.append(made((2, 3, 4), 100.0, 1.0, 1.0))  # small: in no bar
    long_planes, against_torch = paired.bars(records)
    assert long_planes["value"] == pytest.approx(1.0)  # of 2 and 1/2
    assert long_planes["bar_met"]
    assert long_planes["goal_met"]
    assert against_torch["value"] == pytest.approx(4.0)  # of 2 and 8; the bar is "at least 4", the goal 6
    assert not against_torch["goal_met"]
    text = paired.bars_table([long_planes, {**against_torch, "bar_met": False}])
    assert "goal met" in text
    assert "**missed**" in text


def test_memory_is_judged_by_the_larger_peak_and_its_growth():
    row = {"case": "a", "bytes": 1000, "traced": 4, "traced_quarter": 4, "resident": 8}
    verdicts = [({}, True, True), ({"resident": 11}, False, False), ({"traced_quarter": 1}, True, False)]
    verdicts.append(({"traced": 20, "traced_quarter": 20, "resident": None}, False, False))
    for change, bar_met, goal_met in verdicts:
        (line,) = memory.bars([row, row | change])
        assert (line["bar_met"], line["goal_met"]) == (bar_met, goal_met), change
    assert "| O(C) |" in paired.bars_table([line])


# --- timing ---


def test_interleave_runs_everybody_every_round(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "TURN", 0)
    calls = {"a": 0, "b": 0}

    def contender(name):
        def run():
            calls[name] += 1

        return run

    times = timing.interleave({n: contender(n) for n in calls}, rounds=5)
    assert {n: len(t) for n, t in times.items()} == {"a": 5, "b": 5}
    assert calls["a"] == calls["b"] >= 10  # one untimed and one timed call a round at least
    with pytest.raises(ValueError, match="rounds is 0"):
        timing.interleave({}, 0)


def test_slow_contenders_sit_rounds_out(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "SLOW", -1.0)
    (row,) = timing.interleave({"a": lambda: None}, rounds=5).values()
    assert [t is None for t in row] == [False, True, True, False, True]


def test_summary_pairs_within_rounds():
    summary = timing.summarise({"fastbn": [1.0, 4.0, 2.0], "torch": [2.0, None, 8.0]})
    assert summary["torch"] == {"min": 2.0, "median": 5.0, "ratio": 0.5, "paired": 0.375}  # 1/2 and 2/8
    assert summary["fastbn"]["ratio"] == summary["fastbn"]["paired"] == 1.0


def test_geometric_mean():
    assert timing.geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="no values"):
        timing.geometric_mean([])


def test_readable_times():
    shown = {0.9996: "1.00 s", 0.00123: "1.23 ms", 0.0262: "26.2 ms", 0.25: "250 ms", 7.1e-6: "7.10 us", 4e-8: "0.04 us"}
    assert {t: timing.readable_time(t) for t in shown} == shown


def test_odd_sizes_are_held_against_the_line_through_their_neighbours():
    fields = {"op": "forward", "axis": "N"}
    points = [fields | {"size": s, "fastbn": t, "odd": o} for s, t, o in [(1, 1.0, 0), (10, 30.0, 1), (100, 100.0, 0)]]
    (found,) = scaling.off_the_line(points)
    assert found["ratio"] == pytest.approx(3.0)  # the line passes 10 at N = 10


# --- the report ---


def recorded():
    """A tiny result of every script, as the files hold it. Invented numbers: they test the writing alone."""

    def record(op, shape, layout, **times):
        return paired.record(Case(op, shape, layout), timing.summarise({n: [t] for n, t in times.items()}))

    here = machine.describe() | {"busy_elsewhere": 0.5}
    large = record("forward", (32, 64, 112, 112), "channels-first", limit=4e-3, fastbn=5e-3, numba=2e-2, numpy=0.2)
    small = record("forward", (64, 128), "nc", limit=3e-6, fastbn=3e-5, numba=1e-5, numpy=2e-5)
    unseen = record("backward", (32, 64, 56, 56), "channels-last", limit=1e-3, fastbn=2e-3, numpy=0.1)
    results = {op: {"machine": here, "threads": 2, "records": [], "bars": []} for op in OPS}
    results["forward"] |= {"records": [large, small], "bars": paired.bars([large, small])}
    results["backward"]["records"] = [unseen]
    first = {"layout": "NCHW float32", "cold": 2.5, "cached": 0.3, "numba_import": 0.2, "afterwards": 1e-4}
    started = {"import": 0.004, "first": [first]}
    rows = [{"case": "NCHW", "bytes": 10**8, "traced": 5000, "traced_quarter": 5000, "resident": None}]
    point = {"op": "forward", "axis": "N", "limit": 1e-3, "fastbn": 1e-3, "shape": [9, 8, 14, 14], "size": 9}
    points = [point | {"odd": False}, point | {"odd": True, "unaligned": 2e-3, "size": 10}]
    gains = [{"op": "forward", "shape": [1, 2, 3], "fastbn_1": 2.0, "fastbn_2": 1.0, "limit_1": 3.0, "limit_2": 2.0}]
    return results | {
        "startup": started | {"machine": here, "bars": startup.bars(started)},
        "memory": {"machine": here, "rows": rows, "bars": memory.bars(rows)},
        "overhead": {"machine": here, "rows": [{"op": "forward", "fastbn": 1e-5}]},
        "scaling": {"machine": here, "threads": 2, "points": points, "gains": gains},
    }


def test_report_writes_readme_summary_and_plots(tmp_path, capsys):
    for name, body in recorded().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(body))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold table\n{report.END}\nafter\n")
    report.write(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| float32 |")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old table" not in text
    assert "**5.00 ms (41 GB/s)**" in text  # 2 * 103 MB in 5 ms; the fastest of its row
    assert "**10.0 us (6.6 GB/s)**" in text  # the row where naive Numba wins is shown
    assert "not installed" in text
    assert "2.50 s with nothing compiled" in text
    assert "other processes took up to 50% of the cores" in text
    summary = (tmp_path / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "| forward 1x2x3 | 2.00 s | 1.00 s | 2.00 | 1.50 |" in summary
    assert "Unaligned over aligned start: worst 2.00" in summary
    for picture in ("bandwidth.png", "scaling.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_report_says_which_results_are_missing(tmp_path):
    (tmp_path / "forward.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"has no backward.json.*without --collect"):
        report.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["no markers", f"{report.BEGIN} alone", f"{report.END} {report.BEGIN}", f"{report.BEGIN} {report.BEGIN} {report.END}"]
)
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="write each once, in this order"):
        report.replace_between(text, "table")


def test_replacing_twice_changes_nothing():
    once = report.replace_between(f"a {report.BEGIN}{report.END} b", "| table |")
    assert once == f"a {report.BEGIN}\n| table |\n{report.END} b"
    assert report.replace_between(once, "| table |") == once


def test_measured_processes_report_their_failure():
    with pytest.raises(RuntimeError, match=r"ended with 3(.|\n)*told"):
        startup.child("import sys; print('told', file=sys.stderr); sys.exit(3)")
    assert startup.child("import os; print('{\"c\": %s}' % ('FASTBN_CACHE_DIR' in os.environ and 1 or 0))", cache="x") == {"c": 1}


# --- a whole step of training ---


def test_naive_normalisation_trains_as_fastbn_does():
    """Layer by layer: the output, the gradients and the running statistics, which they keep by the same rule but for n / (n - 1)."""
    nets = training.nets()
    rng = np.random.default_rng(0)
    images, labels = rng.random((16, 1, 28, 28), np.float32), rng.integers(0, 10, 16)
    losses = {name: training.step(net, images, labels) for name, net in nets.items()}
    assert losses["fastbn"] == pytest.approx(losses["naive NumPy"], rel=1e-5)
    pairs = [(a, b) for a, b in zip(nets["naive NumPy"].layers, nets["fastbn"].layers, strict=True) if type(a) is not type(b)]
    assert len(pairs) == 4
    for naive, ours in pairs:
        np.testing.assert_allclose(naive.running_mean.ravel(), ours.running_mean, rtol=1e-4, atol=1e-6)
        for name, gradient in ours.gradients().items():
            np.testing.assert_allclose(naive.gradients()[name].ravel(), gradient, rtol=1e-3, atol=1e-5)


def test_a_step_of_training(capsys):
    before = fastbn.get_num_threads()
    try:
        training.main(["--batch-size", "8", "--steps", "4", "--threads", "1"])
    finally:
        fastbn.set_num_threads(before)
    assert [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["none", "naive NumPy", "fastbn"]
