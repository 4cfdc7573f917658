"""The GPU benchmark from end to end, on the simulator with a stand-in for CuPy and tiny shapes. What it measures here means nothing."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import gpu as program  # noqa: E402  (found through the path above)
import gpu_cases  # noqa: E402
import gpu_contenders  # noqa: E402
import peers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_the_whole_program(cupy, tmp_path, capsys):
    docs = tmp_path / "gpu.md"
    docs.write_text("before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n")
    arguments = ["--rounds", "1", "--shapes", "2x3x2x2", "--save", str(tmp_path), "--docs", str(docs)]
    assert program.main(arguments) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["gpu"]["name"] == "stand-in"
    assert found["gpu"]["simulated"] is True
    assert found["machine"]["versions"]["fastbn"] != "not installed"
    labels = [row["label"] for row in found["rows"]] + list(found["left_out"])
    assert sorted(labels) == sorted(case.label for case in gpu_cases.cases([(2, 3, 2, 2)], None))
    assert all("bfloat16" in label for label in found["left_out"])  # where ml_dtypes is missing
    for row in found["rows"]:
        assert row["sets"] > 1
        assert {"copy", "fastbn", "cupy"} <= set(row["contenders"])
        assert row["contenders"]["fastbn"]["launches"] == (1 if row["op"] == "inference" or row["layout"] == "channels-first" else 2)
        assert all(value["ms"] > 0 and value["host_us"] > 0 for value in row["contenders"].values())
    text = docs.read_text()
    assert text.startswith("before\n<!-- gpu:begin -->\nOn a simulator: these are no speeds of a GPU.")
    assert "old" not in text
    assert text.endswith("\n<!-- gpu:end -->\nafter\n")
    assert text.count("\n| ") == len(found["rows"]) + 1


def problem(cupy, op, layout="channels-first", dtype="float32"):
    case = gpu_cases.GpuCase(op, (3, 4, 5, 2), layout, dtype)
    return gpu_contenders.Problem(cupy, case, 2, np.dtype(dtype))


@pytest.mark.parametrize("op", ["forward", "inference", "backward"])
def test_nothing_wrong_is_timed(cupy, op):
    made = problem(cupy, op)
    named, left_out = gpu_contenders.contenders(made)
    assert list(named) == ["copy", "fastbn", "cupy"]
    assert left_out == {}
    for name, each in named.items():
        made.check(each)
        wrong = gpu_contenders.Contender(name, lambda i, run=each.run: run(i) * 1.01)
        with pytest.raises(gpu_contenders.WrongResult, match=f"{name} is off by"):
            made.check(wrong)


@pytest.mark.parametrize("op", ["forward", "inference", "backward"])
@pytest.mark.parametrize("layout", gpu_cases.LAYOUTS)
def test_pytorch_computes_the_same(cupy, op, layout):
    if peers.torch is None:
        pytest.skip("PyTorch is not installed")
    made = problem(cupy, op, layout)
    runs = gpu_contenders.torch_runs(peers.torch, made)
    assert list(runs) == ["native"]  # cuDNN needs a GPU
    made.check(gpu_contenders.Contender("native", runs["native"]))


def test_a_wrong_result_is_said_and_ends_in_an_error(cupy, monkeypatch, capsys):
    real = gpu_contenders._fastbn
    monkeypatch.setattr(gpu_contenders, "_fastbn", lambda p: lambda i: real(p)(i) + 1)
    arguments = ["--rounds", "1", "--shapes", "2x3x2x2", "--dtypes", "float32", "--ops", "inference"]
    assert program.main(arguments) == 1
    assert "fastbn is off by" in capsys.readouterr().err
