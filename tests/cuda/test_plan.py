"""Launch plans: pure Python, no kernel."""

import doctest

import pytest

from fastbn.kernels.cuda import plan as module
from fastbn.kernels.cuda.plan import DEFAULT, Sizes, largest_block, plan, widest_block

PLANES = [(1, 1, 2), (2, 3, 49), (32, 64, 56 * 56), (32, 2048, 49), (256, 3, 224 * 224)]
COLUMNS = [(2, 1, 1), (64, 128, 1), (100352, 64, 1), (33, 21, 1)]
TINY = Sizes(threads=8, smallest=4, blocks=6, wide=2, tall=1, persistent_threads=8)


def test_examples():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("sizes", [DEFAULT, TINY], ids=["gpu", "tiny"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", PLANES + COLUMNS, ids=str)
def test_blocks_cover_the_data_once_and_none_is_empty(shape, dtype, sizes):
    N, C, S = shape
    p = plan(*shape, dtype, True, sizes)
    per_thread = module.TILE[dtype]
    if p.family == "planes":
        tiles = -(-N * S // (p.threads * per_thread))
        assert p.groups == C
        assert S % p.lanes == 0
    else:
        rows = p.threads // p.wide * (per_thread // p.lanes)
        tiles = -(-N // rows)
        assert p.groups * p.wide * p.lanes >= C > (p.groups - 1) * p.wide * p.lanes
        assert C % p.lanes == 0
    assert (p.splits - 1) * p.chunk < tiles <= p.splits * p.chunk
    assert p.words == p.groups * tiles * p.threads
    assert p.threads <= largest_block(p.family, p.lanes, dtype, sizes)  # what its kernels are compiled for: a launch of more fails
    assert p.wide <= p.widest <= widest_block(p.lanes, sizes)
    if p.held_forward:
        assert p.threads * p.held_forward >= N * S
    if p.held_backward:
        assert p.threads * p.held_backward >= N * S


def test_unaligned_data_takes_single_elements():
    assert plan(4, 8, 64, "float32", aligned=False).lanes == 1
    assert plan(4, 8, 64, "float32", aligned=True).lanes == 4
    assert plan(4, 8, 49, "float32", aligned=True).lanes == 1
    assert plan(64, 7, 1, "float16", aligned=True).lanes == 1


def test_small_channels_take_small_blocks_and_large_ones_are_split():
    assert plan(2, 512, 49, "float32", True).threads == 32
    assert plan(32, 64, 112 * 112, "float32", True).splits > 8
    assert plan(32, 1024, 14 * 14, "float32", True).held_forward > 0
    assert plan(32, 64, 56 * 56, "float32", True).held_forward == 0  # 100352 values do not fit a block


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 65536, 2), (2, 2**30 + 1, 2), (1, 2**31 - 1, 2), (2**15, 3, 2**16), (2**31 - 1, 1, 1), (2**31 - 1, 4096, 1), (2, 2**31 - 1, 1)],
    ids=str,
)
def test_large_sizes_fit_a_launch(shape, dtype):
    p = plan(*shape, dtype, True)
    assert 0 < p.blocks < 2**31  # the x axis of a grid; the others end at 65535 and are not used
    # `divide` takes numbers below 2**32: also the number of an element behind the end of a channel's last tile.
    assert shape[0] * shape[2] + p.threads * module.TILE[dtype] < 2**32


def test_each_kernel_knows_how_many_of_its_blocks_fit():
    from fastbn.kernels.cuda.variants import all_variants

    told = {(v.name, v.dtype, v.threads): v.bounds for v in all_variants() if ("weighted", True) not in v.options}
    assert told["normalise_columns", "float32", 256] == (256, 2)
    assert told["normalise_planes", "float32", 512] == (512, 1)
    assert told["apply_columns", "float64", 256] == (256, 1)
    assert all(threads == bounds[0] and threads * bounds[1] <= 512 for (_, _, threads), bounds in told.items())
