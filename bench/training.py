"""A whole step of training, and the share of batch normalisation in it: python training.py [--batch-size 64] [--steps 100] [--threads N]

The LeNet of `make demo` on images of 28x28, three times: without normalisation, with naive NumPy's, with fastbn's. The nets take turns, a
step each, on the same images. A step is forward, loss, backward and SGD. NumPy's matrix products have as many threads as fastbn.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers
from contenders import EPS, MOMENTUM
from threadpoolctl import threadpool_limits
from timing import no_collection, readable_time

import fastbn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lenet.layers import Layer, softmax_cross_entropy
from lenet.network import lenet

SIDE, CLASSES, LR = 28, 10, 0.1


class NaiveBatchNorm(Layer):
    """Naive NumPy's formulas (`peers.py`) as a layer."""

    def __init__(self, channels: int) -> None:
        self.gamma, self.beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self.running_mean, self.running_var = np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.x = x.reshape(*x.shape[:2], -1) if x.ndim > 2 else x
        axes = (0, 2) if x.ndim > 2 else 0
        self.mean, self.var = self.x.mean(axes), self.x.var(axes)
        self.running_mean += MOMENTUM * (self.mean - self.running_mean)
        self.running_var += MOMENTUM * (self.var - self.running_var)
        return peers.numpy_normalise(self.x, self.gamma, self.beta, self.mean, self.var, EPS).reshape(x.shape)

    def backward(self, dy: np.ndarray) -> np.ndarray:
        dx, self.dgamma, self.dbeta = peers.numpy_backward(dy.reshape(self.x.shape), self.x, self.gamma, self.mean, self.var, EPS)
        return dx.reshape(dy.shape)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"gamma": self.gamma, "beta": self.beta}

    def gradients(self) -> dict[str, np.ndarray]:
        return {"gamma": self.dgamma, "beta": self.dbeta}


def nets() -> dict[str, Any]:
    """The three, with the same weights."""
    found = {name: lenet(np, SIDE, CLASSES, batch_norm=name != "none", seed=0) for name in ("none", "naive NumPy", "fastbn")}
    layers = found["naive NumPy"].layers
    layers[:] = [NaiveBatchNorm(layer.num_features) if isinstance(layer, fastbn.BatchNorm) else layer for layer in layers]
    return found


def step(net: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """The loss of a step."""
    loss, gradient = softmax_cross_entropy(np, net(images), labels)
    net.backward(gradient)
    net.step(LR)
    return float(loss)


def measure(batch_size: int, steps: int) -> list[dict]:
    """Median seconds of a step and in normalisation, and the last loss; naive NumPy and fastbn have to agree on that."""
    rng = np.random.default_rng(0)
    batches = [(rng.random((batch_size, 1, SIDE, SIDE), np.float32), rng.integers(0, CLASSES, batch_size)) for _ in range(8)]
    found = nets()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    losses = {}
    with no_collection():
        for k in range(steps):
            for name, net in found.items():
                net.seconds.clear()
                begin = time.perf_counter()
                losses[name] = step(net, *batches[k % len(batches)])
                times[name].append((time.perf_counter() - begin, net.seconds["BatchNorm"] + net.seconds["NaiveBatchNorm"]))
    np.testing.assert_allclose(losses["fastbn"], losses["naive NumPy"], rtol=1e-2)
    return [
        {"net": name, "step": (medians := np.median(times[name][steps // 4 :], axis=0))[0], "normalising": medians[1], "loss": losses[name]}
        for name in found
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=fastbn.get_num_threads())
    args = parser.parse_args(argv)
    fastbn.set_num_threads(args.threads)
    with threadpool_limits(args.threads, user_api="blas"):
        rows = measure(args.batch_size, args.steps)
    for row in rows:
        share = f"{100 * row['normalising'] / row['step']:.0f} % of it in normalisation"
        print(f"{row['net']:>12}: a step {readable_time(row['step'])}, {share}")


if __name__ == "__main__":
    main()
