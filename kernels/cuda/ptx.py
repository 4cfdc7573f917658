"""Compile kernel variants without a GPU and look at the result: `python -m fastbn.kernels.cuda --ptx DIR --cc 9.0`.

PTX comes from NVVM; registers, spills and shared memory from ptxas, where one is installed:
`pip install "numba-cuda[cu13]" "cuda-toolkit[nvvm,nvrtc,cudart,nvcc]==13.0.*"` (a newer NVVM writes PTX that an older ptxas
rejects).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

from numba import cuda

from fastbn.kernels.cuda.target import SIMULATED, require_target

_LOAD = re.compile(r"\bld\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)\b")
_STORE = re.compile(r"\bst\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)\b")
_DATA = re.compile(r"\bld\.global\.(?:v4|v2)\b")
# Arithmetic and conversions; loads, stores, parameters and declarations of registers do not compute.
_DOUBLE = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:add|sub|mul|div|fma|mad|sqrt|rsqrt|rcp|neg|abs|min|max|setp\.\w+|cvt[\w.]*?)\.[\w.]*f64\b", re.M
)


@dataclass(frozen=True)
class Report:
    """What was found in one variant; figures of ptxas are None where there is no ptxas."""

    label: str
    instructions: int
    loads: int
    stores: int
    doubles: int
    doubles_before_data: int
    calls: int
    registers: int | None = None
    stack: int | None = None
    spills: int | None = None
    shared: int | None = None


def compile_ptx(variant, cc):
    """The PTX of a variant for compute capability `cc`, a pair such as (9, 0)."""
    require_target()
    if SIMULATED:
        raise RuntimeError("the simulator compiles nothing; unset NUMBA_ENABLE_CUDASIM")
    import numba.cuda.dispatcher as dispatcher

    # Typing a call of a device function asks for the current device; without a driver this answers for the one compiled for.
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=cc)
    try:
        ptx, _ = cuda.compile(
            variant.function(), variant.signature(), device=False, abi="numba", cc=cc, output="ptx", launch_bounds=variant.threads
        )  # fmt: skip
    finally:
        dispatcher.get_current_device = asked
    return ptx


def find_ptxas():
    """The path of ptxas: on PATH, or from the package nvidia-cuda-nvcc; None if there is none."""
    found = shutil.which("ptxas")
    if found:
        return found
    for folder in sys.path:
        for candidate in sorted(Path(folder or ".").glob("nvidia/*/bin/ptxas")):
            if os.access(candidate, os.X_OK):
                return str(candidate)
    return None


def assemble(ptx, cc, ptxas):
    """(registers, stack, spilled bytes, shared memory) that ptxas reports for the kernel.

    Raises
    ------
    RuntimeError
        With ptxas' message, where it rejects the PTX.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas failed: {result.stderr.strip()}")

    def number(pattern):
        return sum(int(n) for n in re.findall(pattern, result.stderr))

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), spills, number(r"(\d+) bytes smem")


def inspect_ptx(label, ptx):
    """Counts from the text of a kernel's PTX."""
    body = ptx[ptx.index(".visible .entry") :]
    doubles = [match.start() for match in _DOUBLE.finditer(body)]
    data = [match.start() for match in _DATA.finditer(body)]
    return Report(
        label=label,
        instructions=sum(line.rstrip().endswith(";") and not line.lstrip().startswith(".") for line in body.splitlines()),
        loads=len(_LOAD.findall(body)),
        stores=len(_STORE.findall(body)),
        doubles=len(doubles),
        doubles_before_data=sum(at < data[-1] for at in doubles) if data else 0,
        calls=len(re.findall(r"^\s*call", body, re.M)),
    )


def report(variant, cc, folder=None, ptxas=None):
    """Compile a variant, write folder/label.ptx, and return its Report."""
    ptx = compile_ptx(variant, cc)
    if folder is not None:
        (Path(folder) / f"{variant.label}.ptx").write_text(ptx)
    found = inspect_ptx(variant.label, ptx)
    if ptxas is None:
        return found
    registers, stack, spills, shared = assemble(ptx, cc, ptxas)
    return Report(**{**found.__dict__, "registers": registers, "stack": stack, "spills": spills, "shared": shared})


HEADINGS = f"{'kernel':64} {'instr':>6} {'ld16':>5} {'st16':>5} {'f64':>4} {'early':>5} " + (
    f"{'calls':>5} {'regs':>5} {'stack':>5} {'spill':>5} {'smem':>6}"
)


def row(found):
    """A line of the table under HEADINGS; - where ptxas did not run."""
    figures = (found.registers, found.stack, found.spills, found.shared)
    registers, stack, spills, shared = ("-" if n is None else n for n in figures)
    return (
        f"{found.label:64} {found.instructions:6} {found.loads:5} {found.stores:5} {found.doubles:4} {found.doubles_before_data:5} "
        f"{found.calls:5} {registers:>5} {stack:>5} {spills:>5} {shared:>6}"
    )
