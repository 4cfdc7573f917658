"""Compile kernel variants without a GPU and look at the result: `python -m fastbn.kernels.cuda --ptx DIR --cc 9.0`.

PTX comes from NVVM; registers, spills and shared memory from ptxas, where one is installed:
`pip install "fastbn[ptx]"` (NVVM and ptxas of one version: a newer NVVM writes PTX that an older ptxas rejects).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass, replace
from pathlib import Path

from numba import cuda

from fastbn.kernels.cuda.target import SIMULATED, require_target
from fastbn.kernels.cuda.tiles import part_size, tile_size
from fastbn.kernels.cuda.vectors import KINDS

_LOAD = re.compile(r"\bld\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)\b")
_STORE = re.compile(r"\bst\.global\.(?:v4\.[a-z]32|v2\.[a-z]64)\b")
_DATA = re.compile(r"\bld\.global\.(?:v4|v2)\b")
# Arithmetic and conversions; loads, stores, parameters and declarations of registers do not compute.
_DOUBLE = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:add|sub|mul|div|fma|mad|sqrt|rsqrt|rcp|neg|abs|min|max|setp\.\w+|cvt[\w.]*?)\.[\w.]*f64\b", re.M
)


# Calls, and the 64-bit integer divisions that ptxas makes calls of.
_CALL = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:call|(?:div|rem)\.[su]64)\b", re.M)
# Vectors of fewer than 16 bytes, which an access of data would fall apart into.
_SMALL = re.compile(r"\b(?:ld|st)\.global\.(?:v2\.[a-z]\d?32|v[24]\.[a-z]16)\b")

REGISTERS = 65536  # of a multiprocessor, compute capability 8.0 and 9.0
SHARED = 48 * 1024  # bytes a block has without asking for more


@dataclass(frozen=True)
class Report:
    """What was found in one variant; figures of ptxas are None where there is no ptxas."""

    label: str
    cc: str
    instructions: int
    loads: int
    stores: int
    small: int
    doubles: int
    doubles_before_data: int
    calls: int
    registers: int | None = None
    stack: int | None = None
    spills: int | None = None
    shared: int | None = None


def compile_ptx(variant, *capabilities):
    """{cc: PTX} of a variant for compute capabilities, pairs such as (9, 0).

    Numba types and lowers the kernel once, for the first of them, which is most of the work; NVVM then compiles that LLVM code for
    each. It is the same code for all: nothing in the kernels asks for the compute capability.
    """
    require_target()
    if SIMULATED:
        raise RuntimeError("the simulator compiles nothing; unset NUMBA_ENABLE_CUDASIM")
    import numba.cuda.codegen as codegen
    import numba.cuda.dispatcher as dispatcher

    first = capabilities[0]
    asked, compile_ir, seen = dispatcher.get_current_device, codegen.nvvm.compile_ir, []

    def remember(ir, **options):
        seen.append((ir, options))
        return compile_ir(ir, **options)

    # Typing a call of a device function asks for the current device; without a driver this answers for the one compiled for.
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=first)
    codegen.nvvm.compile_ir = remember
    try:
        ptx, _ = cuda.compile(
            variant.function(), variant.signature(), device=False, abi="numba", cc=first, output="ptx", launch_bounds=variant.bounds
        )
    finally:
        dispatcher.get_current_device = asked
        codegen.nvvm.compile_ir = compile_ir
    found = {first: ptx}
    for major, minor in capabilities[1:]:
        ((ir, options),) = seen
        text = compile_ir(ir, **{**options, "arch": f"compute_{major}{minor}"})
        found[major, minor] = text.decode().strip("\x00").strip()
    return found


def find_ptxas():
    """The path of ptxas: from the package nvidia-cuda-nvcc, whose version is NVVM's, or on PATH; None if there is none."""
    for folder in sys.path:
        for candidate in sorted(Path(folder or ".").glob("nvidia/*/bin/ptxas")):
            if os.access(candidate, os.X_OK):
                return str(candidate)
    return shutil.which("ptxas")


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


def inspect_ptx(label, ptx, cc):
    """Counts from the text of a kernel's PTX."""
    body = ptx[ptx.index(".visible .entry") :]
    doubles = [match.start() for match in _DOUBLE.finditer(body)]
    data = [match.start() for match in _DATA.finditer(body)]
    return Report(
        label=label,
        cc=f"{cc[0]}.{cc[1]}",
        instructions=sum(line.rstrip().endswith(";") and not line.lstrip().startswith(".") for line in body.splitlines()),
        loads=len(_LOAD.findall(body)),
        stores=len(_STORE.findall(body)),
        small=len(_SMALL.findall(body)),
        doubles=len(doubles),
        doubles_before_data=sum(at < data[-1] for at in doubles) if data else 0,
        calls=len(_CALL.findall(body)),
    )


