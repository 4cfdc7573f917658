"""The two pictures of bench/results: bandwidth.png and scaling.png."""

from __future__ import annotations

from pathlib import Path

import contenders
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from paired import case_of

COLOURS = {"fastbn": "#1f6fb4", "torch": "#d9773c", "numba": "#7a9a4b", "numpy": "#9a9a9a"}
PANELS = (
    ("forward", "channels-first", "training forward, NCHW"),
    ("forward", "channels-last", "training forward, channels last"),
    ("backward", "channels-first", "backward, NCHW"),
    ("backward", "channels-last", "backward, channels last"),
    ("inference", "channels-first", "inference, NCHW"),
    ("inference", "channels-last", "inference, channels last"),
)


def bandwidth(records: list[dict], caption: str, path: Path) -> None:
    """GB/s against shape, for tensors of 1 MB and more: bars for fastbn and the peers, the streaming limit as a line."""
    panels = []
    for op, layout, title in PANELS:
        rows = [r for r in records if (r["op"], r["layout"]) == (op, layout) and r["bytes"] >= 2_000_000]
        if rows:
            panels.append((title, rows))
    if not panels:
        raise ValueError("no record of a case of 1 MB or more: nothing to plot")
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(13, 3.6 * -(-len(panels) // 2)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        names = [n for n in COLOURS if any(n in r["times"] for r in rows)]
        for k, name in enumerate(names):
            places = [i + (k - (len(names) - 1) / 2) * 0.8 / len(names) for i, r in enumerate(rows) if name in r["times"]]
            rates = [r["bytes"] / r["times"][name]["min"] / 1e9 for r in rows if name in r["times"]]
            axis.bar(places, rates, 0.8 / len(names), color=COLOURS[name], label=contenders.TITLES[name])
        seen = [(i, r["bytes"] / r["times"]["limit"]["min"] / 1e9) for i, r in enumerate(rows) if "limit" in r["times"]]
        axis.plot(*zip(*seen, strict=True), color="black", marker="o", markersize=3, label="limit: streaming copy")
        axis.set_xticks(range(len(rows)), [case_of(r).label for r in rows], rotation=20, fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("GB/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.supxlabel(caption, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scaling(points: list[dict], caption: str, path: Path) -> None:
    """Time against N, C and H*W, log-log: a line through the even sizes, odd and unaligned ones as marks."""
    axes_names = list(dict.fromkeys(p["axis"] for p in points))
    ops = list(dict.fromkeys(p["op"] for p in points))
    figure, axes = plt.subplots(len(ops), len(axes_names), figsize=(4.4 * len(axes_names), 3.4 * len(ops)), squeeze=False)
    for i, op in enumerate(ops):
        for j, name in enumerate(axes_names):
            axis = axes[i][j]
            row = sorted((p for p in points if (p["op"], p["axis"]) == (op, name)), key=lambda p: p["size"])
            even, odd = ([p for p in row if p["odd"] is kind] for kind in (False, True))
            far = [p for p in row if "unaligned" in p]
            axis.plot([p["size"] for p in even], [p["fastbn"] * 1e3 for p in even], "-o", ms=3, label="fastbn")
            axis.plot([p["size"] for p in odd], [p["fastbn"] * 1e3 for p in odd], "x", ms=5, label="fastbn, odd sizes")
            axis.plot([p["size"] for p in far], [p["unaligned"] * 1e3 for p in far], "+", ms=6, label="odd, unaligned")
            axis.plot([p["size"] for p in row], [p["limit"] * 1e3 for p in row], color="black", lw=0.8, label="limit")
            axis.set_xscale("log")
            axis.set_yscale("log")
            shape = ", ".join(name if length == row[-1]["size"] else str(length) for length in row[-1]["shape"])
            axis.set_title(f"{op}, ({shape})", fontsize=9)
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        axes[i][0].set_ylabel("ms")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supxlabel(caption, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
