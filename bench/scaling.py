"""How the time grows: python scaling.py [--quick] [--save FOLDER]

* Against N, C and H*W over four decades, two others held: on log-log axes a straight line beyond the first few
  microseconds of overhead. Between the even sizes stand odd ones, and each is held against the line through its
  neighbours: a cliff shows as a ratio far from 1.
* Unaligned starts: the same sizes with every array one element past a 64-byte boundary.
* Threads: fastbn and the limit on one thread and on two.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import contenders
import machine
from limit import Limit
from shapes import RESNET, Case
from timing import interleave, readable_time, summarise

OPS = ("forward", "backward")

# Four decades each; the odd sizes lie beside powers of two, at primes, and at 27*33 = 891.
EVEN = (1, 4, 10, 32, 100, 320, 1000, 3200, 10000)
SWEEPS = {
    "N": (EVEN, (3, 7, 17, 33, 129, 257, 1025, 4099), lambda n: (n, 8, 14, 14)),
    "C": (EVEN, (3, 7, 17, 33, 129, 257, 1025, 4099), lambda c: (8, c, 14, 14)),
    "HW": (
        (16, 64, 196, 784, 3136, 12544, 50176, 160000),
        (25, 49, 121, 257, 891, 4097, 16385, 65537),
        lambda s: (8, 8, s),
    ),
}
QUICK_SWEEPS = {
    "N": ((1, 10, 100, 1000), (33, 257), SWEEPS["N"][2]),
    "C": ((1, 10, 100, 1000), (33, 257), SWEEPS["C"][2]),
    "HW": ((16, 196, 3136, 50176), (891, 4097), SWEEPS["HW"][2]),
}


def sweep(axis: str, sweeps: dict, threads: int, rounds: int, limit: Limit) -> list[dict]:
    """Times of fastbn and the limit at every size of one axis, aligned and (at the odd sizes) unaligned."""
    even, odd, shape_of = sweeps[axis]
    points = []
    for op in OPS:
        for size in sorted({*even, *odd}):
            case = Case(op, shape_of(size))
            starts = (0, 1) if size in odd else (0,)
            runs, problems = {}, []
            for start in starts:
                problem, field = contenders.build(case, threads, limit, ("limit", "fastbn"), start)
                problems.append(problem)
                runs |= {f"{c.name}+{start}": c.run for c in field if start == 0 or c.name == "fastbn"}
            times = summarise(interleave(runs, rounds), ours="fastbn+0")
            point = {"op": op, "axis": axis, "size": size, "shape": list(case.shape), "odd": size in odd}
            point |= {name.removesuffix("+0"): t["min"] for name, t in times.items() if name != "fastbn+1"}
            if "fastbn+1" in times:
                point["unaligned"] = times["fastbn+1"]["min"]
            points.append(point)
        print(f"  {op} against {axis}: {len(points)} sizes so far", file=sys.stderr)
    return points


def off_the_line(points: list[dict]) -> list[dict]:
    """For every odd size: its time over the log-log line through its even neighbours. 1.0 is on the line."""
    found = []
    for op in OPS:
        for axis in SWEEPS:
            row = sorted((p for p in points if (p["op"], p["axis"]) == (op, axis)), key=lambda p: p["size"])
            even = [p for p in row if not p["odd"]]
            for p in (p for p in row if p["odd"]):
                below = max((e for e in even if e["size"] < p["size"]), key=lambda e: e["size"], default=None)
                above = min((e for e in even if e["size"] > p["size"]), key=lambda e: e["size"], default=None)
                if below is None or above is None:
                    continue
                share = math.log(p["size"] / below["size"]) / math.log(above["size"] / below["size"])
                line = below["fastbn"] ** (1 - share) * above["fastbn"] ** share
                found.append({"op": op, "axis": axis, "size": p["size"], "ratio": p["fastbn"] / line})
    return found


def threads_gain(shapes: tuple[tuple[int, ...], ...], most: int, rounds: int) -> list[dict]:
    """Times of fastbn and the limit on one thread and on `most`."""
    rows = []
    for op in OPS:
        for shape in shapes:
            row = {"op": op, "shape": list(shape)}
            for threads in (1, most):
                limit = Limit(threads)
                _, field = contenders.build(Case(op, shape), threads, limit, ("limit", "fastbn"))
                times = summarise(interleave({c.name: c.run for c in field}, rounds))
                row |= {f"{name}_{threads}": t["min"] for name, t in times.items()}
                limit.close()
            rows.append(row)
    return rows


def report(points: list[dict], gains: list[dict], most: int) -> str:
    lines = []
    off = off_the_line(points)
    if off:
        worst = max(off, key=lambda p: p["ratio"])
        size = f"{worst['op']}, {worst['axis']}={worst['size']}"
        lines.append(f"Odd sizes against the line through their neighbours: worst {worst['ratio']:.2f} ({size}).")
    pairs = [p for p in points if "unaligned" in p]
    if pairs:
        worst = max(pairs, key=lambda p: p["unaligned"] / p["fastbn"])
        size = f"{worst['op']}, {worst['axis']}={worst['size']}"
        lines.append(f"Unaligned over aligned start: worst {worst['unaligned'] / worst['fastbn']:.2f} ({size}).")
    if gains:
        lines += ["", f"| NCHW | fastbn, 1 thread | {most} threads | gain | the limit's gain |", "|---|--:|--:|--:|--:|"]
    for g in gains:
        one, more = g["fastbn_1"], g[f"fastbn_{most}"]
        label = f"{g['op']} {'x'.join(map(str, g['shape']))}"
        gain = g["limit_1"] / g[f"limit_{most}"]
        lines.append(f"| {label} | {readable_time(one)} | {readable_time(more)} | {one / more:.2f} | {gain:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, machine.usable_cores()))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and shapes")
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/scaling.json")
    args = parser.parse_args(argv)
    machine.keep_freed_memory()
    limit = Limit(args.threads)
    sweeps = QUICK_SWEEPS if args.quick else SWEEPS
    points = [p for axis in sweeps for p in sweep(axis, sweeps, args.threads, args.rounds, limit)]
    shapes = ((32, 64, 56, 56),) if args.quick else tuple(s for s in RESNET if s != (32, 64, 112, 112))
    gains = threads_gain(shapes, args.threads, args.rounds) if args.threads > 1 else []
    if args.save:
        body = {"threads": args.threads, "rounds": args.rounds, "points": points, "off_the_line": off_the_line(points)}
        machine.save("scaling", body | {"gains": gains}, Path(args.save))
    print(report(points, gains, args.threads))


if __name__ == "__main__":
    main()
