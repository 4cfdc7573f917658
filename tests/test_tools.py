"""explain, show_config and warmup: what they say is what happens."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc

import inputs
import numpy as np
import pytest

import fastbn
from fastbn import config
from fastbn.arguments import plans
from fastbn.cpu import dispatch

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
AXES = pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])


# ------------------------------------------------------------------------------------------------------------ explain
def beyond_the_output(x, axis, **options):
    """Bytes that a forward holds at its peak beyond y, as NumPy reports them to tracemalloc."""
    fastbn.batch_norm_forward(x, axis=axis, **options)  # compiles, and allocates what later calls reuse
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y, ctx = fastbn.batch_norm_forward(x, axis=axis, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del ctx
    return peak - before - y.nbytes


@DTYPES
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 48, 7, 7), (12, 6, 40, 41), (6000, 25), (70, 3, 5, 5, 20)], ids=str)
def test_an_array_is_copied_if_and_only_if_explain_says_so(shape, layout, dtype):
    x, axis = inputs.arrange(layout, inputs.normal(shape, dtype))
    extra = beyond_the_output(x, axis)
    # Workspace is far below half of x (100 KB and more here), a copy is all of it.
    assert fastbn.explain(x, axis).copied == (extra > x.nbytes / 2), f"{extra} bytes beyond y, x has {x.nbytes}"


@pytest.mark.parametrize(
    ("layout", "word"),
    [
        ("big-endian", "big-endian"),
        ("unaligned", "unaligned"),
        ("zero strides", "zero"),
        ("negative strides", "negative"),
        ("negative channel stride", "negative"),
        ("spatial slice", "gaps"),
        ("contiguous", "where it is"),
    ],
)
def test_reason_of_a_copy(layout, word):
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7)))
    explanation = fastbn.explain(x, axis)
    assert explanation.copied == (layout != "contiguous")
    assert word in explanation.reason
    assert explanation.reason in str(explanation)


def test_the_advice_helps():
    for layout in inputs.LAYOUTS:
        x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7)))
        if fastbn.explain(x, axis).copied:
            advice = fastbn.explain(x, axis).reason.partition("store it as ")[2]
            assert not fastbn.explain(eval(advice, {"x": x, "numpy": np}), axis).copied, layout


def spied(monkeypatch):
    """The kernels of the operations that run from now on, in order."""
    ran = []
    program = dispatch.program

    def spy(run, family, traversal, *arguments):
        # Without running statistics update_running does nothing.
        ran.extend(name for name in dispatch.TABLE[run, family, traversal] if name != "update_running")
        return program(run, family, traversal, *arguments)

    plans._plans.clear()  # a plan asks for its program once
    monkeypatch.setattr(dispatch, "program", spy)
    return ran


@AXES
@pytest.mark.parametrize("shape", inputs.SHAPES.values(), ids=inputs.SHAPES)
def test_the_kernels_that_explain_names_are_those_that_run(shape, channels_last, monkeypatch):
    x = inputs.normal(shape)
    axis = -1 if channels_last else 1
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    expected = fastbn.explain(x, axis).kernels
    ran = spied(monkeypatch)
    _, ctx = fastbn.batch_norm_forward(x, axis=axis)
    assert tuple(ran) == expected["training forward"]
    ran.clear()
    fastbn.batch_norm_backward(x, ctx)
    assert tuple(ran) == expected["backward"]
    ran.clear()
    fastbn.batch_norm_inference(x, None, None, ctx.mean, ctx.var, axis=axis)
    assert tuple(ran) == expected["inference"]


def test_all_roads_are_reached_by_some_shape():
    """Else the test above would say nothing about the rest of the table."""
    found = set()
    for shape in (*inputs.SHAPES.values(), (40, 8, 81, 83)):  # the last one is larger than STREAM_FROM
        e = fastbn.explain(inputs.normal(shape))
        found |= {("forward", e.family, e.road), ("backward", e.family, e.backward_road)}
    assert found == {key for key in dispatch.TABLE if key[0] in ("forward", "backward")}


def test_weights_are_considered():
    x = inputs.normal((90, 3, 5, 5))  # narrow rows are folded, unless weights go with them
    assert fastbn.explain(x).fold > 1
    assert fastbn.explain(x, sample_weight=True).fold == 1

    for given, fold in ((np.ones(90), 1), (np.ones((90, 5, 5), bool), 1), (np.True_, 1), (False, 3), (None, 3)):
        assert (fastbn.explain(x, sample_weight=given).fold > 1) == (fold > 1)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(5,\)"):
        fastbn.explain(x, sample_weight=np.ones(5))
    with pytest.raises(TypeError, match="sample_weight is a list"):
        fastbn.explain(x, sample_weight=[1.0] * 90)


def test_threads_and_streaming():
    small, large = np.zeros((64, 128), np.float32), np.zeros((64, 64, 56, 56), np.float32)
    before = fastbn.get_num_threads()
    try:
        fastbn.set_num_threads(3)
        assert (fastbn.explain(small).threads, fastbn.explain(large).threads) == (1, 3)
    finally:
        fastbn.set_num_threads(before)
    assert (fastbn.explain(small).streamed, fastbn.explain(large).streamed) == (False, True)


def test_explanation_reads_well():
    text = str(fastbn.explain(np.zeros((32, 64, 56, 56), np.float32)))
    for part in ("float32 (32, 64, 56, 56)", "planes, N=32 C=64 S=3136", "forward_planes", "copied", "no: "):
        assert part in text
    with pytest.raises(AttributeError):
        fastbn.explain(np.zeros((2, 2))).copied = True


def test_empty_array():
    explanation = fastbn.explain(np.zeros((0, 3, 4), np.float32))
    assert explanation.kernels == {"training forward": (), "inference": (), "backward": ()}
    assert not explanation.copied
    assert "no kernel runs" in str(explanation)


@pytest.mark.parametrize("x", [[[1.0]], np.zeros(3), np.zeros((2, 2), int), np.ma.zeros((2, 2))], ids=["list", "1-D", "int", "masked"])
def test_explain_refuses_what_the_functions_refuse(x):
    with pytest.raises((TypeError, ValueError)) as by_explain:
        fastbn.explain(x)
    with pytest.raises(by_explain.type) as by_forward:
        fastbn.batch_norm_forward(x)
    assert str(by_explain.value) == str(by_forward.value)


def test_axis_out_of_range():
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        fastbn.explain(np.zeros((2, 2)), axis=2)


# -------------------------------------------------------------------------------------------------------- show_config
def in_a_process(code, **environment):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_show_config(capsys):
    fastbn.show_config()
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastbn"] == fastbn.__version__
    assert lines["numpy"] == np.__version__
    assert lines["threads"].startswith(f"{fastbn.get_num_threads()} ")
    assert "bits" in lines["simd"] or "unknown" in lines["simd"]
    assert set(lines) >= {"python", "numba", "llvmlite", "cupy", "numba-cuda", "cache", "gpus"}


def test_show_config_tells_the_cache(tmp_path):
    show = "import fastbn; fastbn.show_config()"
    assert f"{tmp_path}, 0 kernels" in in_a_process(show, FASTBN_CACHE_DIR=str(tmp_path))
    assert "off: FASTBN_CACHE=0" in in_a_process(show, FASTBN_CACHE="0")
    assert "threads     1 (" in in_a_process(show, FASTBN_NUM_THREADS="1")


def test_show_config_tells_what_is_wrong_with_the_threads():
    printed = in_a_process("import fastbn; fastbn.show_config()", FASTBN_NUM_THREADS="many")
    assert "threads     none: FASTBN_NUM_THREADS is 'many'; set it to a whole number" in printed
    assert "gpus" in printed


def test_a_broken_gpu_library_is_told_not_raised(monkeypatch):
    monkeypatch.setattr(config, "_version", lambda *names: "13.0")
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    assert config._gpus().startswith("none: ")
    assert "Error" in config._gpus()


# ------------------------------------------------------------------------------------------------------------- warmup
# A warm-up, then calls on every road with every combination of features; prints what had to be compiled after it.
CALLS = """
import json
import numpy as np
import fastbn
from fastbn.kernels.cpu import variants

