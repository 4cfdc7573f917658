"""Interleaved comparison: python paired.py --op forward --layout channels-first --rounds 11 --threads 2

For every case, rounds of (limit, fastbn, PyTorch, naive Numba, naive NumPy) in turn; then a table of minima, the ratio of
fastbn to each, and the performance contract's bars with what was reached. Every contender is checked against a float64
reference before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import contenders
import machine
from limit import Limit
from shapes import BARS, LAYOUTS, OPS, Bar, Case, cases
from timing import geometric_mean, interleave, readable_time, summarise


def measure(todo: list[Case], threads: int, rounds: int, names: tuple[str, ...] = contenders.NAMES) -> list[dict]:
    """One record a case: what it is, and `times` as `timing.summarise` gives them."""
    limit = Limit(threads)
    machine.keep_freed_memory()
    records = []
    for case in todo:
        _, field = contenders.build(case, threads, limit, names)
        times = summarise(interleave({c.name: c.run for c in field}, rounds))
        records.append(record(case, times))
        print(f"  {case.group}: " + ", ".join(f"{n} {readable_time(t['min'])}" for n, t in times.items()), file=sys.stderr)
    limit.close()
    return records


def record(case: Case, times: dict[str, dict[str, float]]) -> dict:
    fields = {"op": case.op, "shape": list(case.shape), "layout": case.layout, "dtype": case.dtype}
    return {**fields, "bytes": case.floor_bytes, "times": times}


def case_of(record: dict) -> Case:
    return Case(record["op"], tuple(record["shape"]), record["layout"], record["dtype"])


def table(records: list[dict]) -> str:
    """Minimum times and GB/s of the floor's bytes, one line a case, as Markdown."""
    head = ["shape", "layout", *(contenders.TITLES[n] for n in contenders.NAMES), "fastbn / limit", "PyTorch / fastbn"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "--:|" * (len(head) - 2)]
    for r in records:
        times = r["times"]
        cells = [case_of(r).label, r["layout"]]
        for name in contenders.NAMES:
            cells.append(cell(r, name))
        cells.append(f"{times['limit']['ratio']:.2f}" if "limit" in times else "")
        cells.append(f"{1 / times['torch']['ratio']:.2f}" if "torch" in times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: dict, name: str) -> str:
    """`1.23 ms (41 GB/s)`, or `not installed`."""
    if name not in record["times"]:
        return "not installed"
    seconds = record["times"][name]["min"]
    rate = record["bytes"] / seconds / 1e9
    return f"{readable_time(seconds)} ({rate:.{0 if rate >= 9.95 else 1}f} GB/s)"


def reached(bar: Bar, records: list[dict]) -> tuple[float, int] | None:
    """The bar's geometric mean and over how many cases; None where nothing in the records belongs to it."""
    ratios = [r["times"][bar.over]["ratio"] for r in records if bar.selects(case_of(r)) and bar.over in r["times"]]
    if not ratios:
        return None
    mean = geometric_mean(ratios)
    return (mean if bar.over == "limit" else 1 / mean), len(ratios)


def bars(records: list[dict]) -> list[dict]:
    """Every bar that these records speak about: bar, goal, value, and whether each is met."""
    lines = []
    for bar in BARS:
        found = reached(bar, records)
        if found is not None:
            value, count = found
            met = {"bar_met": bar.met(value, bar.bar), "goal_met": bar.met(value, bar.goal)}
            sign = "at most" if bar.over == "limit" else "at least"
            lines.append({"name": bar.name, "sign": sign, "bar": bar.bar, "goal": bar.goal, "value": value, "cases": count, **met})
    return lines


def bars_table(lines: list[dict]) -> str:
    """The bars as Markdown; each line of `lines` as `bars` gives them, with an optional unit. A goal may be a word."""
    out = ["| | measured | bar | goal | |", "|---|--:|--:|--:|---|"]
    for line in lines:
        unit = line.get("unit", "")
        verdict = "goal met" if line["goal_met"] else "bar met" if line["bar_met"] else "**missed**"
        count = f" ({line['cases']} case{'s' * (line['cases'] != 1)})" if "cases" in line else ""
        marks = [m if isinstance(m, str) else f"{line['sign']} {m:.3g}{unit}" for m in (line["bar"], line["goal"])]
        out.append(f"| {line['name']}{count} | {line['value']:.3g}{unit} | {' | '.join(marks)} | {verdict} |")
    return "\n".join(out)


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it like 32x64x56x56") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, default="forward")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="may be repeated; all by default")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", help="such as 32x64x56x56; the table's by default")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=min(2, machine.usable_cores()))
    parser.add_argument("--contenders", nargs="+", choices=contenders.NAMES, default=contenders.NAMES)
    parser.add_argument("--quick", action="store_true", help="the small subset of shapes")
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/OP.json")
    args = parser.parse_args(argv)
    if "fastbn" not in args.contenders:
        parser.error("--contenders has to name fastbn: everything is compared with it")
    todo = cases(args.op, tuple(args.layout or LAYOUTS), args.quick, tuple(args.shapes) if args.shapes else None)
    if not todo:
        parser.error("no case is left: (N, C) shapes go with --layout nc, longer ones with the other two")
    records = measure(todo, args.threads, args.rounds, tuple(args.contenders))
    found = bars(records)
    if args.save:
        body = {"threads": args.threads, "rounds": args.rounds, "records": records, "bars": found}
        machine.save(args.op, body, Path(args.save))
    print(table(records))
    if found:
        print("\n" + bars_table(found))


if __name__ == "__main__":
    main()
