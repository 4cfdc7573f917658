"""LeNet, with or without batch normalisation before every sigmoid."""

import time
from collections import defaultdict

import numpy as np

import fastbn
from lenet.device import synchronise
from lenet.layers import AvgPool2d, Conv2d, Dense, Flatten, Sigmoid


class Network:
    """A list of layers that runs forward, backward and one step of SGD, and counts the time each kind of layer takes.

    Attributes
    ----------
    layers : list
    seconds : dict
        Layer's class name -> seconds spent in its forward and backward passes.
    """

    def __init__(self, xp, layers):
        self.xp, self.layers = xp, layers
        self.seconds = defaultdict(float)

    def __call__(self, x):
        for layer in self.layers:
            x = self._timed(layer, layer, x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = self._timed(layer, layer.backward, dy)
        return dy

    def step(self, lr):
        """p -= lr * gradient, for every parameter."""
        for layer in self.layers:
            gradients = layer.gradients()
            for name, p in layer.parameters().items():
                p -= lr * gradients[name]

    def train(self):
        for layer in self.layers:
            layer.train()
        return self

    def eval(self):
        for layer in self.layers:
            layer.eval()
        return self

    def _timed(self, layer, function, argument):
        start = time.perf_counter()
        result = function(argument)
        synchronise(self.xp)
        self.seconds[type(layer).__name__] += time.perf_counter() - start
        return result


def lenet(xp, side, classes, *, batch_norm, seed, dtype=np.float32):
    """LeNet in the form most courses teach: two convolutions and three dense layers, average pooling, sigmoid.

    After LeCun, Bottou, Bengio & Haffner (1998), "Gradient-based learning applied to document recognition". With
    `batch_norm`, every convolution and every hidden dense layer is followed by `fastbn.BatchNorm`, before the sigmoid
    (Ioffe & Szegedy 2015, section 3.2). Those layers then have no bias of their own: the batch's mean takes it out
    again, and beta does its work. All weights start equal with and without.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    side : int
        Height and width of the images; a multiple of 4, at least 12.
    classes : int
    batch_norm : bool
    seed : int
    dtype : float32 or float64

    Returns
    -------
    Network : (N, 1, side, side) -> (N, classes)
    """
    if side % 4 or side < 12:
        raise ValueError(f"images of {side} x {side}: this LeNet needs sides that are multiples of 4 and at least 12")
    rng = np.random.default_rng(seed)
    device = "cpu" if xp is np else "cuda"
    flat = 16 * ((side // 2 - 4) // 2) ** 2
    keywords = {"dtype": dtype, "bias": not batch_norm}

    def activated(layer, outputs):
        if not batch_norm:
            return [layer, Sigmoid(xp)]
        return [layer, fastbn.BatchNorm(outputs, dtype=dtype, device=device), Sigmoid(xp)]

    return Network(
        xp,
        [
            *activated(Conv2d(xp, rng, 1, 6, kernel=5, padding=2, **keywords), 6),
            AvgPool2d(),
            *activated(Conv2d(xp, rng, 6, 16, kernel=5, **keywords), 16),
            AvgPool2d(),
            Flatten(),
            *activated(Dense(xp, rng, flat, 120, **keywords), 120),
            *activated(Dense(xp, rng, 120, 84, **keywords), 84),
            Dense(xp, rng, 84, classes, dtype=dtype),
        ],
    )