settings = {settings}
made = fastbn.warmup(**settings)
warm = set(variants._compiled)
assert made == len(warm), (made, len(warm))
assert fastbn.warmup(**settings) == 0
axes, ndims = settings.get("axis", [1]), settings.get("ndim", [4])
shapes = {{2: [(64, 24), (300, 3)], 4: [(2, 9, 20, 20), (2, 3, 20, 20), (9, 128, 11, 11), (70, 3, 5, 5), (2, 5, 300, 300)]}}
for dtype in settings.get("dtypes", ["float32"]):
    parameters = np.float64 if dtype == "float64" else np.float32
    for ndim in ndims:
        for axis in axes:
            for shape in shapes[ndim]:
                x = np.moveaxis(np.random.default_rng(0).normal(size=shape), 1, axis)
                x = np.ascontiguousarray(x).astype(dtype if dtype != "bfloat16" else __import__("ml_dtypes").bfloat16)
                C = shape[1]
                ones = [np.ones(C, parameters) for _ in range(4)]
                names = settings.get("features", [])
                for chosen in range(2 ** len(names)):
                    on = {{name for k, name in enumerate(names) if chosen >> k & 1}}
                    options = {{"axis": axis}}
                    if "relu" in on:
                        options["activation"] = "relu"
                    if "residual" in on:
                        options["residual"] = x
                    weight = {{"sample_weight": np.ones(shape[0])}} if "weights" in on else {{}}
                    y, ctx = fastbn.batch_norm_forward(x, *ones, **options, **weight)
                    fastbn.batch_norm_backward(y, ctx)
                    fastbn.batch_norm_inference(x, *ones, **options)
                    y, ctx = fastbn.batch_norm_forward(x, *ones, training=False, **options, **weight)
                    fastbn.batch_norm_backward(y, ctx)
                    m = fastbn.moments(x, axis=axis, **weight)
                    y, ctx = fastbn.batch_norm_forward_apply(x, m, *ones, **options, **weight)
                    sums = fastbn.batch_norm_backward_reduce(y, ctx)
                    fastbn.batch_norm_backward_apply(y, ctx, *sums)
