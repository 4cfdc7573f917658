"""python -m fastbn.kernels.cuda --ptx DIR --cc 9.0: the PTX of every GPU kernel variant, on a machine without a GPU, and a table.

Columns: PTX instructions; 16-byte loads and stores in the code; float64 instructions, and how many of those stand before the last
16-byte load (0 for float32, but for a residual read after the statistics: float64 is for the epilogue of a channel); calls; and
from ptxas registers, bytes of stack, of spills, of shared memory.
"""

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from fastbn.kernels.cuda.target import SIMULATED, require_target


def main(arguments=None):
    """Compile the variants whose label matches --only; the exit status is 1 where one did not compile."""
    parser = argparse.ArgumentParser(prog="python -m fastbn.kernels.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--ptx", metavar="DIR", type=Path, required=True, help="folder for the .ptx files, made if missing")
    parser.add_argument("--cc", default="9.0", help="compute capability, such as 8.0 or 9.0")
    only = "labels to compile, such as '*_planes-float32-*'; repeatable"
    parser.add_argument("--only", action="append", metavar="PATTERN", help=only)
    parser.add_argument("--json", action="store_true", help="print JSON, a line a kernel, instead of the table")
    chosen = parser.parse_args(arguments)
    try:
        major, minor = (int(part) for part in chosen.cc.split("."))
    except ValueError:
        parser.error(f"--cc is {chosen.cc!r}; pass a compute capability such as 9.0")
    try:
        require_target()
    except ImportError as error:
        parser.error(str(error))
    if SIMULATED:
        parser.error("NUMBA_ENABLE_CUDASIM is set; the simulator compiles nothing. Unset it")

    from fastbn.kernels.cuda import ptx
    from fastbn.kernels.cuda.variants import all_variants

    patterns = chosen.only or ["*"]
    variants = [v for v in all_variants() if any(fnmatch.fnmatch(v.label, p) for p in patterns)]
    if not variants:
        parser.error(f"--only {' '.join(patterns)} matches none of the labels, such as {next(all_variants()).label}")
    chosen.ptx.mkdir(parents=True, exist_ok=True)
    ptxas = ptx.find_ptxas()
    if ptxas is None:
        print("no ptxas found: registers, stack, spills and shared memory are left out", file=sys.stderr)
    if not chosen.json:
        print(ptx.HEADINGS)
    failed = 0
    for variant in variants:
        try:
            found = ptx.report(variant, (major, minor), chosen.ptx, ptxas)
        except Exception as error:  # one broken variant should not hide the others
            failed += 1
            print(f"{variant.label}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(json.dumps(found.__dict__) if chosen.json else ptx.row(found), flush=True)
    if failed:
        print(f"{failed} of {len(variants)} variants failed", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
