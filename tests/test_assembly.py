"""What is left of a kernel's flags in machine code."""

import json
import platform

import pytest
import subprocesses

ASSEMBLY = """
import json, re
from fastbn import dispatch
from fastbn.kernels import variants

PATTERNS = {
    "relu": "vcmpnle[ps]",
    "mask": "movw",
    "float32 lanes": "v(?:fmadd[0-9]*|mul)ps",
    "float64 lanes": "v(?:fmadd[0-9]*|mul)pd",
    "widened": "vcvtps2pd",
}

def counts(*present):
    kernel, _ = dispatch._kernel("normalise_planes", "float32", present)
    (dispatcher,) = (d for d, compiled in variants._compiled.values() if compiled is kernel)
    text = "".join(dispatcher.inspect_asm().values())
    return {name: len(re.findall(r"\\b" + pattern, text)) for name, pattern in PATTERNS.items()}

print(json.dumps([counts(), counts("relu"), counts("mask", "relu"), counts("wide"), counts("residual", "wide")]))
"""


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
