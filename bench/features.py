"""What the features cost: python features.py [--shapes 32x256x56x56 ...] [--rounds 9]

One table a shape and layout: each feature's time over the plain call's (half types: float32's time over theirs), interleaved,
minima of the rounds, beside the target. ReLU and residual done apart with NumPy, in place, stand there for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import ml_dtypes
import numpy as np
from paired import parse_shape
from timing import interleave, readable_time

import fastbn

SHAPES = ((32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7))
#           what                      over                 target, and whether the ratio is a cost (at most) or a gain (at least)
TARGETS = {
    "forward relu": ("forward", 1.1, "cost"),
    "forward residual": ("forward", 1.5, "cost"),
    "forward residual relu": ("forward", 1.5, "cost"),
    "forward weights": ("forward", 1.4, "cost"),
    "forward weights (N,)": ("forward", 1.4, "cost"),
    "forward, relu apart": ("forward", None, "cost"),
    "forward, residual relu apart": ("forward", None, "cost"),
    "backward relu": ("backward", 1.1, "cost"),
    "backward residual relu": ("backward", None, "cost"),
    "backward weights": ("backward", 1.4, "cost"),
    "backward, relu apart": ("backward", None, "cost"),
    "forward float16": ("forward", 1.5, "gain"),
    "forward bfloat16": ("forward", 1.5, "gain"),
    "backward float16": ("backward", 1.5, "gain"),
    "backward bfloat16": ("backward", 1.5, "gain"),
}


def problem(shape: tuple[int, ...], last: bool) -> dict[str, Callable[[], object]]:
    """The calls to time, by the names in `TARGETS`; all write into memory that they are given.

    Those of one dtype share their arrays: where the system has put an array, in large pages or small ones, can decide a ratio.
    """
    rng = np.random.default_rng(0)
    shape = (shape[0], *shape[2:], shape[1]) if last else shape
    axis = -1 if last else 1
    positions = shape[:-1] if last else (shape[0], *shape[2:])
    C = shape[axis]
    gamma, beta = rng.uniform(0.5, 1.5, C).astype(np.float32), rng.uniform(-1, 1, C).astype(np.float32)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    per_value = rng.uniform(0.1, 2, positions).astype(np.float32)
    per_sample = np.arange(shape[0]) % 4 > 0

    arrays = (x, dy, *(fastbn.batch_norm_forward(x, axis=axis)[0] for _ in range(2)))
    runs = calls(arrays, gamma, beta, axis)
    runs |= calls(arrays, gamma, beta, axis, " relu", activation="relu")
    runs |= calls(arrays, gamma, beta, axis, " residual", residual=dy)
    runs |= calls(arrays, gamma, beta, axis, " residual relu", residual=dy, activation="relu")
    runs |= calls(arrays, gamma, beta, axis, " weights", sample_weight=per_value)
    runs |= calls(arrays, gamma, beta, axis, " weights (N,)", sample_weight=per_sample)
    runs |= apart(arrays, gamma, beta, axis)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = x.astype(dtype), dy.astype(dtype)
        outputs = (fastbn.batch_norm_forward(half[0], axis=axis)[0] for _ in range(2))
        runs |= calls((*half, *outputs), gamma, beta, axis, f" {half[0].dtype.name}")
    return runs


def calls(arrays, gamma, beta, axis, name="", **features) -> dict[str, Callable[[], object]]:
    """One forward and one backward; `arrays` are x, dy and where y and dx go."""
    x, dy, out, dx = arrays
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, axis=axis, **features)
    return {
        f"forward{name}": lambda: fastbn.batch_norm_forward(x, gamma, beta, axis=axis, out=out, **features),
        f"backward{name}": lambda: fastbn.batch_norm_backward(dy, ctx, out=dx),
    }


def apart(arrays, gamma, beta, axis) -> dict[str, Callable[[], object]]:
    """The same with NumPy after, or before, the plain call: in place, which is the best that NumPy can do."""
    x, dy, out, dx = arrays
    masked, ctx = fastbn.batch_norm_forward(x, gamma, beta, axis=axis)
    passed = masked > 0

    def forward() -> None:
        fastbn.batch_norm_forward(x, gamma, beta, axis=axis, out=out)
        np.maximum(out, 0, out=out)

    def forward_residual() -> None:
        fastbn.batch_norm_forward(x, gamma, beta, axis=axis, out=out)
        np.add(out, dy, out=out)
        np.maximum(out, 0, out=out)

    def backward() -> None:
        np.multiply(dy, passed, out=masked)
        fastbn.batch_norm_backward(masked, ctx, out=dx)

    return {"forward, relu apart": forward, "forward, residual relu apart": forward_residual, "backward, relu apart": backward}


def verify(last: bool) -> None:
    """Every forward that is timed, on a small array, against the formula in float64; the tests hold all of this to 1e-6.

    Raises
    ------
    AssertionError
    """
    rng = np.random.default_rng(1)
    shape = (4, 6, 5, 3) if last else (4, 3, 6, 5)
    axis = 3 if last else 1
    x, residual = rng.standard_normal((2, *shape), np.float32)
    gamma, beta = np.float32([1, 2, 0.5]), np.float32([0, 1, -1])
    weights = {"": None, "weights": rng.uniform(0.1, 2, shape[:3] if last else (4, 6, 5)), "weights (N,)": np.array([1, 0, 1, 1], bool)}
    for (name, w), relu, added in itertools.product(weights.items(), (False, True), (False, True)):
        full = np.ones(1) if w is None else np.expand_dims(w, axis) if w.ndim == 3 else w.reshape(-1, 1, 1, 1)
        full = np.broadcast_to(full, shape).astype(np.float64)
        axes = tuple(a for a in range(4) if a != axis)
        mean = (x * full).sum(axes, keepdims=True) / full.sum(axes, keepdims=True)
        var = ((x - mean) ** 2 * full).sum(axes, keepdims=True) / full.sum(axes, keepdims=True)
        exact = (x - mean) / np.sqrt(var + 1e-5) * np.moveaxis(gamma.reshape(3, 1, 1, 1), 0, axis)
        exact += np.moveaxis(beta.reshape(3, 1, 1, 1), 0, axis) + (residual if added else 0)
        features = {"activation": "relu" if relu else None, "residual": residual if added else None, "sample_weight": w}
        y, _ = fastbn.batch_norm_forward(x, gamma, beta, axis=axis, **features)
        np.testing.assert_allclose(y, np.maximum(exact, 0) if relu else exact, rtol=2e-6, atol=2e-6, err_msg=f"{name} {relu} {added}")
        for dtype, bound in ((np.float16, 2e-3), (ml_dtypes.bfloat16, 2e-2)):
            half, _ = fastbn.batch_norm_forward(x.astype(dtype), gamma, beta, axis=axis, sample_weight=w)
            plain, _ = fastbn.batch_norm_forward(x.astype(dtype).astype(np.float32), gamma, beta, axis=axis, sample_weight=w)
            np.testing.assert_allclose(half.astype(np.float32), plain, rtol=bound, atol=bound)


def measure(shape: tuple[int, ...], last: bool, rounds: int) -> dict[str, float]:
    """Seconds of each call: the minimum over the rounds."""
    runs = {name: run for name, run in problem(shape, last).items() if name in TARGETS or name in ("forward", "backward")}
    for run in runs.values():
        run()
    return {name: min(t for t in row if t is not None) for name, row in interleave(runs, rounds).items()}


def table(times: dict[str, float]) -> tuple[list[str], list[dict]]:
    """The lines of a Markdown table, and the same as records."""
    lines = ["| | time | ratio | target | |", "|---|--:|--:|--:|---|"]
    lines += [f"| {name} | {readable_time(times[name])} | 1 | | |" for name in ("forward", "backward")]
    records = []
    for name, (over, target, kind) in TARGETS.items():
        ratio = times[name] / times[over] if kind == "cost" else times[over] / times[name]
        met = None if target is None else ratio <= target if kind == "cost" else ratio >= target
        sign = "at most" if kind == "cost" else "at least"
        mark = "" if target is None else f"{sign} {target}"
        verdict = {None: "", True: "met", False: "**missed**"}[met]
        lines.append(f"| {name} | {readable_time(times[name])} | {ratio:.2f} | {mark} | {verdict} |")
        records.append({"name": name, "seconds": times[name], "ratio": ratio, "target": target, "kind": kind, "met": met})
    return lines, records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=SHAPES, help="such as 32x256x56x56")
    parser.add_argument("--layout", choices=("first", "last"), action="append", help="where the channels are; both by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, machine.usable_cores()))
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/features.json")
    args = parser.parse_args(argv)
    fastbn.set_num_threads(args.threads)
    machine.keep_freed_memory()
    for layout in args.layout or ("first", "last"):
        verify(layout == "last")
    results = []
    for shape in args.shapes:
        for layout in args.layout or ("first", "last"):
            lines, records = table(measure(shape, layout == "last", args.rounds))
            label = "x".join(map(str, shape))
            print(f"\n{label}, channels {layout}, {args.threads} threads\n\n" + "\n".join(lines))
            sys.stdout.flush()
            results.append({"shape": list(shape), "layout": layout, "records": records})
    if args.save:
        machine.save("features", {"threads": args.threads, "rounds": args.rounds, "results": results}, Path(args.save))


if __name__ == "__main__":
    main()