late = [(n, d, p) for n, f, d, p in variants._compiled if (n, f, d, p) not in warm]
print(json.dumps({{"made": made, "late": late}}))
"""


@pytest.mark.slow  # each needs dozens of kernels; what other tests compiled comes from the cache
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ndim": [2, 4], "axis": [-1], "dtypes": ["float64"]},
        {"ndim": [2], "dtypes": ["bfloat16"]},
        {"ndim": [2], "features": ["relu", "weights"]},
    ],
    ids=str,
)
def test_nothing_is_compiled_after_a_warmup(settings):
    if "bfloat16" in settings.get("dtypes", ()):
        pytest.importorskip("ml_dtypes")
    result = json.loads(in_a_process(CALLS.format(settings=settings)))
    assert result["late"] == []
    assert result["made"] > 0


def test_a_later_process_loads_from_the_cache(tmp_path):
    environment = {"FASTBN_CACHE_DIR": str(tmp_path), "FASTBN_CACHE": "1"}
    in_a_process("import fastbn; fastbn.warmup(ndim=[2])", **environment)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    assert len(files) > 0  # each kernel has its file
    # A compilation would write its file anew.
    assert in_a_process("import fastbn; print(fastbn.warmup(ndim=[2]))", **environment) == f"{len(files)}\n"
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtypes": ["int32"]}, ValueError, "unknown dtype 'int32'; known are 'float32'"),
        ({"dtypes": np.int32}, ValueError, "unknown dtype <class 'numpy.int32'>; known are 'float32'"),
        ({"dtypes": None}, ValueError, "unknown dtype None; known are 'float32'"),
        ({"dtypes": 3}, ValueError, "unknown dtype 3; known are 'float32'"),
        ({"features": ["gelu"]}, ValueError, "unknown feature 'gelu'; known are 'relu'"),
        ({"features": "gelu"}, ValueError, "unknown feature 'gelu'"),
        ({"ndim": [1]}, ValueError, "ndim is 1"),
        ({"ndim": 1}, ValueError, "ndim is 1"),
        ({"ndim": 2.0}, TypeError, "ndim is 2.0 of type float; pass a whole number"),
        ({"axis": [4]}, ValueError, "axis 4 is out of range for 4 dimensions"),
        ({"axis": 4}, ValueError, "axis 4 is out of range for 4 dimensions"),
        ({"axis": [True]}, TypeError, "axis is True of type bool"),
    ],
)
def test_warmup_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbn.warmup(**arguments)


@pytest.mark.parametrize("dtypes", ["float32", np.float32, np.dtype("f4"), "f4", ["float32"], [np.float32], (np.dtype(">f4"),)])
def test_one_of_each_is_taken_for_a_list_of_one(dtypes, monkeypatch):
    wanted = set()
    monkeypatch.setattr(dispatch, "program", lambda *call: wanted.add(call))
    fastbn.warmup(["float32"], [2], [1], features=["relu"])
    expected = set(wanted)
    wanted.clear()
    fastbn.warmup(dtypes, 2, 1, features="relu")
    assert wanted == expected


def test_numbers_that_stand_twice():
    """fastbn sizes workspace and vectors without importing the kernels, which import Numba: the kernels' own must agree."""
    from fastbn.cpu import layout
    from fastbn.kernels.cpu import columns, columns_backward, simd

    schedule = dispatch.schedule(layout.layout_of((8, 4, 4, 32), (2048, 512, 128, 4), 3, 4, False), 4, 1)
    assert schedule.shape.scratch_rows == max(columns.TEMPORARY_ROW, columns_backward.TEMPORARY_ROW) + 1
    assert layout.LANES == simd.LANES


@pytest.mark.parametrize(("shape", "streamed"), [((8, 2048, 14, 14), False), ((8, 2048, 16, 16), True), ((8, 1400, 17, 17), True)], ids=str)
def test_short_planes_off_a_line_of_memory_are_not_streamed(shape, streamed):
    """Of all short planes, those that end off a line: it would be written in two parts."""
    assert fastbn.explain(np.empty(shape, np.float32)).streamed == streamed
