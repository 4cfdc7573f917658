"""What the forward and the backward of columns share: strips of channels, constants and sums by column, tiles and prefetches."""

from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.planes import PREFETCH
from fastbn.kernels.cpu.simd import (
    LANES,
    by_row,
    get,
    largest,
    largest_lane,
    load,
    load_masked,
    moved,
    put,
    read_masked,
    rounded,
    row,
    row_stride,
    splat,
    store,
    store_masked,
    sum_lanes,
)

# Rows in flight. 1 leaves the memory idle (1.6 to 3 times the time of a copy where 8 takes 1.1 to 1.3), 16 is no better.
TILE = 8
# Values between a load and the prefetch of what comes: the hardware's own prefetcher loses the thread when eight rows of 1 or 2 KB
# are read side by side (3 times the time without).
AHEAD = 4096


@inline
def strips_of(shape):
    """How many strips there are."""
    return (shape.C + shape.group - 1) // shape.group


@inline
def strip_of(strip, shape):
    """First channel, number of channels, first column and width of a strip."""
    first = strip * shape.group
    channels = min(shape.group, shape.C - first)
    return first, channels, first * shape.S, channels * shape.S * shape.folded


@inline
def spread(p, j, value, S):
    """p[j:j+S] = value. Whole vectors: what they write behind is written again by the next channel, or is padding."""
    v = splat(value)
    for s in range(0, S, LANES):
        store(p, j + s, v)


@inline
def spread_to_columns(p, values, channels, S, width):
    """p[j] = values[channel of column j]."""
    if S == 1:  # whole vectors at a time: at (64, 128) one by one took half of the call's time in kernels
        for start in range(0, width, channels):
            for c in range(0, channels, LANES):
                store(p, start + c, load_masked(values, c, min(channels - c, LANES)))
    else:
        for start in range(0, width, channels * S):
            for c in range(channels):
                spread(p, start + c * S, get(values, c), S)


@inline
def sum_over_columns(p, channels, S, width):
    """p[c] = sum of p[j] over the columns of channel c, in an order that depends on the shape alone."""
    if S == 1:
        for c in range(0, channels, LANES):
            n = min(channels - c, LANES)
            sums = load_masked(p, c, n)
            for start in range(channels, width, channels):
                sums += load_masked(p, start + c, n)
            store_masked(p, c, sums, n)
    else:
        for c in range(channels):
            sums = splat(0.0)
            for start in range(c * S, width, channels * S):
                for s in range(0, S, LANES):
                    sums += load_masked(p, start + s, min(S - s, LANES))
            put(p, c, sum_lanes(sums))  # column c was read before, or is column c of this channel


@inline
def largest_over_columns(p, channels, S, width):
    """p[c] = largest of p[j] over the columns of channel c; p holds magnitudes, in float32."""
    if S == 1:
        for c in range(0, channels, LANES):
            n = min(channels - c, LANES)
            most = read_masked(p, c, n, None)
            for start in range(channels, width, channels):
                most = largest(most, read_masked(p, start + c, n, None))
            store_masked(p, c, most, n)
    else:
        for c in range(channels):
            most = rounded(splat(0.0), None)
            for start in range(c * S, width, channels * S):
                for s in range(0, S, LANES):
                    most = largest(most, read_masked(p, start + s, min(S - s, LANES), None))
            put(p, c, largest_lane(most))


@inline
def clear(p, width):
    """p[:width] = 0, in whole vectors."""
    for j in range(0, width, LANES):
        store(p, j, splat(0.0))


@inline
def copy(p, first, values, channels):
    """p[first:first+channels] = values[:channels]."""
    for c in range(0, channels, LANES):
        n = min(LANES, channels - c)
        store_masked(p, first + c, load_masked(values, c, n), n)


@inline
def next_tile(r, last):
    """Where the tile that starts at row r ends; the incomplete row `last`, if there is one, is a tile of its own."""
    return r + 1 if r == last else min(r + TILE, last)


@inline
def prefetch_distance(x, width):
    """How far a sweep prefetches: the next tile, or AHEAD values where rows are short."""
    return max(TILE, AHEAD // max(width, 1)) * row_stride(x)


@inline
def prefetch_distance_at(x, width, stop, last, distance):
    """`distance` for the tile that ends at row `stop`.

    0 where it would reach behind the block's last row, and memory does not go on there.
    """
    return distance if stop + TILE <= last or row_stride(x) == width else 0


@inline
def prefetch_row(tensor, r, column, width, cached):
    """What a sweep of row after row prefetches while it is at row r of a strip.

    The next strip where this one is `cached`, what lies PREFETCH values on where rows follow each other without gaps, or the next row.
    One pointer for the row: choosing for each vector between this row and the next took as long as all the rest of apply_columns.
    """
    here = row(tensor, r, column)
    if cached:
        return moved(here, width)
    return moved(here, PREFETCH) if row_stride(tensor) == width else row(tensor, r + 1, column)


@inline
def weight_vector(weight, r, k):
    """The weights of sixteen columns of row r, of which the first is position k: those of S positions, over and over.

    A row of weights holds S + 16 of them, so that sixteen lie side by side from every position on.
    """
    return load(row(weight, r, 0), k)


@inline
def next_position(weight, k, step, S):
    """The position of the column `step` columns behind one of position k. Nobody asks where weights have none."""
    if weight is not None and not by_row(weight):
        k += step
        k -= S if k >= S else 0  # without a branch, which would be mispredicted every few vectors
        while k >= S:  # planes of less than a vector
            k -= S
    return k
