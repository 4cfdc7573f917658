"""One whole call on a (64, 128) array, everything included: python overhead.py [--rounds 15] [--save FOLDER]

The array is so small that arithmetic hardly counts; what is measured is checking arguments, choosing a kernel, allocating
the result and calling. fastbn is called as a user would, without `out`, against PyTorch's functional calls on the same
memory; interleaved, each turn some hundred calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import peers
from timing import geometric_mean, interleave, readable_time, summarise

import fastbn

SHAPE = (64, 128)
OPS = ("forward", "inference", "backward")


def calls() -> dict[str, Callable[[], object]]:
    """`fastbn forward`, `torch forward`, ...; each returns its main result."""
    rng = np.random.default_rng(0)
    C = SHAPE[1]
    x, dy = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    gamma, beta, mean, var = (rng.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(4))
    mean_, var_ = mean.copy(), var.copy()  # the training call changes these
    _, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean_, var_)
    found = {
        "fastbn forward": lambda: fastbn.batch_norm_forward(x, gamma, beta, mean_, var_)[0],
        "fastbn inference": lambda: fastbn.batch_norm_inference(x, gamma, beta, mean, var),
        "fastbn backward": lambda: fastbn.batch_norm_backward(dy, ctx)[0],
    }
    torch = peers.torch
    if torch is None:
        return found
    tx, tdy, tgamma, tbeta, tmean, tvar = (torch.from_numpy(a) for a in (x, dy, gamma, beta, mean, var))
    tmean_, tvar_ = tmean.clone(), tvar.clone()
    _, save_mean, save_invstd = torch.native_batch_norm(tx, tgamma, tbeta, None, None, True, 0.1, 1e-5)
    batch_norm, backward = torch.nn.functional.batch_norm, torch.ops.aten.native_batch_norm_backward
    wanted = [True, True, True]
    return found | {
        "torch forward": lambda: batch_norm(tx, tmean_, tvar_, tgamma, tbeta, True),
        "torch inference": lambda: batch_norm(tx, tmean, tvar, tgamma, tbeta, False),
        "torch backward": lambda: backward(tdy, tx, tgamma, None, None, save_mean, save_invstd, True, 1e-5, wanted)[0],
    }


def check(found: dict[str, Callable[[], object]]) -> None:
    """fastbn and PyTorch have to agree, to float32 rounding, before either is timed."""
    for op in OPS:
        if f"torch {op}" in found:
            np.testing.assert_allclose(found[f"fastbn {op}"](), np.asarray(found[f"torch {op}"]()), rtol=1e-4, atol=1e-5)


def measure(rounds: int) -> dict:
    found = calls()
    check(found)
    times = summarise(interleave(found, rounds), ours="fastbn forward")
    rows = []
    for op in OPS:
        row = {"op": op, "fastbn": times[f"fastbn {op}"]["min"]}
        if f"torch {op}" in times:
            row |= {"torch": times[f"torch {op}"]["min"]}
            row["ratio"] = row["fastbn"] / row["torch"]
        rows.append(row)
    return {"shape": list(SHAPE), "rounds": rounds, "rows": rows, "bars": bars(rows)}


def bars(rows: list[dict]) -> list[dict]:
    ratios = [r["ratio"] for r in rows if "ratio" in r]
    if not ratios:
        return []
    value = geometric_mean(ratios)
    met = {"bar_met": value <= 1.3, "goal_met": value <= 0.8}
    name = "one call on (64, 128): fastbn's time / PyTorch's"
    return [{"name": name, "sign": "at most", "value": value, "bar": 1.3, "goal": 0.8, "cases": len(ratios), **met}]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/overhead.json")
    args = parser.parse_args(argv)
    body = measure(5 if args.quick else args.rounds)
    if args.save:
        machine.save("overhead", body, Path(args.save))
    for r in body["rows"]:
        other = f"PyTorch {readable_time(r['torch'])}, ratio {r['ratio']:.2f}" if "torch" in r else "PyTorch not installed"
        print(f"{r['op']}: fastbn {readable_time(r['fastbn'])}, {other}")


if __name__ == "__main__":
    main()
