"""Batch normalisation of a batch that lies on several workers: statistics, output and gradients of the whole.

    python examples/distributed_moments.py --workers 3           three threads of this process
    mpirun -n 3 python examples/distributed_moments.py --mpi     three processes; needs mpi4py: pip install 'fastbn[mpi]'

A worker exchanges nothing but O(C) numbers: its Moments in the forward, two sums in the backward.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import fastbn

SHAPE, AXIS = (48, 16, 14, 14), 1
Gather = Callable[[Any], list[Any]]  # everybody's object, in the order of the workers


def train_step(x: np.ndarray, dy: np.ndarray, layer: dict[str, np.ndarray], gather: Gather) -> dict[str, np.ndarray]:
    """Forward and backward of one worker's part."""
    # Merged by everybody in the same order: the same bits, and so the same running statistics, on all workers.
    whole = sum(gather(fastbn.moments(x, axis=AXIS)))
    y, ctx = fastbn.batch_norm_forward_apply(
        x, whole, layer["gamma"], layer["beta"], layer["running_mean"], layer["running_var"], axis=AXIS, activation="relu"
    )
    sums = gather(fastbn.batch_norm_backward_reduce(dy, ctx))
    sum_dy, sum_dy_xmu = (sum(part) for part in zip(*sums, strict=True))
    dx = fastbn.batch_norm_backward_apply(dy, ctx, sum_dy, sum_dy_xmu)
    return {"y": y, "dx": dx, "dgamma": sum_dy_xmu * ctx.invstd, "dbeta": sum_dy}


def problem() -> tuple[np.ndarray, np.ndarray]:
    """x and dy of the whole batch, the same on every worker; a real program would read only its part."""
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, SHAPE).astype(np.float32), rng.standard_normal(SHAPE, np.float32)


def new_layer() -> dict[str, np.ndarray]:
    ones, zeros = np.ones(SHAPE[AXIS], np.float32), np.zeros(SHAPE[AXIS], np.float32)
    return {"gamma": ones, "beta": zeros, "running_mean": zeros.copy(), "running_var": ones.copy()}


def work(rank: int, workers: int, gather: Gather) -> float:
    """One worker's step; how far it is from the same rows of a step on the whole batch, at most."""
    x, dy = problem()
    mine = slice(len(x) * rank // workers, len(x) * (rank + 1) // workers)
    layer, whole = new_layer(), new_layer()
    found = train_step(x[mine], dy[mine], layer, gather)

    y, ctx = fastbn.batch_norm_forward(x, *whole.values(), axis=AXIS, activation="relu")
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, ctx)
    expected = {"y": y[mine], "dx": dx[mine], "dgamma": dgamma, "dbeta": dbeta}
    pairs = [(found[name], expected[name]) for name in expected] + [(layer[name], whole[name]) for name in layer]
    return max(float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0)) for a, b in pairs)


def in_threads(workers: int) -> list[float]:
    """The step by threads of this process: what MPI would exchange goes through a list."""
    barrier, slots, errors = threading.Barrier(workers), [None] * workers, [0.0] * workers

    def run(rank: int) -> None:
        def gather(mine: Any) -> list[Any]:
            slots[rank] = mine
            barrier.wait()
            everybody = list(slots)
            barrier.wait()  # nobody writes the next object before all have read this one
            return everybody

        try:
            errors[rank] = work(rank, workers, gather)
        except BaseException:
            barrier.abort()  # the others would wait for ever
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def in_mpi() -> list[float]:
    """The step by the processes that mpirun started."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise SystemExit(
            f"--mpi needs mpi4py and an MPI library ({error}): pip install 'fastbn[mpi]', or leave --mpi out"
        ) from None
    comm = MPI.COMM_WORLD
    errors = comm.allgather(work(comm.Get_rank(), comm.Get_size(), comm.allgather))
    return errors if comm.Get_rank() == 0 else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi", action="store_true", help="this is one of the processes of mpirun")
    parser.add_argument("--workers", type=int, default=3, help="threads that play the workers, without --mpi")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; at least 1 is needed")
    for rank, error in enumerate(in_mpi() if args.mpi else in_threads(args.workers)):
        print(f"worker {rank}: largest difference from the whole batch in one call {error:.1e}")


if __name__ == "__main__":
    main()
