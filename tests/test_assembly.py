"""What is left of a kernel's flags in machine code."""

import json
import platform

import pytest
import subprocesses

ASSEMBLY = """
import json, re
from fastbn.kernels.cpu import planes, variants

PATTERNS = {
    "relu": "vcmpnle[ps]",
    "mask": "movw",
    "float32 lanes": "v(?:fmadd[0-9]*|mul)ps",
    "float64 lanes": "v(?:fmadd[0-9]*|mul)pd",
    "widened": "vcvtps2pd",
}

def counts(*present):
    code = variants.compiled("normalise", (planes.normalise_planes,), "float32", present)
    (dispatcher,) = (d for d, compiled in variants._compiled.values() if compiled is code)
    text = "".join(dispatcher.inspect_asm().values())
    return {name: len(re.findall(r"\\b" + pattern, text)) for name, pattern in PATTERNS.items()}

print(json.dumps([counts(), counts("relu"), counts("mask", "relu"), counts("lanes64"), counts("residual", "lanes64")]))
"""


TARGETS = {
    "here": {},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c"},
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}
STREAMS = """
import json
import numpy as np
from numba import njit, types
from fastbn.kernels.cpu import columns_backward, planes, simd, variants
from fastbn.kernels.cpu.simd import LANES, Pointer

def copy(x, y, streamed):
    for j in range(0, 4096, LANES):
        if streamed:
            simd.stream(y, j, simd.load(x, j))
        else:
            simd.store(y, j, simd.load(x, j))
    simd.fence()

def streams(kernel, dtype, *present):
    code = variants.compiled(kernel.__name__, (kernel,), dtype, present)
    (dispatcher,) = (d for d, compiled in variants._compiled.values() if compiled is code)
    return "movnt" in "".join(dispatcher.inspect_asm().values())

rng = np.random.default_rng(0)
x = rng.standard_normal(4096) * 10.0 ** rng.integers(-9, 6, 4096)
x[:6] = 0.0, -0.0, np.inf, -np.inf, np.nan, 65520.0
found = {}
elements = {"float32": types.float32, "float64": types.float64, "float16": types.float16, "bfloat16": simd.bfloat16}
for name, element in elements.items():
    run = njit(nogil=True, error_model="numpy")(copy).compile((Pointer(types.float64), Pointer(element), types.boolean))
    outputs = []
    for streamed in (False, True):
        y = np.zeros(8192, np.uint16 if name == "bfloat16" else f"u{np.dtype(name).itemsize}")
        y = y[-y.ctypes.data % 64 // y.itemsize :][:4096]
        run(x, y, streamed)
        outputs.append(y)
    same = bool((outputs[0] == outputs[1]).all() and outputs[0].any())
    wide = ("lanes64",) if name == "float64" else ()
    found[name] = [same, streams(planes.normalise_planes, name, *wide), streams(columns_backward.apply_columns, name)]
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_streaming_stores_go_around_the_cache(target):
    """LLVM may forget what a store was asked for, as it does for vectors of halves: float16 took 1.2 times as long."""
    found = json.loads(subprocesses.run(STREAMS, env={"FASTBN_CACHE": "0", **target}))
    assert found == {name: [True, True, True] for name in ("float32", "float64", "float16", "bfloat16")}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
def test_the_compiler_removes_what_is_absent():
    """Features compose in one kernel and leave nothing where they are not asked for; it has a head, a body and a tail of a plane."""
    # No cache: Numba shows the assembly only of what it has compiled itself.
    plain, relu, masked, wide, residual = json.loads(subprocesses.run(ASSEMBLY, env={"FASTBN_CACHE": "0"}))
    if not plain["float32 lanes"]:
        pytest.skip("this processor has no AVX")
    body = plain["float32 lanes"]
    assert plain["relu"] == 0 < relu["relu"] == masked["relu"]
    assert plain["mask"] == relu["mask"] == 0 < masked["mask"]
    assert wide["float32 lanes"] == residual["float32 lanes"] == 0
    assert wide["float64 lanes"] == residual["float64 lanes"] == 2 * body
    assert plain["float64 lanes"] < body  # the bias, once a plane
    assert plain["widened"] < wide["widened"] < residual["widened"]
