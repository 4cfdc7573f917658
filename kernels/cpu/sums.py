"""Moments in the making: sums in registers, kept in a row of scratch from plane to plane, merged block by block."""

from fastbn.kernels.cpu.channels import merge, moments_of_sums
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import LANES, bits_above_zero, load, only, splat, store, sum_lanes, vectors

# Columns of a scratch row: three vectors of accumulators, the last for the backward alone, then scalars.
SUM, SQUARE, LARGEST = 0, LANES, 2 * LANES
SHIFT, COUNT, AVERAGE, M2 = range(3 * LANES, 3 * LANES + 4)


@inline
def add_value(sums, e, w):
    """Add sixteen deviations e to (sum, sum of squares). Where the weight is 0, e may be NaN."""
    s, q = sums
    if w is None:
        return s + e, q + e * e
    e = only(e, bits_above_zero(w))
    we = w * e
    return s + we, q + we * e


@inline
def open_channel(scratch, row, shift):
    """Start a channel: nothing gathered yet."""
    zero = splat(0.0)
    save_sums(scratch, row, (zero, zero))
    scratch[row, SHIFT] = shift
    scratch[row, COUNT] = 0.0
    scratch[row, AVERAGE] = 0.0
    scratch[row, M2] = 0.0


@inline
def load_sums(scratch, row):
    at = vectors(scratch, row)
    return load(at, SUM), load(at, SQUARE)


@inline
def save_sums(scratch, row, sums):
    at = vectors(scratch, row)
    store(at, SUM, sums[0])
    store(at, SQUARE, sums[1])


@inline
def block_moments(sums, count):
    """Mean (relative to the shift) and M2 of the `count` values that `sums` gathered."""
    return moments_of_sums(sum_lanes(sums[0]), sum_lanes(sums[1]), count)


@inline
def close_block(scratch, row, count, d, m2):
    """Merge a block, whose mean is SHIFT + d, into the channel and start the next."""
    if count > 0.0:
        n, d, m2 = merge(scratch[row, COUNT], scratch[row, AVERAGE], scratch[row, M2], count, d, m2)
        scratch[row, COUNT], scratch[row, AVERAGE], scratch[row, M2] = n, d, m2
    zero = splat(0.0)
    save_sums(scratch, row, (zero, zero))
