"""One problem, several ways to solve it: each contender is built here, checked, and only then handed out to be timed.

All contenders read the same arrays and, where they take an output, write to the same one, so that every one of them
meets the same state of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import peers
from limit import Limit
from numba import njit, set_num_threads
from shapes import Case

import fastbn

EPS, MOMENTUM = 1e-5, 0.1
NAMES = ("limit", "fastbn", "torch", "numba", "numpy")
TITLES = {"limit": "limit", "fastbn": "fastbn", "torch": "PyTorch", "numba": "naive Numba", "numpy": "naive NumPy"}

# fastbn is held to its contract. The peers compute in float32, and naive NumPy sums up to 400,000 rows one after another in
# it (off by 1.3e-4 on the largest): 1e-3 still tells a wrong formula from that. In float64 everybody is good to 1e-9 on
# these harmless inputs.
TOLERANCE = {"float32": {"fastbn": 1e-6, "peer": 1e-3}, "float64": {"fastbn": 1e-12, "peer": 1e-9}}


class WrongResult(AssertionError):
    """A contender's result differs from the reference: it is not timed."""


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], object]  # what is timed
    results: Callable[[], dict[str, np.ndarray]]  # what the last run computed, in the problem's storage order


class Problem:
    """The arrays of one case.

    x, dy and out are in storage order: (N, C, *spatial), (N, *spatial, C) or (N, C). `start` shifts them by that many
    elements from a 64-byte boundary.
    """

    def __init__(self, case: Case, threads: int, start: int = 0) -> None:
        self.case, self.threads = case, threads
        rng = np.random.default_rng(len(case.label))
        C = case.shape[1]
        last = case.layout == "channels-last"
        self.axis = -1 if last else 1
        self.storage = (case.shape[0], *case.shape[2:], C) if last else case.shape
        self.x, self.dy, self.out = (_aligned(self.storage, case.dtype, start) for _ in range(3))
        _fill(rng, self.x, 0.5, 2.0)
        _fill(rng, self.dy, 0.0, 1.0)
        self.out[...] = 0  # touched: its pages exist before anything is timed
        self.gamma = rng.uniform(0.5, 1.5, C).astype(case.dtype)
        self.beta = rng.uniform(-1.0, 1.0, C).astype(case.dtype)
        self.mean = rng.uniform(0.0, 1.0, C).astype(case.dtype)  # running statistics for inference
        self.var = rng.uniform(1.0, 4.0, C).astype(case.dtype)

    def plan(self, array: np.ndarray) -> np.ndarray:
        """A view as the naive peers want it: (N, C, S), or rows of channels (R, C)."""
        N, C = self.case.shape[:2]
        return array.reshape(N, C, -1) if self.case.layout == "channels-first" else array.reshape(-1, C)

    def reference(self) -> dict[str, np.ndarray]:
        """The results of the same formulas in float64."""
        wide = {k: getattr(self, k).astype(np.float64) for k in ("gamma", "beta", "mean", "var")}
        x = self.plan(self.x).astype(np.float64)
        gamma = wide["gamma"]
        if self.case.op == "inference":
            y = peers.numpy_normalise(x, gamma, wide["beta"], wide["mean"], wide["var"], EPS)
            return {"y": y.reshape(self.storage)}
        if self.case.op == "forward":
            y = peers.numpy_forward(x, gamma, wide["beta"], wide["mean"], wide["var"], MOMENTUM, EPS)
            return {"y": y.reshape(self.storage), "running_mean": wide["mean"], "running_var": wide["var"]}
        dy = self.plan(self.dy).astype(np.float64)
        dx, dgamma, dbeta = peers.numpy_backward(dy, x, gamma, *self.batch_statistics, EPS)
        return {"dx": dx.reshape(self.storage), "dgamma": dgamma, "dbeta": dbeta}

    @cached_property
    def batch_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and biased variance in float64."""
        x = self.plan(self.x)
        axes = (0, 2) if x.ndim == 3 else 0
        return x.mean(axis=axes, dtype=np.float64), x.var(axis=axes, dtype=np.float64)


def _aligned(shape: tuple[int, ...], dtype: str, start: int) -> np.ndarray:
    """An uninitialised array that begins `start` elements after a 64-byte boundary."""
    item = np.dtype(dtype).itemsize
    size = int(np.prod(shape))
    room = np.empty(size * item + 64 + start * item, np.uint8)
    skip = -room.ctypes.data % 64 + start * item
    return room[skip : skip + size * item].view(dtype).reshape(shape)


def _fill(rng: np.random.Generator, array: np.ndarray, mean: float, std: float) -> None:
    """Normal values, repeating after 2^20 + 7 (odd, so that no two channels are alike): drawing 25 million is slow."""
    flat = array.reshape(-1)
    pattern = (mean + std * rng.standard_normal(min(flat.size, 2**20 + 7))).astype(array.dtype)
    for i in range(0, flat.size, pattern.size):
        flat[i : i + pattern.size] = pattern[: flat.size - i]


# --- one builder a contender; None where it is not installed ---


def _limit(p: Problem, limit: Limit) -> Contender:
    x, dy, out = (a.reshape(-1) for a in (p.x, p.dy, p.out))
    if p.case.op == "backward":
        return Contender("limit", lambda: limit.add(x, dy, out), lambda: {"dx": p.out})
    return Contender("limit", lambda: limit.copy(x, out), lambda: {"y": p.out})


def _fastbn(p: Problem, limit: Limit) -> Contender:
    mean, var = p.mean.copy(), p.var.copy()
    if p.case.op == "inference":

        def run():
            return fastbn.batch_norm_inference(p.x, p.gamma, p.beta, mean, var, eps=EPS, axis=p.axis, out=p.out)

        return Contender("fastbn", run, lambda: {"y": p.out})

    def forward():
        return fastbn.batch_norm_forward(p.x, p.gamma, p.beta, mean, var, momentum=MOMENTUM, eps=EPS, axis=p.axis, out=p.out)

    if p.case.op == "forward":
        return Contender("fastbn", forward, lambda: {"y": p.out, "running_mean": mean, "running_var": var})
    _, ctx = forward()
    last: list = []

    def backward():
        last[:] = fastbn.batch_norm_backward(p.dy, ctx, out=p.out)

    return Contender("fastbn", backward, lambda: dict(zip(("dx", "dgamma", "dbeta"), last, strict=True)))


def _numpy(p: Problem, limit: Limit) -> Contender:
    x, dy, last = p.plan(p.x), p.plan(p.dy), []
    mean, var = p.mean.copy(), p.var.copy()
    if p.case.op == "backward":
        batch_mean, batch_var = (v.astype(p.case.dtype) for v in p.batch_statistics)

        def run():
            last[:] = peers.numpy_backward(dy, x, p.gamma, batch_mean, batch_var, EPS)

        return Contender("numpy", run, lambda: {"dx": last[0].reshape(p.storage), "dgamma": last[1], "dbeta": last[2]})
    if p.case.op == "inference":

        def run():
            last[:] = [peers.numpy_normalise(x, p.gamma, p.beta, mean, var, EPS)]

        return Contender("numpy", run, lambda: {"y": last[0].reshape(p.storage)})

    def run():
        last[:] = [peers.numpy_forward(x, p.gamma, p.beta, mean, var, MOMENTUM, EPS)]

    return Contender("numpy", run, lambda: {"y": last[0].reshape(p.storage), "running_mean": mean, "running_var": var})


def _numba(p: Problem, limit: Limit) -> Contender:
    set_num_threads(p.threads)
    x, dy, out = p.plan(p.x), p.plan(p.dy), p.plan(p.out)
    mean, var = p.mean.copy(), p.var.copy()
    planes = x.ndim == 3
    split = () if planes else (p.threads,)
    if p.case.op == "backward":
        kernel = peers.numba_backward_planes if planes else peers.numba_backward_rows
        batch_mean, batch_var = (v.astype(p.case.dtype) for v in p.batch_statistics)
        dgamma, dbeta = np.empty_like(p.gamma), np.empty_like(p.gamma)

        def run():
            kernel(dy, x, p.gamma, batch_mean, batch_var, EPS, out, dgamma, dbeta, *split)

        return Contender("numba", run, lambda: {"dx": p.out, "dgamma": dgamma, "dbeta": dbeta})
    if p.case.op == "inference":
        kernel = peers.numba_inference_planes if planes else peers.numba_inference_rows
        return Contender("numba", lambda: kernel(x, p.gamma, p.beta, mean, var, EPS, out), lambda: {"y": p.out})
    kernel = peers.numba_forward_planes if planes else peers.numba_forward_rows

    def run():
        kernel(x, p.gamma, p.beta, mean, var, MOMENTUM, EPS, out, *split)

    return Contender("numba", run, lambda: {"y": p.out, "running_mean": mean, "running_var": var})


def _torch(p: Problem, limit: Limit) -> Contender | None:
    torch = peers.torch
    if torch is None:
        return None
    torch.set_num_threads(p.threads)

    def view(array):
        """The same memory as a tensor of shape (N, C, *spatial): PyTorch's channels_last where it lies so."""
        tensor = torch.from_numpy(array)
        return tensor.movedim(-1, 1) if p.case.layout == "channels-last" else tensor

    x, dy, out = view(p.x), view(p.dy), view(p.out)
    mean, var = p.mean.copy(), p.var.copy()
    gamma, beta, mean_, var_ = (torch.from_numpy(a) for a in (p.gamma, p.beta, mean, var))
    save_mean, save_invstd = torch.empty_like(gamma), torch.empty_like(gamma)
    training = p.case.op != "inference"

    def run():
        outputs = (out, save_mean, save_invstd)
        torch.native_batch_norm(x, gamma, beta, mean_, var_, training, MOMENTUM, EPS, out=outputs)

    if p.case.op == "inference":
        # PyTorch resizes the two saved statistics to nothing in inference mode, and warns unless they are empty.
        save_mean, save_invstd = gamma.new_empty(0), gamma.new_empty(0)
        return Contender("torch", run, lambda: {"y": p.out})
    if p.case.op == "forward":
        return Contender("torch", run, lambda: {"y": p.out, "running_mean": mean, "running_var": var})
    run()
    last: list = []

    def backward():
        last[:] = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, mean_, var_, save_mean, save_invstd, True, EPS, [True, True, True]
        )

    def results():
        dx = last[0].movedim(1, -1) if p.case.layout == "channels-last" else last[0]
        return {"dx": dx.numpy(), "dgamma": last[1].numpy(), "dbeta": last[2].numpy()}

    return Contender("torch", backward, results)


