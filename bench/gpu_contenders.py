"""One GPU case, several ways to solve it: each contender is built here, checked against float64, and only then handed out.

All contenders read the same arrays. fastbn, the copy and CuPy write into preallocated arrays where the interface lets them; PyTorch's
functions allocate their results from its caching allocator, as they do for its users.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
from gpu_cases import GpuCase

import fastbn

EPS, MOMENTUM = 1e-5, 0.1
# Half a unit in the last place of what is stored, and what float32 arithmetic adds: fastbn's contract, and for peers, who sum in plain
# float32, enough to tell a wrong formula.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ARITHMETIC = {"fastbn": 1e-6, "copy": 0.0}
PEERS_ARITHMETIC = 1e-3


class WrongResult(AssertionError):
    """A contender's result differs from the reference: it is not timed."""


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[int], Any]  # what is timed, on the i-th set; returns y or dx in the problem's storage order


class Problem:
    """The arrays of one case, `sets` times over, with one set of parameters."""

    def __init__(self, xp: Any, case: GpuCase, sets: int, dtype: Any) -> None:
        self.xp, self.case = xp, case
        rng = np.random.default_rng(0)
        C = case.shape[1]
        block = rng.standard_normal(min(1 << 20, max(1, case.nbytes)) + 5, dtype=np.float32)  # odd: no channel is like another
        self.x = [_filled(xp, 2.0 * block + 0.5, case.storage, dtype, 7 * i) for i in range(sets)]
        self.dy = [_filled(xp, block, case.storage, dtype, 11 + 7 * i) for i in range(sets if case.op == "backward" else 0)]
        self.out = [xp.empty_like(x) for x in self.x]
        vectors = rng.uniform(0.5, 1.5, (4, C)).astype(np.float32)
        self.gamma, self.beta, self.mean, self.var = (xp.asarray(v) for v in vectors)
        self.running_mean, self.running_var = xp.asarray(vectors[2]).copy(), xp.asarray(vectors[3]).copy()
        self.sample = sorted({0, C - 1, C // 2, C // 3})  # channels are independent: these are checked

    def channels(self, array: Any) -> np.ndarray:
        """The sampled channels on the host in float64, (R, channels)."""
        taken = [array[(slice(None),) * (self.case.axis % array.ndim) + (c,)] for c in self.sample]
        host = [np.asarray(part.get() if hasattr(part, "get") else part).astype(np.float64).reshape(-1) for part in taken]
        return np.stack(host, axis=1)

    def vector(self, array: Any) -> np.ndarray:
        host = np.asarray(array.get() if hasattr(array, "get") else array)
        return host.astype(np.float64)[self.sample]

    def reference(self) -> tuple[np.ndarray, float]:
        """The result of the first set on the sampled channels, and the size of its terms."""
        x, gamma, beta = self.channels(self.x[0]), self.vector(self.gamma), self.vector(self.beta)
        if self.case.op == "inference":
            y = peers.numpy_normalise(x, gamma, beta, self.vector(self.mean), self.vector(self.var), EPS)
        elif self.case.op == "forward":
            y = peers.numpy_normalise(x, gamma, beta, x.mean(axis=0), x.var(axis=0), EPS)
        else:
            dy = self.channels(self.dy[0])
            y = peers.numpy_backward(dy, x, gamma, x.mean(axis=0), x.var(axis=0), EPS)[0]
            return y, float(np.abs(dy).max() * np.abs(gamma).max() / x.std(axis=0).min())
        return y, 1.0

    def check(self, contender: Contender) -> None:
        """Raise WrongResult where the contender's first set differs from the reference by more than it may."""
        got = self.channels(contender.run(0))
        wanted, scale = (self.channels(self.x[0]), 1.0) if contender.name == "copy" else self.reference()
        bound = ROUNDING[self.case.dtype] * (contender.name != "copy") + ARITHMETIC.get(contender.name, PEERS_ARITHMETIC)
        worst = float((np.abs(got - wanted) / np.maximum(scale, np.abs(wanted))).max())
        if not worst <= bound:  # NaN is wrong, too
            raise WrongResult(f"{contender.name} is off by {worst:.2g} in {self.case.label}; allowed are {bound:.2g}")


def _filled(xp: Any, block: np.ndarray, shape: tuple[int, ...], dtype: Any, start: int) -> Any:
    """An array of that shape, filled with the block over and over from `start` on."""
    made, source = xp.empty(shape, dtype), xp.asarray(np.roll(block, -start).astype(dtype))
    flat = made.reshape(-1)
    for begin in range(0, flat.size, source.size):
        part = flat[begin : begin + source.size]
        part[...] = source[: part.size]
    return made


def contenders(problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every contender that can be had here, by name, checked; and why PyTorch's are left out where they are."""
    named = {name: Contender(name, build(problem)) for name, build in (("copy", _copy), ("fastbn", _fastbn), ("cupy", _cupy))}
    for each in named.values():
        problem.check(each)
    left_out = {}
    try:
        of_torch = _torch(problem)
    except (RuntimeError, BufferError, TypeError, ValueError) as error:  # a dtype that cannot be exchanged
        return named, {"torch": f"{type(error).__name__}: {error}"}
    for name, run in of_torch.items():
        try:
            problem.check(Contender(name, run))
        except (RuntimeError, BufferError, TypeError, ValueError, WrongResult) as error:  # cuDNN does not take every dtype and layout
            left_out[name] = f"{type(error).__name__}: {error}"
        else:
            named[name] = Contender(name, run)
    return named, left_out


def _copy(p: Problem) -> Callable[[int], Any]:
    def run(i: int) -> Any:
        p.xp.copyto(p.out[i], p.x[i])
        return p.out[i]

    return run


def _fastbn(p: Problem) -> Callable[[int], Any]:
    axis = p.case.axis
    if p.case.op == "forward":
        return lambda i: fastbn.batch_norm_forward(
            p.x[i], p.gamma, p.beta, p.running_mean, p.running_var, momentum=MOMENTUM, eps=EPS, axis=axis, out=p.out[i]
        )[0]
    if p.case.op == "inference":
        return lambda i: fastbn.batch_norm_inference(p.x[i], p.gamma, p.beta, p.mean, p.var, eps=EPS, axis=axis, out=p.out[i])
    held = [fastbn.batch_norm_forward(x, p.gamma, p.beta, eps=EPS, axis=axis)[1] for x in p.x]
    return lambda i: fastbn.batch_norm_backward(p.dy[i], held[i], out=p.out[i])[0]


def _cupy(p: Problem) -> Callable[[int], Any]:
    """The formula as it stands in the paper (Ioffe and Szegedy 2015, algorithm 1 and section 3), statistics in float32."""
    xp, axis = p.xp, p.case.axis % len(p.case.shape)
    axes = tuple(a for a in range(len(p.case.shape)) if a != axis)
    wide = tuple(-1 if a == axis else 1 for a in range(len(p.case.shape)))
    gamma, beta, mean, var = (v.reshape(wide) for v in (p.gamma, p.beta, p.mean, p.var))

    def statistics(x: Any) -> tuple[Any, Any]:
        m = x.mean(axis=axes, keepdims=True)
        return m, ((x - m) ** 2).mean(axis=axes, keepdims=True)

    def forward(i: int) -> Any:
        x = p.x[i].astype(np.float32, copy=False)
        m, v = (mean, var) if p.case.op == "inference" else statistics(x)
        p.out[i][...] = (x - m) / xp.sqrt(v + EPS) * gamma + beta
        return p.out[i]

    def backward(i: int) -> Any:
        x, dy = (a[i].astype(np.float32, copy=False) for a in (p.x, p.dy))
        m, v = saved[i]
        invstd = 1 / xp.sqrt(v + EPS)
        xhat = (x - m) * invstd
        dbeta, dgamma = dy.mean(axis=axes, keepdims=True), (dy * xhat).mean(axis=axes, keepdims=True)
        p.out[i][...] = gamma * invstd * (dy - dbeta - xhat * dgamma)
        return p.out[i]

    if p.case.op != "backward":
        return forward
    saved = [statistics(x.astype(np.float32, copy=False)) for x in p.x]
    return backward


def _torch(p: Problem) -> dict[str, Callable[[int], Any]]:
    """PyTorch's cuDNN and native kernels on the same memory; none where PyTorch is missing or sees no GPU.

    CuPy and PyTorch both run on the default stream unless told otherwise, so CuPy's events time PyTorch's kernels too.
    """
    torch = peers.torch
    if torch is None or not torch.cuda.is_available():
        return {}
    return torch_runs(torch, p)


def torch_runs(torch: Any, p: Problem) -> dict[str, Callable[[int], Any]]:
    """The contenders of PyTorch, apart from whether it sees a GPU."""
    last, case = p.case.layout == "channels-last", p.case

    def seen(a: Any) -> Any:
        """N, C, *spatial; for channels last PyTorch's own memory format."""
        t = torch.from_dlpack(a)
        return t.movedim(-1, 1) if last else t

    def stored(t: Any) -> Any:
        return p.xp.from_dlpack((t.movedim(1, -1) if last else t).contiguous())

    xs, dys = [seen(x) for x in p.x], [seen(dy) for dy in p.dy]
    gamma, beta, mean, var, rmean, rvar = (
        torch.from_dlpack(v) for v in (p.gamma, p.beta, p.mean, p.var, p.running_mean.copy(), p.running_var.copy())
    )
    given = (mean, var) if case.op == "inference" else (rmean, rvar)
    training = case.op != "inference"
    found: dict[str, Callable[[int], Any]] = {}
    native, native_backward = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward
    saved = [native(x, gamma, beta, None, None, True, MOMENTUM, EPS)[1:] for x in xs] if case.op == "backward" else []
    if case.op == "backward":
        wanted = [True, True, True]
        found["native"] = lambda i: native_backward(dys[i], xs[i], gamma, None, None, *saved[i], True, EPS, wanted)[0]
    else:
        found["native"] = lambda i: native(xs[i], gamma, beta, *given, training, MOMENTUM, EPS)[0]
    if xs[0].is_cuda and torch.backends.cudnn.is_available():
        cudnn, cudnn_backward = torch.cudnn_batch_norm, torch.ops.aten.cudnn_batch_norm_backward
        if case.op == "backward":
            kept = [cudnn(x, gamma, beta, None, None, True, MOMENTUM, EPS) for x in xs]
            found["cudnn"] = lambda i: cudnn_backward(xs[i], dys[i], gamma, None, None, *kept[i][1:3], EPS, kept[i][3])[0]
        else:
            found["cudnn"] = lambda i: cudnn(xs[i], gamma, beta, *given, training, MOMENTUM, EPS)[0]
    return {name: _Stored(run, stored) for name, run in found.items()}


class _Stored:
    """A run of PyTorch: timed as it is, `result` brings what it returns into storage order for the check."""

    def __init__(self, run: Callable[[int], Any], stored: Callable[[Any], Any]) -> None:
        self.timed, self.stored = run, stored

    def __call__(self, i: int) -> Any:
        return self.stored(self.timed(i))


def timed(contender: Contender) -> Callable[[int], Any]:
    """What of a contender is timed: without what only the check needs."""
    return contender.run.timed if isinstance(contender.run, _Stored) else contender.run
