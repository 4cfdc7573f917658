"""Forward kernels for columns: a matrix whose columns belong to channels. Twin: kernels/cuda/columns.py.

Three layouts are one here; column j of the matrix belongs to channel (j // S) % C:

- channels last, NC: a row is one position, S = 1; narrow rows are folded f to a row, so that vectors are full;
- channels first with short planes: a row is one sample, of C planes of S values.

Versions, with what each gained on 2 threads of an AVX-512 machine, as multiples of a streaming copy's time (float32):

1. rows of the matrix, accumulators of all columns in the cache, scales by column: no tails and no horizontal sums inside;
2. tiles of rows: accumulators stay in registers for TILE rows. Statistics of 32x7x7x2048 from 3.5 to 1.2;
3. software prefetch: inference of 32x28x28x512 from 2.7 to 1.2, forward of 32x112x112x64 from 4.7 to 2.0;
4. per-channel constants spread, and sums collapsed, by vectors: forward of 32x2048x7x7 from 2.6 to 1.4;
5. streaming stores, where rows keep their alignment;
6. output row after row, as memory lies, instead of in tiles, which write lines of one memory channel in a row: inference of
   32x56x56x256 from 1.25 to 1.07;
7. output in float32 lanes, whose constants are half as many loads: forward of 32x7x7x2048 in 0.8 of the time in float64 lanes;
8. what is prefetched is chosen once a row, not once a vector: forward of 32x7x7x256, which is in the cache, in 0.85 of the time, backward
   in 0.66 (both versions in turn, a process each, minima).

Tried and lost: four vectors of a row at a time in a tile of the statistics (no faster); the next strip's x read 8 rows ahead.

`stats_columns` and `normalise_columns` sweep everything once each: channels last needs every row before any output.
`forward_columns` takes short planes, or few rows, strip by strip: moments from memory, then y out of the cache.

A tensor is a tuple (pointer, stride of a row, stride of a channel), in elements. `scratch[thread]` holds vectors by column.
"""

from fastbn.kernels.cpu.channels import ANCHOR, MEAN, SCALE, find_shifts, finish_channels, found, is_written, moments_of_sums, shift_is_far
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.planes import flush_bits, normalise, normalise_masked
from fastbn.kernels.cpu.simd import (
    LANES,
    bias,
    exact_lanes,
    fence,
    first_lanes,
    how_many,
    lanes_memory,
    lanes_to_boundary,
    load,
    load_masked,
    moved,
    needs_two_words,
    prefetch,
    prefetch_once,
    put_lanes,
    read,
    row,
    splat,
    store,
    store_masked,
    vectors,
)
from fastbn.kernels.cpu.strips import (
    clear,
    next_position,
    next_tile,
    prefetch_distance,
    prefetch_distance_at,
    prefetch_row,
    spread_to_columns,
    strip_of,
    strips_of,
    sum_over_columns,
    weight_vector,
)
from fastbn.kernels.cpu.sums import add_value, weight_of_block
from fastbn.kernels.formulas import where

# Rows of a thread's scratch: constants and accumulators by column.
SHIFT_ROW, SUM_ROW, SQUARE_ROW = range(3)
MEAN_ROW, LOW_ROW, SCALE_ROW, BIAS_ROW, TEMPORARY_ROW = range(5)


# --------------------------------------------------------------------------------------------------------------- moments


@inline
def gather_tile(x, weight, first, last, column, width, S, scratch, distance):
    """Add rows first..last of a strip to its accumulators, around its shifts; prefetch `distance` values on."""
    shifts, sums, squares = vectors(scratch, SHIFT_ROW), vectors(scratch, SUM_ROW), vectors(scratch, SQUARE_ROW)
    position = 0
    for j in range(0, width, LANES):
        k = load(shifts, j)
        acc = (load(sums, j), load(squares, j))
        if j + LANES <= width:
            for r in range(first, last):
                xp = row(x, r, column)
                prefetch(xp, j + distance)
                e = load(xp, j) - k
                acc = add_value(acc, e, weight_vector(weight, r, position))
        else:
            n = width - j
            for r in range(first, last):
                e = first_lanes(load_masked(row(x, r, column), j, n) - k, n)
                acc = add_value(acc, e, weight_vector(weight, r, position))
        store(sums, j, acc[0])
        store(squares, j, acc[1])
        position = next_position(weight, position, LANES, S)


