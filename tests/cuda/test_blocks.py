"""Pieces of the kernels on the CUDA simulator: sums of a block, the last block, half types, aligned accesses."""

import numpy as np
import pytest
from numba import float32, int32

from fastbn.kernels.cuda import blocks, vectors
from fastbn.kernels.cuda.target import WARP, cuda, kernel

SCRATCH = blocks.SCRATCH


@pytest.mark.parametrize("threads", [WARP, 2 * WARP, 3 * WARP, 4 * WARP])
def test_block_sums_add_a_tree(threads):
    def sums(values, out):
        scratch = cuda.shared.array(SCRATCH, float32)
        t = cuda.threadIdx.x
        # Twice: the second use of scratch may not disturb readers of the first.
        a, b = blocks.block_sums(values[t], values[t] * values[t], scratch)
        c, d = blocks.block_sums(a, b, scratch)
        out[4 * t], out[4 * t + 1], out[4 * t + 2], out[4 * t + 3] = a, b, c, d

    values = np.arange(1, threads + 1, dtype=np.float32)
    out = np.zeros(4 * threads, np.float32)
    kernel(sums, None, threads)[1, threads](values, out)
    s, q = values.sum(), (values**2).sum()  # small integers: exact in float32
    assert (out.reshape(threads, 4) == [s, q, threads * s, threads * q]).all()


def test_the_last_block_sees_all_partials_and_resets_the_counter():
    def last(partials, counters, out):
        ticket = cuda.shared.array(1, int32)
        block = cuda.blockIdx.x
        if cuda.threadIdx.x == 0:
            partials[block] = block + 1
        if blocks.is_last_block(counters, block // 3, 3, ticket) and cuda.threadIdx.x == 0:
            group = block // 3
            out[group] = partials[3 * group] + partials[3 * group + 1] + partials[3 * group + 2]

    partials, counters, out = np.zeros(6, np.float32), np.zeros(2, np.int32), np.zeros(2, np.float32)
    for _ in range(2):
        out[:] = 0
        kernel(last, None, WARP)[6, WARP](partials, counters, out)
        assert out.tolist() == [6.0, 15.0]
        assert counters.tolist() == [0, 0]


def test_division_without_int64():
    for a, b in [(0, 1), (7, 3), (2**32 - 1, 7), (5, 2**31)]:
        assert blocks.divide(a, b) == divmod(a, b)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_round_to_nearest_even_and_back(name):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 100, 4096).astype(np.float32)
    ties = (rng.integers(0x3F80, 0x4080, 256).astype(np.uint32) << 16 | 0x8000).view(np.float32)  # halfway for bfloat16
    values = np.concatenate([values, ties, np.float32([0, -0.0, 1e-7, 6e4, np.inf, -np.inf])])
    load, store = vectors.access(vectors.KINDS[name], 1)
    if name == "float16":
        wanted = values.astype(np.float16).astype(np.float32)
    else:
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is the reference for bfloat16")
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    word, tile = np.zeros(1, np.uint16), np.zeros(1, np.float32)
    for value, want in zip(values, wanted, strict=True):
        tile[0] = value
        store(word, 0, tile, 0)
        load(word, 0, tile, 0)
        assert tile[0].tobytes() == want.tobytes()
    tile[0] = np.nan
    store(word, 0, tile, 0)
    load(word, 0, tile, 0)
    assert np.isnan(tile[0])


def test_vector_accesses_refuse_what_a_gpu_would_fault_on():
    load, store = vectors.access(vectors.KINDS["float32"], 4)
    x, tile = np.arange(8, dtype=np.float32), np.zeros(4, np.float32)
    load(x, 4, tile, 0)
    assert tile.tolist() == [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match="unaligned"):
        load(x, 2, tile, 0)
    with pytest.raises(RuntimeError, match="unaligned"):
        store(x, 1, tile, 0)
    with pytest.raises(ValueError, match="1 or 4"):
        vectors.access(vectors.KINDS["float32"], 2)
