"""The training loop: mini-batch SGD, a progress bar an epoch, and a clock on every layer."""

import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from lenet.device import synchronise
from lenet.layers import softmax_cross_entropy
from lenet.network import lenet

EVALUATION_BATCH = 1000  # bounds the memory that im2col takes


@dataclass(frozen=True)
class Epoch:
    """What is known after one pass over the training images.

    `loss` is the mean over the pass's batches, taken while the weights move; `accuracy` is that of the test images
    after it, in [0, 1]; `seconds` are those of the training pass without the test, `normalisation` the part of them
    spent in BatchNorm's forward and backward.
    """

    loss: float
    accuracy: float
    seconds: float
    normalisation: float


def train(xp, data, *, batch_norm, seed, epochs, lr, batch_size, progress=True):
    """Train one LeNet; the weights it starts from and the order of the images depend on the seed alone.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    data : Dataset
        In xp's memory; see `Dataset.on`.
    batch_norm : bool
    seed, epochs : int
    lr : float
    batch_size : int
        At most the number of training images. A rest that fills no batch is left out of the epoch, a different one
        each time.
    progress : bool
        Show the bars. Each is erased when its epoch ends; the last stays.

    Returns
    -------
    list of Epoch
    """
    network = lenet(xp, data.side, data.classes, batch_norm=batch_norm, seed=seed)
    shuffle = np.random.default_rng([seed, 1])  # not the stream that the weights come from
    title = f"seed {seed}, {'with' if batch_norm else 'without'} BatchNorm"
    history = []
    for epoch in range(1, epochs + 1):
        batches = xp.asarray(epoch_batches(shuffle, len(data.train_labels), batch_size))
        network.train()
        network.seconds.clear()
        total = xp.zeros(())
        start = time.perf_counter()
        bar = tqdm(batches, f"{title}, epoch {epoch}/{epochs}", leave=epoch == epochs, unit="batch", disable=not progress)
        for batch in bar:
            loss, dscores = softmax_cross_entropy(xp, network(data.train_images[batch]), data.train_labels[batch])
            network.backward(dscores)
            network.step(lr)
            total += loss
        synchronise(xp)
        seconds, normalisation = time.perf_counter() - start, network.seconds["BatchNorm"]
        accuracy = evaluate(network.eval(), data.test_images, data.test_labels)
        history.append(Epoch(float(total) / len(batches), accuracy, seconds, normalisation))
    return history


def epoch_batches(rng, n, batch_size):
    """Indices of one epoch's batches, shuffled: (n // batch_size, batch_size)."""
    count = n // batch_size
    return rng.permutation(n)[: count * batch_size].reshape(count, batch_size)


def evaluate(network, images, labels):
    """Share of the images whose largest score is that of their label."""
    right = 0
    for start in range(0, len(labels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        right += int((network(images[part]).argmax(1) == labels[part]).sum())
    return right / len(labels)


def first_call(xp, data, batch_size):
    """Seconds of one step and one evaluation with BatchNorm on a network that is then dropped.

    Numba compiles a kernel when it is first called (and keeps it on disk for the next run); done here, no epoch's time
    includes it.
    """
    start = time.perf_counter()
    network = lenet(xp, data.side, data.classes, batch_norm=True, seed=0)
    images, labels = data.train_images[:batch_size], data.train_labels[:batch_size]
    network.backward(softmax_cross_entropy(xp, network(images), labels)[1])
    network.eval()(images)
    synchronise(xp)
    return time.perf_counter() - start
