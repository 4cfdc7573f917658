"""Kernels compiled for compute capability 8.0 and 9.0 without a GPU: where float64 stands, 16-byte accesses, spills, registers.

In a subprocess, since the simulator and the compiler exclude each other in one process. All variants take minutes; these are a
selection with each kernel, each data type and each feature once. All: python -m fastbn.kernels.cuda --ptx DIR --cc 9.0
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


def _has(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not (_has("numba_cuda") and any(_has(f"nvidia.{name}") for name in ("cu13", "cuda_nvcc"))),
    reason="compiling needs numba-cuda and the CUDA compiler: "
    'pip install "numba-cuda[cu13]" "cuda-toolkit[nvvm,nvrtc,cudart,nvcc]==13.0.*"',
)

PATTERNS = [
    "finish_given-float32",
    "stats_planes-float32-lanes4-threads256",
    "stats_planes-float32-lanes4-weighted-threads256",
    "normalise_planes-float32-lanes[14]-threads256",
    "normalise_planes-float32-lanes4-given-threads256",
    "normalise_planes-float16-lanes8-relu-residual-threads512",
    "reduce_planes-float32-lanes4-relu-threads512",
    "apply_planes-float32-lanes4-relu-residual-threads512",
    "apply_planes-bfloat16-lanes8-threads256",
    "apply_planes-float32-lanes4-frozen-threads256",
    "forward_planes-float32-lanes4-held32",
    "forward_planes-float32-lanes4-held64*",
    "backward_planes-float32-lanes4-held32-relu-residual",
    "stats_columns-float32-lanes4-threads256-wide16",
    "normalise_columns-bfloat16-lanes8-*-wide16-relu",
    "normalise_columns-float32-lanes4-*-wide16-given",
    "reduce_columns-float32-lanes4-*-wide16-relu",
    "apply_columns-float16-lanes8-*-wide16",
    "stats_columns-float64-lanes2-*-wide16-float64-float64",
]


@pytest.fixture(scope="module", params=["8.0", "9.0"])
def compiled(request, tmp_path_factory):
    """(folder of PTX, label -> report, whether ptxas ran)."""
    folder = tmp_path_factory.mktemp("ptx")
    command = [sys.executable, "-m", "fastbn.kernels.cuda", "--ptx", str(folder), "--cc", request.param, "--json"]
    for pattern in PATTERNS:
        command += ["--only", pattern]
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    reports = {report["label"]: report for report in map(json.loads, result.stdout.splitlines())}
    assert len(reports) >= len(PATTERNS)
    return folder, reports, "no ptxas" not in result.stderr


def test_every_kernel_has_its_file(compiled):
    folder, reports, _ = compiled
    for label in reports:
        assert ".visible .entry" in (folder / f"{label}.ptx").read_text()


def test_float64_is_for_the_epilogue_of_a_channel(compiled):
    _, reports, _ = compiled
    seen = 0
    for label, report in reports.items():
        if "float64" in label:
            assert report["doubles"] > 0  # the count does count
            continue
        if "given" in label and label.startswith("normalise"):
            assert report["doubles"] < 60, label  # one channel of planes, one of columns: not one an element
        elif label.startswith(("normalise", "apply")):
            assert report["doubles"] == 0, label
        elif not label.startswith("finish_given") and "residual" not in label:
            assert report["doubles_before_data"] == 0, label
            assert report["doubles"] > 0, label
            seen += 1
    assert seen >= 5
    # A residual is read after the epilogue, so position says nothing there; the number does: the same for 32 and 64 elements a
    # thread, with and without features.
    persistent = {r["doubles"] for label, r in reports.items() if label.startswith("forward_planes-float32")}
    assert len(persistent) == 1, persistent


def test_accesses_are_of_16_bytes(compiled):
    folder, reports, _ = compiled
    elements = {"float32": 4, "float16": 8, "bfloat16": 8, "float64": 2}
    for label, report in reports.items():
        dtype = label.split("-")[1]
        if f"lanes{elements[dtype]}" not in label:
            assert report["loads"] == report["stores"] == 0, label
            continue
        assert report["loads"] >= 32 // elements[dtype] // (2 if "float64" in label or "backward" in label else 1), label
        if not label.startswith(("stats", "reduce")):
            assert report["stores"] > 0, label
        # no data moves in smaller pieces: two-byte loads occur in no vector kernel, 4-byte vectors of two neither
        text = (folder / f"{label}.ptx").read_text()
        assert "ld.global.v2.f32" not in text, label
        assert "ld.global.v4.u16" not in text, label
        assert "st.global.v4.u16" not in text, label


def test_no_calls(compiled):
    _, reports, _ = compiled
    assert {label for label, report in reports.items() if report["calls"]} == set()


def test_registers_and_spills(compiled):
    _, reports, has_ptxas = compiled
    if not has_ptxas:
        pytest.skip("no ptxas: pip install nvidia-cuda-nvcc")
    for label, report in reports.items():
        persistent = label.startswith(("forward_planes", "backward_planes"))
        assert report["registers"] <= (128 if persistent else 255), label  # 65536 registers over 512 and 256 threads
        assert report["shared"] <= 48 * 1024, label
        # Two variants are a few registers too large: a word or two a thread go to memory and back.
        tight = "held64-relu-residual" in label or ("apply_planes-float32-lanes4-relu" in label and "threads512" in label)
        assert report["spills"] <= (48 if tight else 0), label
