"""fastbn on a GPU against a device copy, CuPy and PyTorch: python gpu.py [--quick] [--rounds 15] [--save FOLDER] [--docs FILE]

Every case is timed with CUDA events, medians over rounds in which the contenders take turns. A round of a contender is some calls in a
row on inputs that rotate beyond the L2 cache, enqueued behind copies that keep the GPU busy meanwhile: so the events see no gaps of the
host's, whose own time a call is taken by the clock. Results go to bench/results/gpu.json, the table between two markers of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
from gpu_cases import BATCHES, ITEMSIZE, LAYOUTS, GpuCase, cases, input_sets, means, statistics_of, table, with_shares
from gpu_contenders import Problem, WrongResult, contenders, timed
from shapes import OPS, RESNET
from timing import no_collection

DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NEEDS = 'it needs an NVIDIA GPU with its driver, and pip install "fastbn[cuda13]" (CUDA 13) or "fastbn[cuda12]" (CUDA 12)'
QUICK = ((32, 256, 56, 56), (32, 1024, 14, 14))
CALLS, LEAST_MS = 100, 1.0  # a turn: at most so many calls, and enough of them for so long


class NoGpu(RuntimeError):
    """Nothing to measure on; says what is needed."""


def require() -> Any:
    """CuPy, with which everything is done.

    Raises
    ------
    NoGpu
        Where CuPy, numba-cuda, the driver or the GPU is missing.
    """
    from fastbn.cuda import loading

    try:
        xp = loading.kernels().arrays
        if xp is np:
            raise NoGpu(f"the simulator is on (NUMBA_ENABLE_CUDASIM=1): it has no speed to measure; {NEEDS}")
        count = xp.cuda.runtime.getDeviceCount()
    except NoGpu:
        raise
    except Exception as error:  # no driver, no library: CuPy and Numba raise various things
        raise NoGpu(f"no GPU can be used here: {type(error).__name__}: {error}; {NEEDS}") from error
    if count < 1:
        raise NoGpu(f"CuPy sees no GPU; {NEEDS}")
    return xp


def describe(xp: Any) -> dict:
    """The GPU, its driver and the versions of everything that runs on it."""
    from fastbn.cuda import loading

    runtime, torch = xp.cuda.runtime, peers.torch
    found = runtime.getDeviceProperties(runtime.getDevice())
    cudnn = torch.backends.cudnn.version() if torch is not None and torch.cuda.is_available() else None
    return {
        "name": found["name"].decode(),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "multiprocessors": found["multiProcessorCount"],
        "l2_bytes": found["l2CacheSize"],
        "memory_bytes": found["totalGlobalMem"],
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "simulated": bool(loading.kernels().simulated),
        "versions": {"cupy": xp.__version__, "cudnn": cudnn, **{name: machine._version(name) for name in ("numba-cuda", "cuda-core")}},
    }


class Clock:
    """Times turns of calls: by events what the GPU takes, by the clock what the host takes."""

    def __init__(self, xp: Any, head_bytes: int) -> None:
        self.xp = xp
        self.begin, self.end = xp.cuda.Event(), xp.cuda.Event()
        self.head = [xp.zeros(max(1, head_bytes // 4), np.float32) for _ in range(2)]
        self.head_ms = self._events(lambda i: xp.copyto(*self.head), 3, 0)[0]

    def _events(self, run: Callable[[int], Any], calls: int, heads: int, sets: int = 1) -> tuple[float, float]:
        """(GPU milliseconds, host microseconds) a call."""
        for _ in range(heads):
            self.xp.copyto(*self.head)
        self.begin.record()
        start = time.perf_counter()
        for k in range(calls):
            run(k % sets)
        host = time.perf_counter() - start
        self.end.record()
        self.end.synchronize()
        return self.xp.cuda.get_elapsed_time(self.begin, self.end) / calls, host / calls * 1e6

    def turn(self, run: Callable[[int], Any], sets: int, once_ms: float, host_us: float) -> tuple[float, float]:
        """One turn, as long as such calls deserve, behind copies that outlast their enqueueing."""
        calls = int(min(CALLS, max(sets, LEAST_MS / max(once_ms, 1e-6), 3)))
        heads = int(min(200, 1 + 1.5e-3 * host_us * calls / max(self.head_ms, 1e-6)))
        return self._events(run, calls, heads, sets)

    def roughly(self, run: Callable[[int], Any], sets: int) -> tuple[float, float]:
        """What a call takes, warm."""
        self._events(run, 2, 0, sets)
        return self._events(run, 3, 1, sets)


def launches(run: Callable[[int], Any]) -> int | None:
    """What a call starts on the GPU, kernels, copies and fills, as PyTorch's profiler counts; without it None."""
    torch = peers.torch
    if torch is None or not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run(0)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())


def own_launches(run: Callable[[int], Any]) -> int:
    """fastbn's kernel launches of a call."""
    launch = importlib.import_module("fastbn.kernels.cuda.launch")
    count, real = [0], launch.launch

    def counting(*arguments: Any) -> None:
        count[0] += 1
        real(*arguments)

    launch.launch = counting
    try:
        run(0)
    finally:
        launch.launch = real
    return count[0]


