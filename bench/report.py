"""Measure everything and write it down: python report.py [--quick | --collect]

Runs paired.py (forward, backward, inference), overhead.py, memory.py, startup.py and scaling.py, each in its own process,
one after another. From their result files in bench/results it writes summary.md, bandwidth.png, scaling.png and the
table between the two markers of README.md. `--collect` does only the writing; `--quick` measures a small subset into
bench/results/quick, prints it, and leaves README.md as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import contenders
import machine
import paired
import plots
import scaling
from timing import readable_time

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BUSY = 0.15  # of all cores: above this the results say so
STEPS = (
    ("paired.py", "--op", "forward"),
    ("paired.py", "--op", "backward"),
    ("paired.py", "--op", "inference"),
    ("overhead.py",),
    ("memory.py",),
    ("startup.py",),
    ("scaling.py",),
)

# The README's rows: (operation, shape, layout).
ROWS = (
    ("forward", (256, 512), "nc"),
    ("backward", (256, 512), "nc"),
    ("forward", (32, 64, 28, 28), "channels-last"),
    ("backward", (32, 64, 14, 14), "channels-first"),
    ("inference", (32, 64, 28, 28), "channels-first"),
    ("forward", (4096, 1024), "nc"),
    ("forward", (32, 256, 56, 56), "channels-last"),
    ("backward", (32, 256, 56, 56), "channels-last"),
    ("forward", (32, 64, 112, 112), "channels-first"),
    ("forward", (32, 512, 28, 28), "channels-first"),
    ("backward", (32, 64, 112, 112), "channels-first"),
    ("inference", (32, 256, 56, 56), "channels-first"),
)


def measure(folder: Path, quick: bool) -> None:
    """Run every step; one that fails ends the report, after its own message."""
    for step in STEPS:
        begin = time.perf_counter()
        print(f"== {' '.join(step)}", file=sys.stderr, flush=True)
        script = Path(__file__).parent / step[0]
        quick_flags = ["--quick", *(["--rounds", "5"] if step[0] in ("paired.py", "scaling.py") else [])] if quick else []
        command = [sys.executable, str(script), *step[1:], *quick_flags, "--save", os.path.relpath(folder)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{' '.join(step)} failed; nothing was written to README.md")
        print(f"   {time.perf_counter() - begin:.0f} s\n", file=sys.stderr, flush=True)


def busiest(results: dict[str, dict]) -> float:
    """The largest share of the cores that other processes took at the end of a step; 0 where it is not known."""
    return max((body["machine"].get("busy_elsewhere") or 0 for body in results.values()), default=0)


def load(folder: Path) -> dict[str, dict]:
    """All result files by name."""
    names = ("forward", "backward", "inference", "overhead", "memory", "startup", "scaling")
    missing = [n for n in names if not (folder / f"{n}.json").exists()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(m + '.json' for m in missing)}; run report.py without --collect first")
    return {n: json.loads((folder / f"{n}.json").read_text()) for n in names}


def all_records(results: dict[str, dict]) -> list[dict]:
    return [r for op in ("forward", "backward", "inference") for r in results[op]["records"]]


def rival(record: dict) -> float:
    """fastbn's time over that of its fastest peer, the limit being none: above 1 another wins."""
    return max((t["ratio"] for n, t in record["times"].items() if n not in ("fastbn", "limit")), default=0.0)


def chosen(records: list[dict]) -> list[dict]:
    """The README's rows, in order, and the case where fastbn does worst against its best peer: losses are shown too."""
    rows = [r for op, shape, layout in ROWS for r in records if (r["op"], tuple(r["shape"]), r["layout"]) == (op, shape, layout)]
    worst = max(records, key=rival)
    return rows if worst in rows else [*rows, worst]


def readme_table(results: dict[str, dict]) -> str:
    """What stands between README.md's markers."""
    rows = chosen(all_records(results))
    order = ("numpy", "numba", "torch", "fastbn", "limit")
    here = results["forward"]["machine"]
    titles = {n: contenders.TITLES[n] for n in order} | {"fastbn": "**fastbn**", "limit": "limit (streaming copy)"}
    version = here["versions"]["torch"]
    if version != "not installed":
        titles["torch"] += f" {version.partition('+')[0]}"
    lines = ["| float32 | " + " | ".join(titles[n] for n in order) + " |", "|---|" + "--:|" * len(order)]
    for r in rows:
        fastest = min((n for n in r["times"] if n != "limit"), key=lambda n: r["times"][n]["min"])
        cells = [f"**{c}**" if n == fastest else c for n in order for c in [paired.cell(r, n)]]
        name = {"nc": "NC", "channels-first": "NCHW", "channels-last": "channels last"}[r["layout"]]
        lines.append(f"| {r['op']}, {paired.case_of(r).label} {name} | " + " | ".join(cells) + " |")
    first = results["startup"]["first"][0]
    threads = results["forward"]["threads"]
    lines += [
        "",
        f"Minimum of interleaved rounds, {threads} thread{'s' * (threads != 1)}; GB/s counts each tensor once. The fastest is "
        "bold; the last row is the case where fastbn does worst against its best peer."
        + (" No peer was faster than fastbn in any case measured." if max(map(rival, all_records(results))) <= 1 else ""),
        "",
        f"First forward + backward of a process ({first['layout']}): {readable_time(first['cold'])} with nothing compiled, "
        f"{readable_time(first['cached'])} from the disk cache. "
        f"`import fastbn` adds {readable_time(results['startup']['import'])} to `import numpy`.",
        "",
        hardware_line(results),
    ]
    return "\n".join(lines)