BUILDERS = {"limit": _limit, "fastbn": _fastbn, "torch": _torch, "numba": _numba, "numpy": _numpy}


@njit(nogil=True)
def _worst(found, exact, floor):
    """The largest |found - exact| / max(floor, |exact|); infinite if any value is NaN."""
    worst = 0.0
    for i in range(exact.size):
        error = abs(found[i] - exact[i]) / max(floor, abs(exact[i]))
        if not error <= worst:
            worst = error if error == error else np.inf
    return worst


def check(contender: Contender, problem: Problem, reference: dict[str, np.ndarray]) -> float:
    """Run the contender once and compare all that it computes with the float64 reference.

    Returns
    -------
    float
        The largest error, relative to max(1, |exact|) for y and the running statistics, to the largest |dx| for dx, and
        to sqrt(count) (the size of the sums) for dgamma and dbeta.

    Raises
    ------
    WrongResult
        If an error exceeds the tolerance.
    """
    problem.out[...] = np.nan  # a contender that writes nothing is caught
    contender.run()
    results = contender.results()
    if contender.name == "limit":
        exact = problem.x + problem.dy if problem.case.op == "backward" else problem.x
        reference = dict.fromkeys(results, exact)
    tolerance = TOLERANCE[problem.case.dtype]["fastbn" if contender.name == "fastbn" else "peer"]
    worst = 0.0
    for name, exact in reference.items():
        count = problem.case.size / problem.case.shape[1]
        floor = 1.0
        if contender.name != "limit" and name == "dx":
            floor = float(abs(exact).max())
        elif name in ("dgamma", "dbeta"):
            floor = count**0.5
        error = _worst(results[name].reshape(-1), exact.reshape(-1), floor)
        if not error <= tolerance:
            raise WrongResult(f"{contender.name}, {problem.case.group}: {name} is off by {error:.1e}, allowed {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def build(
    case: Case, threads: int, limit: Limit, names: tuple[str, ...] = NAMES, start: int = 0
) -> tuple[Problem, list[Contender]]:
    """Every installed contender for a case, checked against the float64 reference."""
    fastbn.set_num_threads(threads)
    problem = Problem(case, threads, start)
    reference = problem.reference()
    found = []
    for name in names:
        contender = BUILDERS[name](problem, limit)
        if contender is not None:
            check(contender, problem, reference)
            found.append(contender)
    return problem, found
