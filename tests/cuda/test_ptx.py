"""Every kernel variant compiled for compute capability 8.0 and 9.0 without a GPU: float64, 16-byte accesses, calls, registers, spills.

`make ptx` runs all of it, in an environment of its own with numba-cuda and the CUDA compiler; elsewhere only the rules themselves are
tested. A table of all kernels: python -m fastbn.kernels.cuda --ptx DIR --cc 8.0 --cc 9.0 --jobs 2 --check
"""

import itertools
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from numba import float32, int64

from fastbn.kernels.cuda import ptx
from fastbn.kernels.cuda.target import cuda
from fastbn.kernels.cuda.variants import Variant, all_variants
from fastbn.kernels.cuda.vectors import KINDS, access

CAPABILITIES = (8, 0), (9, 0)
# With the variable these tests run or fail: a compiler that cannot be found is no reason to pass.
compiling = pytest.mark.skipif(os.environ.get("FASTBN_PTX") != "1", reason="compiling for GPUs has an environment of its own: make ptx")
GROUPS = [(key, list(group)) for key, group in itertools.groupby(all_variants(), key=lambda v: (v.name, v.dtype, v.options[:1]))]


@pytest.fixture(scope="session")
def ptxas():
    """The path of ptxas, without which registers and spills are unknown."""
    found = ptx.find_ptxas()
    assert found, "no ptxas; install fastbn[ptx]"
    return found


@compiling
@pytest.mark.parametrize("variants", [g for _, g in GROUPS], ids=["-".join([*k[:2], *(f"{o}{n}" for o, n in k[2])]) for k, _ in GROUPS])
def test_machine_code_of_every_variant(variants, ptxas):
    broken = []
    for variant in variants:
        found = ptx.reports(variant, CAPABILITIES, ptxas=ptxas)
        assert [r.cc for r in found] == ["8.0", "9.0"]
        broken += [sentence for report in found for sentence in ptx.problems(variant, report)]
        if variant.dtype == "float64" and variant.name != "finish_given":
            assert all(r.doubles > 0 for r in found)  # the count does count
    assert broken == []


# The rules, on reports made by hand. GOOD is what a kernel of float32 vectors looks like.
VARIANT = Variant("stats_planes", "float32", (("lanes", 4), ("weighted", False)), threads=512)
ELEMENTWISE = replace(VARIANT, name="normalise_planes", options=(("lanes", 4), ("relu", False), ("residual", False), ("given", False)))
GOOD = ptx.Report(
    "label", "9.0", instructions=900, loads=16, stores=8, small=0, doubles=0, doubles_before_data=0, calls=0, registers=128, stack=0,
    spills=0, shared=300,
)  # fmt: skip


