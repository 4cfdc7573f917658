"""What the tests of `fastbn.BatchNorm` share: batches, a trained layer, and a layer's numbers as bytes.

Expected values are written out in float64 NumPy in the tests themselves.
"""

import numpy as np

from fastbn.layers import BatchNorm

# For float32: the contract's 1e-6 of max(1, |exact|), doubled because gamma, running statistics or a float32 expectation
# bring a second rounding.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def batch(seed=0, shape=(6, 3, 4, 5), dtype=np.float32):
    return np.random.default_rng(seed).normal(3.0, 2.0, shape).astype(dtype)


def trained(**options):
    """A layer with three features whose every array differs from its initial value."""
    bn = BatchNorm(3, **options)
    rng = np.random.default_rng(9)
    for p in bn.parameters().values():
        p[...] = rng.normal(size=3)
    bn(batch(1))
    return bn


def snapshot(bn):
    """All numbers a layer holds, to compare before and after."""
    arrays = (bn.gamma, bn.beta, bn.dgamma, bn.dbeta, bn.running_mean, bn.running_var)
    return [None if a is None else a.tobytes() for a in arrays], bn.num_batches_tracked, bn.training


def per_channel(x, axis=1):
    """x as float64 (C, values per channel)."""
    return np.moveaxis(x.astype(float), axis, 0).reshape(x.shape[axis], -1)
