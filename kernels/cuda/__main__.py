"""python -m fastbn.kernels.cuda --ptx DIR --cc 9.0: the PTX of every GPU kernel variant, on a machine without a GPU, and a table.

Columns: PTX instructions; 16-byte loads and stores in the code; float64 instructions, and how many of those stand before the last
16-byte load (0 for float32, but for a residual read after the statistics: float64 is for the epilogue of a channel); calls; and
from ptxas registers, bytes of stack, of spills, of shared memory. With --check the exit status is 1 where a variant breaks a rule of
`ptx.problems`: float64 on elements, narrow accesses, calls, spills, registers over the launch bound.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

from fastbn.kernels.cuda.target import SIMULATED, require_target


def capability(text):
    """(9, 0) of "9.0"."""
    try:
        major, minor = (int(part) for part in text.split("."))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as 9.0") from None
    return major, minor


def arguments_of(given):
    """The parser, and its result for the command line `given`."""
    parser = argparse.ArgumentParser(prog="python -m fastbn.kernels.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--ptx", metavar="DIR", type=Path, required=True, help="folder for the .ptx files, made if missing")
    parser.add_argument("--cc", action="append", type=capability, help="compute capability, such as 8.0 or 9.0 (default); repeatable")
    only = "labels to compile, such as '*_planes-float32-*'; repeatable"
    parser.add_argument("--only", action="append", metavar="PATTERN", help=only)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--check", action="store_true", help="exit 1 where a variant breaks a rule")
    parser.add_argument("--json", action="store_true", help="print JSON, a line a kernel, instead of the table")
    return parser, parser.parse_args(given)


def main(arguments=None):
    """Compile the variants whose label matches --only; the exit status is 1 where one did not compile."""
    parser, chosen = arguments_of(arguments)
    try:
        require_target()
    except ImportError as error:
        parser.error(str(error))
    if SIMULATED:
        parser.error("NUMBA_ENABLE_CUDASIM is set; the simulator compiles nothing. Unset it")

    from fastbn.kernels.cuda import ptx
    from fastbn.kernels.cuda.variants import all_variants

    patterns, capabilities = chosen.only or ["*"], chosen.cc or [(9, 0)]
    variants = [v for v in all_variants() if any(fnmatch.fnmatch(v.label, p) for p in patterns)]
    if not variants:
        parser.error(f"--only {' '.join(patterns)} matches none of the labels, such as {next(all_variants()).label}")
    chosen.ptx.mkdir(parents=True, exist_ok=True)
    ptxas = ptx.find_ptxas()
    if ptxas is None:
        print("no ptxas found: registers, stack, spills and shared memory are left out", file=sys.stderr)
    if not chosen.json:
        print(ptx.HEADINGS)
    reports, errors, broken = [], [], []
    one = partial(ptx.compile_one, chosen.ptx, ptxas, capabilities)
    # Processes of their own: compiling is Python that holds the GIL.
    with concurrent.futures.ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) if chosen.jobs > 1 else Serial() as pool:
        for found, failures, wrong in pool.map(one, variants, chunksize=4):
            for report in found:
                print(json.dumps(report.__dict__) if chosen.json else ptx.row(report), flush=True)
            reports += found
            errors += failures
            broken += wrong
    for line in errors + (broken if chosen.check else []):
        print(line, file=sys.stderr)
    if not chosen.json:
        print(ptx.summary(reports))
    if chosen.check:
        print(f"checked: {len(broken)} broken rules, {len(errors)} of {len(variants)} kernels failed to compile", file=sys.stderr)
    return int(bool(errors or (chosen.check and (broken or ptxas is None))))


class Serial:
    """As much of an executor as `main` uses, in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, work, chunksize):
        """Results as they come."""
        return map(function, work)


if __name__ == "__main__":
    sys.exit(main())
