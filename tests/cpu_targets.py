"""Forward and backward on one x of each dtype and family, saved to the file named on the command line.

test_simd.py runs it under other processors' instruction sets, which Numba takes from the environment at import.
"""

import sys

import numpy as np

import fastbn

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

SHAPES = {"planes": (8, 9, 17, 17), "columns": (40, 37), "short planes": (9, 20, 3, 3)}


def results():
    """A dict of arrays: y, dx, dgamma of every case."""
    rng = np.random.default_rng(0)
    found = {}
    for dtype in [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), *BFLOAT16]:
        for name, shape in SHAPES.items():
            if dtype != np.float32 and name != "planes":
                continue  # what differs between dtypes is how they are loaded and stored, the same in all families
            x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
            gamma = np.linspace(-1, 2, shape[1])
            y, ctx = fastbn.batch_norm_forward(x, gamma, residual=residual, activation="relu")
            dx, dgamma, _, _ = fastbn.batch_norm_backward(dy, ctx)
            for kind, a in (("y", y), ("dx", dx), ("dgamma", dgamma)):
                found[f"{dtype} {name} {kind}"] = a.astype(np.float64)
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
