"""The GPU benchmark's parts that need no GPU: cases, bytes, statistics, the table, and what it says without a GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import gpu as program  # noqa: E402  (found through the path above)
from gpu_cases import GpuCase, cases, input_sets, means, statistics_of, table, with_shares  # noqa: E402
from shapes import RESNET  # noqa: E402


def test_every_shape_layout_dtype_and_batch_is_a_case():
    found = cases()
    assert len(found) == len(set(found)) == 3 * 2 * 3 * 2 * len(RESNET)
    assert {case.shape[0] for case in found} == {32, 256}
    assert {case.shape[1:] for case in found} == {shape[1:] for shape in RESNET}
    assert len(cases([(2, 3, 4, 5)], None, ops=("forward",), dtypes=("float16",))) == 2


def test_what_a_case_moves():
    case = GpuCase("backward", (2, 3, 4, 5), "channels-last", "bfloat16")
    assert (case.storage, case.axis, case.nbytes, case.floor_bytes) == ((2, 4, 5, 3), -1, 240, 720)
    assert GpuCase("forward", (2, 3, 4)).floor_bytes == 2 * 24 * 4
    assert GpuCase("forward", (2, 3, 4)).storage == (2, 3, 4)
    for wrong in ({"op": "sideways"}, {"layout": "nc"}, {"dtype": "float64"}, {"shape": (2, 3)}):
        with pytest.raises(ValueError, match=r"unknown|too short"):
            GpuCase(**{"op": "forward", "shape": (2, 3, 4), **wrong})


def test_inputs_rotate_beyond_the_cache_as_far_as_memory_goes():
    case = GpuCase("forward", (32, 64, 56, 56))
    l2 = 60 << 20
    sets = input_sets(case, l2, 1 << 40)
    assert (sets - 1) * case.floor_bytes >= 3 * l2 > (sets - 2) * case.floor_bytes
    assert input_sets(GpuCase("forward", (256, 64, 112, 112)), l2, 1 << 40) == 2
    assert input_sets(case, 100 * l2, 8 * case.floor_bytes) == 4
    with pytest.raises(ValueError, match="GB are free; use --shapes"):
        input_sets(case, l2, 3 * case.floor_bytes)


def test_medians_spread_and_bandwidth():
    found = statistics_of([4.0, 2.0, 3.0, 100.0, 1.0], [9.0, 7.0, 8.0, 6.0, 5.0], 6_000_000)
    assert found == {"ms": 3.0, "spread": 2 / 3, "gb_per_s": 2.0, "host_us": 7.0}
    assert statistics_of([2.0], [1.0], 2_000_000)["spread"] == 0.0


def row(op="forward", **milliseconds):
    found = {name: {**statistics_of([ms], [5.0], 10**7), "launches": 1} for name, ms in milliseconds.items()}
    return with_shares({"label": f"{op} case", "op": op, "contenders": found})


def test_the_table_and_the_means():
    rows = [row(copy=1.0, fastbn=2.0, cupy=8.0, cudnn=3.0), row("backward", copy=1.0, fastbn=1.25, cupy=5.0)]
    assert rows[0]["contenders"]["fastbn"]["share"] == 0.5
    assert rows[0]["contenders"]["cupy"]["over_fastbn"] == 4.0
    lines = table(rows).splitlines()
    assert lines[0].split(" | ")[-2:] == ["CuPy, two passes", "PyTorch, cuDNN |"]
    assert lines[2] == "| forward case | 10 | 5 | 50% | 2.000 | 1 | 5.0 | 4.00 | 1.50 |"
    assert lines[3].endswith("| 80% | 1.250 | 1 | 5.0 | 4.00 | - |")
    assert len({line.count("|") for line in lines}) == 1
    first, second = means([*rows, row(copy=1.0, fastbn=1.0, cudnn=6.0)]).splitlines()
    assert first.startswith("- forward: 71% of the copy's bandwidth, geometric mean of 2 cases")
    assert "PyTorch, cuDNN takes 3.00 times fastbn's time (least 1.50)" in first
    assert "cuDNN" not in second


def test_the_text_stands_between_the_markers():
    assert program.replace_between("a\n<!-- gpu:begin -->x<!-- gpu:end -->\nb", "new") == "a\n<!-- gpu:begin -->\nnew\n<!-- gpu:end -->\nb"
    for text in ("", "<!-- gpu:end --><!-- gpu:begin -->", 2 * "<!-- gpu:begin --><!-- gpu:end -->"):
        with pytest.raises(ValueError, match="once each"):
            program.replace_between(text, "new")
    docs = program.DOCS.read_text()
    assert program.replace_between(docs, "new") != docs


def test_what_the_text_says_of_where_it_was_measured():
    gpu = {"name": "X", "driver": 1, "versions": {"cupy": "14", "cudnn": None}, "simulated": False}
    text = program.written(gpu, [row(copy=1.0, fastbn=2.0)], {"case": "TypeError: no bfloat16"}, 7)
    assert text.startswith("X, driver 1, cupy 14; median of 7 rounds.")
    assert text.endswith("- not measured: case: TypeError: no bfloat16")
    assert program.written({**gpu, "simulated": True}, [row(copy=1.0, fastbn=2.0)], {}, 7).startswith("On a simulator")


def test_without_a_gpu_it_says_what_it_needs_and_fails(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1 not found')")  # so also where there is a GPU
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(BENCH)!r}]; import gpu; sys.exit(gpu.main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "it needs an NVIDIA GPU" in result.stderr
    assert "fastbn[cuda13]" in result.stderr
    assert not result.stdout


def test_a_simulator_or_no_device_is_no_gpu(monkeypatch):
    from types import SimpleNamespace

    from fastbn.cuda import loading

    for arrays, words in (
        (np, "simulator is on"),
        (SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 0))), "CuPy sees no GPU"),
    ):
        monkeypatch.setattr(loading, "kernels", lambda arrays=arrays: SimpleNamespace(arrays=arrays))
        with pytest.raises(program.NoGpu, match=words):
            program.require()