@inline
def gather_block(x, weight, block_weights, shift_places, first, last, tail_columns, strip, shape, scratch, partial, block):
    """Moments of rows first..last of a strip, and of the `tail_columns` columns of row `last`, as block `block` of partial."""
    S = shape.S
    c0, channels, column, width = strip_of(strip, shape)
    shifts, sums, squares = vectors(scratch, SHIFT_ROW), vectors(scratch, SUM_ROW), vectors(scratch, SQUARE_ROW)
    count = weight_of_block(block_weights, block, (last - first) * shape.S * shape.folded + tail_columns // shape.C)
    averages, m2s, around = vectors(partial[block], 1), vectors(partial[block], 2), vectors(partial[block], 3)
    for c in range(c0, c0 + channels, LANES):
        n = min(LANES, c0 + channels - c)
        store_masked(vectors(partial[block], 0), c, splat(count), n)
        find_shifts(x, c, n, shift_places, around)
    distance = prefetch_distance(x, width)
    for attempt in range(2):
        spread_to_columns(shifts, moved(around, c0), channels, S, width)
        clear(sums, width)
        clear(squares, width)
        r, end = first, last + (tail_columns > 0)
        while r < end:
            stop = next_tile(r, last)
            here = tail_columns if r == last else width
            gather_tile(x, weight, r, stop, column, here, S, scratch, prefetch_distance_at(x, width, stop, last, distance))
            r = stop
        sum_over_columns(sums, channels, S, width)
        sum_over_columns(squares, channels, S, width)
        off = 0
        for c in range(0, channels, LANES):
            n = min(LANES, channels - c)
            d, m2 = moments_of_sums(exact_lanes(sums, c, n), exact_lanes(squares, c, n), count)
            put_lanes(averages, c0 + c, d, n)
            put_lanes(m2s, c0 + c, m2, n)
            if attempt == 0 and needs_two_words(x):
                far, shift = shift_is_far(count, d, m2), exact_lanes(around, c0 + c, n)
                put_lanes(around, c0 + c, where(far, shift + d, shift), n)
                off += how_many(far, n)
        if off == 0:
            break


def stats_columns(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Moments of tasks first..last; task = block * strips + strip. Each is (count, mean - shift, M2, shift)."""
    x, _, _, weight, block_weights, _ = data
    R, block, shift_places = shape.rows, shape.block, numbers.shift_places
    strips = strips_of(shape)
    blocks = shape.blocks
    for task in range(first, last):
        b, strip = task // strips, task % strips
        r0, r1 = b * block, min((b + 1) * block, R)
        more = shape.tail_columns if b == blocks - 1 else 0
        gather_block(x, weight, block_weights, shift_places, r0, r1, more, strip, shape, scratch[thread], partial, b)
    return 0


# ---------------------------------------------------------------------------------------------------------------- output


@inline
def strip_is_written(table, first, channels, lanes64, leftovers):
    """Whether a kernel is to normalise the strip: float32 lanes only where all of its channels fit them."""
    fit = True
    for c in range(first, first + channels):
        fit = fit and is_written(table, c, None, None)
    if lanes64 is None:
        return fit
    return leftovers is None or not fit


@inline
def spread_constants(table, scratch, first, channels, S, width, lanes64):
    """Mean, its second word (float64 lanes only), scale and bias by column, for the channels from `first` on."""
    # min: did LLVM know the number, it would unroll the loop and compile all of `spread_to_columns` four times.
    for k in range(min(4, table.shape[0])):  # MEAN, LOW, SCALE, BETA
        values = moved(vectors(table, ANCHOR if lanes64 is None and k == MEAN_ROW else MEAN + k), first)
        if lanes64 is None and k == BIAS_ROW:
            means, anchors = moved(vectors(table, MEAN), first), moved(vectors(table, ANCHOR), first)
            scales, betas = moved(vectors(table, SCALE), first), values
            values = vectors(scratch, TEMPORARY_ROW)
            for c in range(0, channels, LANES):
                n = min(LANES, channels - c)
                mean, anchor, scale = load_masked(means, c, n), load_masked(anchors, c, n), load_masked(scales, c, n)
                store(values, c, bias(load_masked(betas, c, n), mean, anchor, scale, lanes64))
        if lanes64 is not None or k != LOW_ROW:
            spread_to_columns(constant_row(scratch, k, lanes64), values, channels, S, width)


@inline
def constant_row(scratch, k, lanes64):
    """Row k of what `spread_constants` wrote."""
    return lanes_memory(vectors(scratch, k), lanes64)


@inline
def constants_at(rows, j, lanes64):
    """The constants of columns j..j+16."""
    means, lows, scales, biases = rows
    return read(means, j, lanes64), read(lows, j, lanes64), read(scales, j, lanes64), read(biases, j, lanes64)


@inline
def normalise_row(xp, yp, rp, mp, relu, lanes64, head, width, rows, streamed, x_ahead, r_ahead):
    """One row of a strip; the first `head` columns come before the boundary that streaming needs."""
    pending_bits = 0
    j = 0
    if head > 0:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, j, head, constants_at(rows, j, lanes64), pending_bits)
        j += head
    while j + LANES <= width:
        prefetch(x_ahead, j)
        prefetch_once(r_ahead, j)
        pending_bits = normalise(xp, yp, rp, mp, relu, lanes64, j, constants_at(rows, j, lanes64), streamed, pending_bits)
        j += LANES
    if j < width:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, j, width - j, constants_at(rows, j, lanes64), pending_bits)
    flush_bits(mp, pending_bits, width)


@inline
def normalise_rows(x, y, residual, mask, relu, lanes64, first, last, tail_columns, column, width, scratch, streamed, cached):
    """Rows first..last of a strip, and the `tail_columns` columns of row `last`.

    Where the strip's x is `cached`, the next strip's is prefetched.

    Row after row, as memory lies: two rows or eight side by side, whose constants would be loaded once for all, write lines of one
    memory channel in a row, which takes 1.25 times as long as a copy where this takes 1.08.
    """
    boundary = min(lanes_to_boundary(row(y, first, column)), width) if streamed else 0
    means, lows = constant_row(scratch, MEAN_ROW, lanes64), constant_row(scratch, LOW_ROW, lanes64)
    rows = (means, lows, constant_row(scratch, SCALE_ROW, lanes64), constant_row(scratch, BIAS_ROW, lanes64))
    for r in range(first, last + (tail_columns > 0)):
        here, head, around = (tail_columns, 0, False) if r == last else (width, boundary, streamed)
        xp, yp, rp, mp = row(x, r, column), row(y, r, column), row(residual, r, column), row(mask, r, column >> 4)
        x_ahead, r_ahead = prefetch_row(x, r, column, width, cached), prefetch_row(residual, r, column, width, False)
        normalise_row(xp, yp, rp, mp, relu, lanes64, head, here, rows, around, x_ahead, r_ahead)


def normalise_columns(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """y from the rows MEAN, LOW, SCALE and BETA of the table; task = part * strips + strip.

    Parts are taken from the last row to the first: the statistics sweep left the last rows in the cache.
    """
    x, y, residual, _, _, mask = data
    relu, lanes64, leftovers = options
    R, S, part_rows, streamed = shape.rows, shape.S, shape.part, numbers.streamed
    strips = strips_of(shape)
    parts = max(1, (R + part_rows - 1) // part_rows)
    mine = scratch[thread]
    spread = -1  # the strip whose constants are there
    for task in range(first, last):
        part, strip = parts - 1 - task // strips, task % strips
        r0, r1 = part * part_rows, min((part + 1) * part_rows, R)
        more = shape.tail_columns if part == parts - 1 else 0
        c0, channels_here, column, width = strip_of(strip, shape)
        if strip_is_written(table, c0, channels_here, lanes64, leftovers):
            if strip != spread:
                spread_constants(table, mine, c0, channels_here, S, width, lanes64)
                spread = strip
            normalise_rows(x, y, residual, mask, relu, lanes64, r0, r1, more, column, width, mine, streamed, False)
    if streamed:
        fence()
    return 0


def forward_columns(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Training forward of strips first..last: moments from memory, then y out of the cache.

    How many channels do not fit float32 lanes: if that is what their strip was normalised in, its y is to be written again.
    """
    x, y, residual, weight, block_weights, mask = data
    relu, lanes64, _ = options
    R, S, tail_columns, block = shape.rows, shape.S, shape.tail_columns, shape.block
    shift_places, streamed = numbers.shift_places, numbers.streamed
    mine = scratch[thread]
    left_out = 0
    for strip in range(first, last):
        for b in range(shape.blocks):
            r0, r1 = b * block, min((b + 1) * block, R)
            more = tail_columns if b == shape.blocks - 1 else 0
            gather_block(x, weight, block_weights, shift_places, r0, r1, more, strip, shape, mine, partial, b)
        c0, channels_here, column, width = strip_of(strip, shape)
        left_out += finish_channels(table, partial, channels, c0, c0 + channels_here, shape.blocks, numbers.eps)
        spread_constants(table, mine, c0, channels_here, S, width, lanes64)
        # While y is streamed out, the next strip is prefetched: reads and writes overlap as in a copy.
        normalise_rows(x, y, residual, mask, relu, lanes64, 0, R, tail_columns, column, width, mine, streamed, True)
    if streamed:
        fence()
    return found(left_out, lanes64)