def measure(xp: Any, case: GpuCase, rounds: int, l2: int, clock: Clock) -> dict:
    """A row: the case, and each contender's statistics."""
    dtype = _dtype(case.dtype)
    sets = input_sets(case, l2, _free(xp))
    named, left_out = contenders(Problem(xp, case, sets, dtype))
    runs = {name: timed(each) for name, each in named.items()}
    once = {name: clock.roughly(run, sets) for name, run in runs.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    with no_collection():
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                turns[name].append(clock.turn(runs[name], sets, *once[name]))
    found = {}
    for name, each in turns.items():
        ms, host = (list(column) for column in zip(*each, strict=True))
        nbytes = 2 * case.nbytes if name == "copy" else case.floor_bytes
        found[name] = {**statistics_of(ms, host, nbytes), "launches": launches(runs[name])}
    found["fastbn"]["launches"] = own_launches(runs["fastbn"])
    shape = list(case.shape)
    body = {"label": case.label, "op": case.op, "shape": shape, "layout": case.layout, "dtype": case.dtype, "sets": sets}
    return with_shares({**body, "contenders": found, "left_out": left_out})


def _dtype(name: str) -> Any:
    """bfloat16 is ml_dtypes', as CuPy has it too."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _free(xp: Any) -> int:
    xp.get_default_memory_pool().free_all_blocks()
    return int(xp.cuda.runtime.memGetInfo()[0])


def replace_between(text: str, new: str) -> str:
    """The text with `new` between its two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs {BEGIN} and, after it, {END}, once each; put them where the table is to stand")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{new}\n{text[text.index(END) :]}"


def written(gpu: dict, rows: list[dict], left_out: dict[str, str], rounds: int) -> str:
    """What is printed, and stands in docs/gpu.md."""
    versions = ", ".join(f"{name} {v}" for name, v in gpu["versions"].items() if v is not None)
    where = "On a simulator: these are no speeds of a GPU. " * gpu["simulated"] + f"{gpu['name']}, driver {gpu['driver']}, {versions}"
    note = "GB/s count x and y (backward: x, dy and dx) once; PyTorch and CuPy: times over fastbn's."
    missing = [f"- not measured: {label}: {why}" for label, why in left_out.items()]
    return "\n".join([f"{where}; median of {rounds} rounds. {note}", "", table(rows), "", means(rows), *missing])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=15)
    add("--quick", action="store_true", help="two shapes at N=32")
    add("--shapes", nargs="+", type=lambda text: tuple(map(int, text.split("x"))), help="such as 32x64x56x56, instead of ResNet-50's")
    add("--dtypes", nargs="+", choices=tuple(ITEMSIZE), default=tuple(ITEMSIZE))
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    add("--ops", nargs="+", choices=OPS, default=OPS)
    add("--save", type=Path, default=None, help="folder of gpu.json; bench/results where everything is measured")
    add("--docs", type=Path, default=None, help="the file with the two markers; docs/gpu.md where everything is measured")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds: at least 1 is needed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        xp = require()
    except NoGpu as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    whole = not (args.quick or args.shapes) and all(
        set(given) == set(every) for given, every in ((args.dtypes, ITEMSIZE), (args.layouts, LAYOUTS), (args.ops, OPS))
    )
    shapes, batches = (args.shapes, None) if args.shapes else (QUICK, None) if args.quick else (RESNET, BATCHES)
    gpu = describe(xp)
    clock = Clock(xp, gpu["l2_bytes"])
    rows, left_out = [], {}
    for case in cases(shapes, batches, args.layouts, args.dtypes, args.ops):
        try:
            row = measure(xp, case, args.rounds, gpu["l2_bytes"], clock)
        except (TypeError, ValueError, ImportError, MemoryError, WrongResult) as error:  # also: a dtype that CuPy lacks, little memory
            left_out[case.label] = f"{type(error).__name__}: {error}"
            continue
        rows.append(row)
        mine = row["contenders"]["fastbn"]
        print(f"{row['label']:<56}{mine['gb_per_s']:8.0f} GB/s {mine['share']:7.0%} of the copy {mine['host_us']:7.1f} us", flush=True)
    if not rows:
        print(f"bench/gpu.py: nothing could be measured: {json.dumps(left_out, indent=1)}", file=sys.stderr)
        return 1
    text = written(gpu, rows, left_out, args.rounds)
    print(text)
    folder = args.save or (machine.RESULTS if whole else None)
    if folder is not None:
        print(machine.save("gpu", {"gpu": gpu, "rounds": args.rounds, "rows": rows, "left_out": left_out}, folder))
    docs = args.docs or (DOCS if whole else None)
    if docs is not None:
        docs.write_text(replace_between(docs.read_text(), text))
    return 1 if any(WrongResult.__name__ in why for why in left_out.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