def reports(variant, capabilities, folder=None, ptxas=None):
    """Compile a variant, write folder/label.sm_90.ptx and the like, and return its Reports, one for each compute capability."""
    found = []
    for cc, ptx in compile_ptx(variant, *capabilities).items():
        if folder is not None:
            (Path(folder) / f"{variant.label}.sm_{cc[0]}{cc[1]}.ptx").write_text(ptx)
        seen = inspect_ptx(variant.label, ptx, cc)
        if ptxas is not None:
            registers, stack, spills, shared = assemble(ptx, cc, ptxas)
            seen = replace(seen, registers=registers, stack=stack, spills=spills, shared=shared)
        found.append(seen)
    return found


def most_doubles(variant):
    """Float64 instructions that a kernel of another dtype may have: none an element, of which a thread has at least 8, unrolled."""
    lanes = dict(variant.options).get("lanes", 1)
    if variant.name.startswith(("normalise", "apply")):
        return 0 if not dict(variant.options).get("given") else 20
    return {"stats_columns": 192 + 8 * lanes}.get(variant.name, 104)


def problems(variant, found):
    """What is wrong with a compiled variant, as sentences; none for a good one. Figures that ptxas did not give are not judged."""
    seen = []

    def unless(holds, sentence):
        if not holds:
            seen.append(f"{found.label} for {found.cc}: {sentence}")

    options, T = dict(variant.options), KINDS[variant.dtype].compute
    lanes, reduces = options.get("lanes", 1), variant.name.startswith(("stats", "reduce"))
    unless(found.calls == 0, f"{found.calls} calls")
    if variant.dtype != "float64":
        most = most_doubles(variant)
        unless(found.doubles <= most, f"{found.doubles} float64 instructions, at most {most} belong there")
        # A residual is loaded after the epilogue, and given statistics become coefficients before data: there the number alone tells.
        if not (options.get("residual") or options.get("given")):
            unless(found.doubles_before_data == 0, f"{found.doubles_before_data} float64 instructions before the last vector is loaded")
    if lanes > 1:
        # All that a thread reads before it uses any of it, unrolled.
        least = options.get("held", tile_size(T) if reduces else part_size(T, lanes)) // lanes
        unless(found.loads >= least, f"{found.loads} 16-byte loads, at least {least} belong there")
        unless(reduces or found.stores >= least, f"{found.stores} 16-byte stores, at least {least} belong there")
        unless(found.small == 0, f"{found.small} vector accesses of fewer than 16 bytes")
    if found.registers is not None:
        bound = REGISTERS // (variant.threads * variant.resident)
        unless(found.spills == 0, f"{found.spills} bytes spilled")
        unless(found.stack == 0, f"a stack frame of {found.stack} bytes")
        unless(found.registers <= bound, f"{found.registers} registers; {variant.resident} blocks of {variant.threads} leave {bound}")
        unless(found.shared <= SHARED, f"{found.shared} bytes of shared memory; a block has {SHARED}")
    return seen


HEADINGS = f"{'kernel':64} {'cc':>3} {'instr':>6} {'ld16':>5} {'st16':>5} {'f64':>4} {'early':>5} " + (
    f"{'calls':>5} {'regs':>5} {'stack':>5} {'spill':>5} {'smem':>6}"
)


def row(found):
    """A line of the table under HEADINGS; - where ptxas did not run."""
    figures = (found.registers, found.stack, found.spills, found.shared)
    registers, stack, spills, shared = ("-" if n is None else n for n in figures)
    return (
        f"{found.label:64} {found.cc:>3} {found.instructions:6} {found.loads:5} {found.stores:5} {found.doubles:4} "
        f"{found.doubles_before_data:5} {found.calls:5} {registers:>5} {stack:>5} {spills:>5} {shared:>6}"
    )


def summary(found):
    """The table in some lines, one for each compute capability."""
    lines = []
    for cc in sorted({r.cc for r in found}):
        here = [r for r in found if r.cc == cc]
        wide = [r for r in here if r.loads or r.stores]
        line = f"{cc}: {len(here)} kernels, {sum(r.calls > 0 for r in here)} with calls; {len(wide)} with 16-byte accesses"
        known = [r for r in here if r.registers is not None]
        if known:
            line += (
                f"; registers {min(r.registers for r in known)} to {max(r.registers for r in known)}, "
                f"{sum(r.spills > 0 for r in known)} with spills (up to {max(r.spills for r in known)} bytes), "
                f"shared memory up to {max(r.shared for r in known)} bytes"
            )
        lines.append(line)
    return "\n".join(lines)


def compile_one(folder, ptxas, capabilities, variant):
    """(reports, errors, what is wrong) of a variant."""
    try:
        found = reports(variant, capabilities, folder, ptxas)
    except Exception as error:  # one broken variant should not hide the others
        return [], [f"{variant.label}: {type(error).__name__}: {error}"], []
    return found, [], [sentence for each in found for sentence in problems(variant, each)]
