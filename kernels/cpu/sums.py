"""Moments in the making: sums in registers, kept in a row of scratch from plane to plane, merged block by block."""

from fastbn.kernels.cpu.channels import merge, moments_of_sums, shift_is_far
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    bits_above_zero,
    first_lanes,
    load,
    load_masked,
    needs_two_words,
    plane,
    splat,
    store,
    sum_lanes,
    vectors,
    where_bits,
)

# Columns of a scratch row: four vectors of accumulators, the last two for the backward alone.
SUM, SQUARE, LARGEST, FARTHEST = range(0, 4 * LANES, LANES)


@inline
def add_value(sums, e, w):
    """Add sixteen deviations e to (sum, sum of squares). Where the weight is 0, e may be NaN."""
    s, q = sums
    if w is None:
        return s + e, q + e * e
    e = where_bits(e, bits_above_zero(w))
    we = w * e
    return s + we, q + we * e


@inline
def open_channel(scratch, row, partial, c, shift):
    """Start channel c, whose blocks are merged into one: nothing gathered yet."""
    zero = splat(0.0)
    save_sums(scratch, row, (zero, zero))
    set_block(partial, 0, c, 0.0, 0.0, 0.0, shift)


@inline
def set_block(partial, block, c, count, average, m2, shift):
    """The moments of a block of channel c."""
    partial[block, 0, c], partial[block, 1, c], partial[block, 2, c], partial[block, 3, c] = count, average, m2, shift


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
def close_block(scratch, row, partial, c, count, d, m2):
    """Merge a block, whose mean is the shift + d, into the channel and start the next."""
    if count > 0.0:
        n, d, m2 = merge(partial[0, 0, c], partial[0, 1, c], partial[0, 2, c], count, d, m2)
        set_block(partial, 0, c, n, d, m2, partial[0, 3, c])
    zero = splat(0.0)
    save_sums(scratch, row, (zero, zero))


# ---------------------------------------------------------------------------------------------------- moments of a plane


@inline
def gather(xp, wp, j, shift, sums):
    e = load(xp, j) - shift
    return add_value(sums, e, load(wp, j))


@inline
def gather_masked(xp, wp, j, n, shift, sums):
    e = first_lanes(load_masked(xp, j, n) - shift, n)
    return add_value(sums, e, load_masked(wp, j, n))


@inline
def gather_plane(xp, wp, start, stop, shift, sums):
    """Sums of xp[start:stop] around shift."""
    k = splat(shift)
    j = start
    while j + LANES <= stop:
        sums = gather(xp, wp, j, k, sums)
        j += LANES
    if j < stop:
        sums = gather_masked(xp, wp, j, stop - j, k, sums)
    return sums


@inline
def gather_planes(x, weight, c, n_first, n_last, start, stop, shift):
    """Sums of start..stop of a channel's planes n_first..n_last around shift."""
    zero = splat(0.0)
    sums = (zero, zero)
    for n in range(n_first, n_last):
        sums = gather_plane(plane(x, n, c), plane(weight, n, 0), start, stop, shift, sums)
    return sums


@inline
def weight_of_block(block_weights, block, elements):
    """The sum of a block's weights, or how many values it has."""
    return float(elements) if block_weights is None else block_weights[block]


@inline
def end_block(x, weight, count, c, n_first, n_last, S, scratch, row, partial):
    """From the sums of the planes n_first..n_last of a channel to moments, which are merged with those of the blocks before."""
    shift = partial[0, 3, c]
    d, m2 = block_moments(load_sums(scratch, row), count)
    if needs_two_words(x) and shift_is_far(count, d, m2):
        around = shift + d
        d, m2 = block_moments(gather_planes(x, weight, c, n_first, n_last, 0, S, around), count)
        if partial[0, 0, c] == 0.0:
            partial[0, 3, c] = around
        else:
            d += around - shift
    close_block(scratch, row, partial, c, count, d, m2)