def hardware_line(results: dict[str, dict]) -> str:
    """Hardware, versions and date; and, where it was so, that the machine was not idle."""
    here, busy = results["forward"]["machine"], busiest(results)
    caches = ", ".join(f"{level} {size}" for level, size in here["caches"].items())
    versions = ", ".join(f"{name} {v}" for name, v in here["versions"].items() if v != "not installed")
    return f"{here['cpu']}, {here['cores']} cores, {here['simd']} ({caches}); {versions}; {here['date']}." + (
        f" Measured while other processes took up to {busy:.0%} of the cores: not to be relied on." if busy > BUSY else ""
    )


def replace_between(text: str, table: str, name: str = "README.md") -> str:
    """`text` with what stands between the two markers replaced by `table`.

    Raises
    ------
    ValueError
        If a marker is missing, stands there twice, or the two are in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{name} has {BEGIN} {text.count(BEGIN)} times and {END} {text.count(END)} times; "
            "write each once, in this order, where the table belongs"
        )
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n{table}\n{after}"


def all_bars(results: dict[str, dict]) -> list[dict]:
    return [line for name in results for line in results[name].get("bars", [])]


def summary(results: dict[str, dict]) -> str:
    """bench/results/summary.md: the bars, then every case."""
    parts = ["# Results", hardware_line(results), "## Bars and goals"]
    parts += [
        "Geometric means over the cases named in `bench/shapes.py`. oneDNN is not measured.",
        paired.bars_table(all_bars(results)),
    ]
    for op in ("forward", "backward", "inference"):
        parts += [f"## {op.capitalize()}", paired.table(results[op]["records"])]
    small = ["| (64, 128), everything included | fastbn | PyTorch | ratio |", "|---|--:|--:|--:|"]
    for r in results["overhead"]["rows"]:
        other = f"{readable_time(r['torch'])} | {r['ratio']:.2f}" if "torch" in r else "not installed | "
        small.append(f"| {r['op']} | {readable_time(r['fastbn'])} | {other} |")
    extra = ["| extra memory, forward + backward | x | NumPy's | at N / 4 | resident |", "|---|" + "--:|" * 4]
    for r in results["memory"]["rows"]:
        resident = "unknown" if r["resident"] is None else f"{r['resident'] / 1e6:.2f} MB"
        quarter = f"{r['traced_quarter'] / 1e6:.3f} MB"
        extra.append(f"| {r['case']} | {r['bytes'] / 1e6:.1f} MB | {r['traced'] / 1e6:.3f} MB | {quarter} | {resident} |")
    first = ["| first forward + backward | cold | from the cache | numba's import in it | afterwards |", "|---|" + "--:|" * 4]
    for r in results["startup"]["first"]:
        times = (readable_time(r[k]) for k in ("cold", "cached", "numba_import", "afterwards"))
        first.append(f"| {r['layout']} | {' | '.join(times)} |")
    grown = results["scaling"]
    text = scaling.report(grown["points"], grown["gains"], grown["threads"])
    return (
        "\n\n".join(
            [
                *parts,
                "## Small calls",
                "\n".join(small),
                "## Memory",
                "\n".join(extra),
                "## First calls",
                "\n".join(first),
                "## Scaling",
                text,
            ]
        )
        + "\n"
    )


def write(folder: Path, readme: Path | None) -> None:
    """Summary and plots into `folder`, the table into `readme` unless it is None."""
    results = load(folder)
    if readme is not None:  # first, since it may fail
        readme.write_text(replace_between(readme.read_text(), readme_table(results), readme.name))
    text = summary(results)
    (folder / "summary.md").write_text(text)
    caption = hardware_line(results)
    plots.bandwidth(all_records(results), caption, folder / "bandwidth.png")
    plots.scaling(results["scaling"]["points"], caption, folder / "scaling.png")
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small subset, into bench/results/quick")
    parser.add_argument("--collect", action="store_true", help="measure nothing, write from the files that are there")
    args = parser.parse_args(argv)
    folder = machine.RESULTS / "quick" if args.quick else machine.RESULTS
    if not args.quick:
        try:  # now, not after ten minutes of measuring
            replace_between(README.read_text(), "")
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from None
    if not args.collect:
        measure(folder, args.quick)
    write(folder, None if args.quick else README)


if __name__ == "__main__":
    main()