@pytest.mark.parametrize("variant", [VARIANT, ELEMENTWISE], ids=lambda v: v.name)
def test_a_good_kernel_breaks_no_rule(variant):
    assert ptx.problems(variant, GOOD) == []
    assert ptx.problems(variant, replace(GOOD, registers=None, stack=None, spills=None, shared=None)) == []  # no ptxas


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        (VARIANT, {"doubles": 132}, "132 float64 instructions"),  # the epilogue's 100 and one for each of 32 elements
        (ELEMENTWISE, {"doubles": 1}, "1 float64 instructions, at most 0"),
        (VARIANT, {"doubles": 40, "doubles_before_data": 1}, "1 float64 instructions before"),
        (VARIANT, {"loads": 7}, "7 16-byte loads, at least 8"),
        (ELEMENTWISE, {"stores": 3}, "3 16-byte stores, at least 4"),
        (VARIANT, {"small": 2}, "2 vector accesses"),
        (VARIANT, {"calls": 1}, "1 calls"),
        (VARIANT, {"spills": 8}, "8 bytes spilled"),
        (VARIANT, {"stack": 8}, "a stack frame of 8 bytes"),
        (VARIANT, {"registers": 129}, "129 registers; 1 blocks of 512 leave 128"),
        (replace(ELEMENTWISE, threads=256), {"registers": 129}, "129 registers; 2 blocks of 256 leave 128"),
        (VARIANT, {"shared": 48 * 1024 + 1}, "49153 bytes of shared memory"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_each_rule_is_broken_alone(variant, change, words):
    (sentence,) = ptx.problems(variant, replace(GOOD, **change))
    assert words in sentence
    assert sentence.startswith("label for 9.0: ")


def test_the_summary_counts_by_compute_capability():
    lines = ptx.summary([GOOD, replace(GOOD, registers=40, spills=24), replace(GOOD, cc="8.0", loads=0, stores=0)]).splitlines()
    assert lines[0].startswith("8.0: 1 kernels, 0 with calls; 0 with 16-byte accesses; registers 128 to 128, 0 with spills")
    assert lines[1].startswith("9.0: 2 kernels, 0 with calls; 2 with 16-byte accesses; registers 40 to 128, 1 with spills (up to 24 bytes)")


# Kernels that are wrong on purpose, compiled: the figures are seen in real machine code, and not only judged.


def float64_literal(load, store):
    def kernel(x, y, n):
        tile = cuda.local.array(32, float32)
        for u in range(8):
            load(x, n + u * 4, tile, u * 4)
        for k in range(32):
            tile[k] = tile[k] * 0.1
        for u in range(8):
            store(y, n + u * 4, tile, u * 4)

    return kernel


def element_by_element(load, store):
    def kernel(x, y, n):
        for k in range(32):
            y[n + k] = x[n + k]

    return kernel


def long_division(load, store):
    def kernel(x, y, n):
        at = n // int64(cuda.blockIdx.x + 3)
        tile = cuda.local.array(32, float32)
        for u in range(8):
            load(x, (at + u) * 4, tile, u * 4)
        for u in range(8):
            store(y, (at + u) * 4, tile, u * 4)

    return kernel


def too_many_held(load, store):
    def kernel(x, y, n):
        tile = cuda.local.array(160, float32)
        for u in range(40):
            load(x, (n + u * 512) * 4, tile, u * 4)
        cuda.syncthreads()
        for u in range(40):
            store(y, (n + u * 512) * 4, tile, u * 4)

    return kernel


def index_of_the_data(load, store):
    def kernel(x, y, n):
        tile = cuda.local.array(32, float32)
        for u in range(8):
            load(x, n + u * 4, tile, u * 4)
        for k in range(n):
            tile[(k * 7) & 31] += tile[(k >> 3) & 31]
        for u in range(8):
            store(y, n + u * 4, tile, u * 4)

    return kernel


@compiling
@pytest.mark.parametrize(
    ("body", "words", "told"),
    [
        (float64_literal, "[0-9]+ float64 instructions, at most 0", (512, 1)),
        (element_by_element, "0 16-byte loads.*0 16-byte stores", (512, 1)),
        (long_division, "[1-9][0-9]* calls", (512, 1)),
        (too_many_held, "[1-9][0-9]* bytes spilled", (512, 1)),
        (too_many_held, "[0-9]+ registers; 1 blocks of 512 leave 128", (256, 1)),  # told of smaller blocks than it is launched with
        (index_of_the_data, "a stack frame of [1-9][0-9]* bytes", (512, 1)),
    ],
)
@pytest.mark.parametrize("cc", CAPABILITIES, ids=["sm_80", "sm_90"])
def test_a_wrong_kernel_is_found_out(body, words, told, cc, ptxas):
    kernel = body(*access(KINDS["float32"], 4))
    broken = SimpleNamespace(
        name="normalise_planes", dtype="float32", options=ELEMENTWISE.options, threads=512, resident=1, bounds=told, label=body.__name__,
        function=lambda: kernel, signature=lambda: (*ELEMENTWISE.signature()[:2], int64),
    )  # fmt: skip
    (found,) = ptx.reports(broken, [cc], ptxas=ptxas)
    assert re.search(words, "; ".join(ptx.problems(broken, found))), found
