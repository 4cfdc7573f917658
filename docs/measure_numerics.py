"""Measure the error table of numerics.md and write it there: python docs/measure_numerics.py

fastbn, PyTorch where it is installed, and the formula in NumPy, on float32 inputs that are hard for float32; against the same
formula in longdouble.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import numpy as np

import fastbn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
import reference  # noqa: E402  (the tests' oracle: plain NumPy in longdouble)

try:
    import torch
except ImportError:
    torch = None

SHAPE, GAMMA, BETA, EPS = (64, 4, 64, 64), 1.5, 0.25, 1e-5  # 262,144 values a channel
BEGIN, END = "<!-- numerics:begin -->", "<!-- numerics:end -->"


def cases() -> dict[str, np.ndarray]:
    """float32 inputs by what makes them hard."""
    n = np.random.default_rng(0).standard_normal(SHAPE)
    outlier = n.copy()
    outlier[0, :, 0, 0] = 1e5
    found = {
        "N(0, 1)": n,
        "1e4 ± 1e-2": 1e4 + 1e-2 * n,
        "1e6 ± 1": 1e6 + n,
        "first value 1e5, else N(0, 1)": outlier,
        "values of 1e25": 1e25 * n,
        "values of 1e-30": 1e-30 * n,
        "constant 1e8": np.full(SHAPE, 1e8),
        "constant 0.1": np.full(SHAPE, 0.1),
    }
    return {name: x.astype(np.float32) for name, x in found.items()}


def by_fastbn(x, dy, gamma, beta):
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, eps=EPS)
    return y, ctx.var, fastbn.batch_norm_backward(dy, ctx)[0]


def by_torch(x, dy, gamma, beta):
    channels, count = x.shape[1], x.size // x.shape[1]
    tx = torch.from_numpy(x).requires_grad_()
    running = torch.zeros(channels), torch.ones(channels)
    y = torch.nn.functional.batch_norm(
        tx, *running, torch.from_numpy(gamma), torch.from_numpy(beta), training=True, momentum=1.0, eps=EPS
    )
    y.backward(torch.from_numpy(dy))
    return y.detach().numpy(), running[1].numpy() * ((count - 1) / count), tx.grad.numpy()


def by_numpy(x, dy, gamma, beta):
    axes = (0, 2, 3)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    invstd = 1 / np.sqrt(var + np.float32(EPS))
    xhat = (x - mean) * invstd
    g, b = gamma[:, None, None], beta[:, None, None]
    inner = dy - dy.mean(axes, keepdims=True) - xhat * (dy * xhat).mean(axes, keepdims=True)
    return xhat * g + b, var.reshape(-1), g * invstd * inner


def errors(run, x, dy, gamma, beta, exact, grads) -> list[str]:
    """Largest errors: var relative; y relative to max(1, |y|); dx relative to the largest |gamma * invstd * dy| of the channel."""
    with np.errstate(all="ignore"):
        y, var, dx = run(x, dy, gamma, beta)
        scale = reference.per_channel(grads.dx_scale, x.ndim, 1)
        found = (
            np.abs(var - exact.var) / np.where(exact.var > 0, exact.var, 1),
            np.abs(y - exact.y) / np.maximum(1, np.abs(exact.y)),
            np.abs(dx - grads.dx) / scale,
        )
    return ["0" if (worst := float(np.max(e))) == 0 else f"{worst:.0e}" for e in found]


def table() -> str:
    """The Markdown table, with what it was measured on."""
    runs = {"fastbn": by_fastbn, "PyTorch": by_torch, "NumPy": by_numpy}
    packages = ["fastbn", "torch", "numpy"]
    if torch is None:
        del runs["PyTorch"]
        packages.remove("torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    head = " | ".join(f"{name}: var | y | dx" for name in runs)
    lines = [f"| float32 input | {head} |", "|---|" + "--:|--:|--:|" * len(runs)]
    gamma, beta = np.full(SHAPE[1], GAMMA, np.float32), np.full(SHAPE[1], BETA, np.float32)
    dy = np.random.default_rng(1).standard_normal(SHAPE, np.float32)
    for name, x in cases().items():
        exact = reference.forward(x, gamma, beta, eps=EPS)
        grads = reference.backward(dy, x, gamma, eps=EPS)
        cells = [cell for run in runs.values() for cell in errors(run, x, dy, gamma, beta, exact, grads)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    command = f"`python docs/measure_numerics.py` on {platform.machine()}"
    return "\n".join(lines) + f"\n\nMeasured by {command} with {versions}."


def main() -> None:
    page = HERE / "numerics.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    found = table()
    page.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
