"""What a user waits for at first: python startup.py [--quick] [--save FOLDER]

* `import fastbn` over `import numpy`, each in its own process.
* The first forward and backward of a process, with an empty cache folder (everything is compiled) and with the folder
  that this run left. Both include Numba's own import, which the first call triggers; it is also shown by itself.

Every figure is the minimum over fresh processes, but for the cold calls of the full run: the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

IMPORTS = """
import json, time
import numpy
t0 = time.perf_counter()
import fastbn
print(json.dumps({"import": time.perf_counter() - t0}))
"""

FIRST = """
import json, sys, time
import numpy as np
import fastbn
shape, axis, dtype = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
C = shape[axis]
gamma, beta, mean, var = np.ones(C, dtype), np.zeros(C, dtype), np.zeros(C, dtype), np.ones(C, dtype)

def both():
    t0 = time.perf_counter()
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, axis=axis)
    t1 = time.perf_counter()
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, ctx)
    return t1 - t0, time.perf_counter() - t1, (y, dx)

t0 = time.perf_counter()
import numba
t1 = time.perf_counter()
forward, backward, (y, dx) = both()
axes = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
assert abs(y.mean(axis=axes)).max() < 1e-4 and abs(y.std(axis=axes) - 1).max() < 1e-3, "wrong result"
assert abs(dx.mean(axis=axes)).max() < 1e-4, "wrong gradient"
again = sum(both()[:2])
print(json.dumps({"numba": t1 - t0, "forward": forward, "backward": backward, "again": again}))
"""

LAYOUTS = {
    "NCHW float32": ((32, 64, 28, 28), 1, "float32"),
    "NCHW float64": ((32, 64, 28, 28), 1, "float64"),
    "channels last float32": ((32, 28, 28, 64), -1, "float32"),
    "NC float32": ((256, 1024), 1, "float32"),
}


def child(code: str, *args: str, cache: str | None = None) -> dict:
    """What a fresh interpreter prints as JSON; it sees no cache but the one given."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_CACHE", "NUMBA_"))}
    if cache is not None:
        env |= {"FASTBN_CACHE_DIR": cache, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def import_time(times: int) -> float:
    """Seconds of `import fastbn` in a process that has imported numpy."""
    return min(child(IMPORTS)["import"] for _ in range(times))


def first_calls(name: str, cold: int, warm: int) -> dict:
    """Seconds of the first forward plus backward: nothing cached, then from the cache; numba's import included."""
    argument = json.dumps(LAYOUTS[name])
    colds, warms = [], []
    for _ in range(cold):
        with tempfile.TemporaryDirectory(prefix="fastbn-cache-") as folder:
            colds.append(child(FIRST, argument, cache=folder))
            warms += [child(FIRST, argument, cache=folder) for _ in range(warm)]

    def total(run: dict) -> float:
        return run["numba"] + run["forward"] + run["backward"]

    return {
        "layout": name,
        "cold": statistics.median(map(total, colds)),
        "cached": min(map(total, warms)),
        "numba_import": min(run["numba"] for run in warms),
        "afterwards": min(run["again"] for run in warms),
    }


def bars(body: dict) -> list[dict]:
    """The performance contract's lines on starting up."""

    def line(name: str, value: float, bar: float, goal: float, unit: str) -> dict:
        met = {"bar_met": value <= bar, "goal_met": value <= goal}
        return {"name": name, "sign": "at most", "value": value, "bar": bar, "goal": goal, "unit": unit, **met}

    cold = max(body["first"], key=lambda r: r["cold"])
    cached = max(body["first"], key=lambda r: r["cached"])
    return [
        line("`import fastbn` over `import numpy`", body["import"] * 1e3, 50, 10, " ms"),
        line(f"first forward + backward, nothing cached ({cold['layout']}, slowest)", cold["cold"], 4, 2, " s"),
        line(f"the same from the cache ({cached['layout']}, slowest)", cached["cached"], 0.5, 0.25, " s"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layout, once")
    parser.add_argument("--save", metavar="FOLDER", help="write FOLDER/startup.json")
    args = parser.parse_args(argv)
    names = list(LAYOUTS)[:1] if args.quick else list(LAYOUTS)
    body = {"import": import_time(3 if args.quick else 9)}
    body["first"] = [first_calls(n, cold=1 if args.quick else 3, warm=2) for n in names]
    body["bars"] = bars(body)
    if args.save:
        machine.save("startup", body, Path(args.save))
    print(f"import fastbn over numpy: {body['import'] * 1e3:.1f} ms")
    for r in body["first"]:
        print(
            f"first forward + backward, {r['layout']}: {r['cold']:.2f} s cold, {r['cached']:.2f} s from the cache, "
            f"of which importing numba takes {r['numba_import']:.2f} s; afterwards {r['afterwards'] * 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()
