"""Backward kernels for columns: a matrix whose columns belong to channels. Twin: kernels/cuda/columns_backward.py.

The layouts and the strips are those of columns.py, the formulas those of planes_backward.py. `reduce_columns` and `apply_columns`
sweep everything once each; `backward_columns` takes short planes, or few rows, strip by strip, so that the second sweep reads the cache.
"""

from fastbn.kernels.cpu.channels import COEF_A, COEF_B, MEAN, finish_channels_backward
from fastbn.kernels.cpu.columns import constant_row
from fastbn.kernels.cpu.gradients import add_products, apply, apply_masked, close_sums, gradient, gradient_masked, open_sums
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    constant_term,
    deviation,
    fence,
    first_lanes,
    lanes64_unless,
    lanes_to_boundary,
    load,
    load_like,
    load_masked,
    load_masked_like,
    moved,
    needs_two_words,
    prefetch,
    read,
    rounded,
    row,
    splat,
    store,
    vectors,
)
from fastbn.kernels.cpu.strips import (
    clear,
    copy,
    largest_over_columns,
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

# Rows of a thread's scratch: constants and accumulators by column.
MEAN_ROW, LOW_ROW, DY_ROW, DY_XMU_ROW, LARGEST_ROW, FARTHEST_ROW = range(6)
A_ROW, B_ROW, C_ROW, TEMPORARY_ROW = range(2, 6)

# ------------------------------------------------------------------------------------------------------------------ sums


@inline
def mask_row(mask, r, column):
    """Strips start at a multiple of 16 columns, so at a word of the row's mask."""
    return row(mask, r, column >> 4)


@inline
def reduce_tile(x, dy, weight, mask, lanes32, first, last, column, width, scratch, distance):
    """Add rows first..last of a strip, TILE at most, to its sums; prefetch `distance` values on."""
    lanes = lanes64_unless(lanes32)
    means, lows = vectors(scratch, MEAN_ROW), vectors(scratch, LOW_ROW)
    sums, products = vectors(scratch, DY_ROW), vectors(scratch, DY_XMU_ROW)
    most = constant_row(scratch, LARGEST_ROW, lanes)
    nothing = rounded(splat(0.0), lanes)  # the largest x - mean, which only float32 data's dx depends on: here lanes are float32 for halves
    for j in range(0, width, LANES):
        mean, low = rounded(load(means, j), lanes), rounded(load(lows, j), lanes)
        total = (load(sums, j), load(products, j), read(most, j, lanes), nothing)
        acc = open_sums(total, mean)
        if j + LANES <= width:
            for r in range(first, last):
                xp, dyp = row(x, r, column), row(dy, r, column)
                prefetch(xp, j + distance)
                prefetch(dyp, j + distance)
                g = gradient(dyp, mask_row(mask, r, column), j, mean)
                acc = add_products(xp, acc, g, deviation(xp, load_like(xp, j, mean), mean, low), weight)
        else:
            n = width - j
            for r in range(first, last):
                xp = row(x, r, column)
                g = gradient_masked(row(dy, r, column), mask_row(mask, r, column), j, n, mean)
                xmu = first_lanes(deviation(xp, load_masked_like(xp, j, n, mean), mean, low), n)
                acc = add_products(xp, acc, g, xmu, weight)
        total = close_sums(total, acc)
        store(sums, j, total[0])
        store(products, j, total[1])
        if lanes32 is not None:
            store(most, j, total[2])


@inline
def reduce_block(x, dy, weight, mask, lanes32, first, last, tail_columns, strip, shape, table, scratch, partial, block):
    """Both sums, and the largest values, of rows first..last of a strip and `tail_columns` columns of row `last`, as a block of partial."""
    S = shape.S
    c0, channels, column, width = strip_of(strip, shape)
    for k in range(2 if needs_two_words(x) else 1):  # MEAN, LOW
        spread_to_columns(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), c0), channels, S, width)
    clear(vectors(scratch, DY_ROW), width)
    clear(vectors(scratch, DY_XMU_ROW), width)
    lanes = lanes64_unless(lanes32)
    most, farthest = constant_row(scratch, LARGEST_ROW, lanes), constant_row(scratch, FARTHEST_ROW, lanes)
    if lanes32 is not None:
        clear(most, width)
        clear(farthest, width)
    distance = prefetch_distance(x, width)
    r, end = first, last + (tail_columns > 0)
    while r < end:
        stop = next_tile(r, last)
        here = tail_columns if r == last else width
        reduce_tile(x, dy, weight, mask, lanes32, r, stop, column, here, scratch, prefetch_distance_at(x, width, stop, last, distance))
        r = stop
    sum_over_columns(vectors(scratch, DY_ROW), channels, S, width)
    sum_over_columns(vectors(scratch, DY_XMU_ROW), channels, S, width)
    if lanes32 is not None:
        largest_over_columns(most, channels, S, width)
    copy(vectors(partial[block], 0), c0, vectors(scratch, DY_ROW), channels)
    copy(vectors(partial[block], 1), c0, vectors(scratch, DY_XMU_ROW), channels)
    if lanes32 is not None:
        copy(vectors(partial[block], 2), c0, most, channels)
        copy(vectors(partial[block], 3), c0, farthest, channels)  # zeros


def reduce_columns(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """Both sums of tasks first..last, and the largest values, into partial; task = block * strips + strip."""
    x, dy, _, _, weight, mask = gradients
    _, lanes32 = options
    R, block = shape.rows, shape.block
    strips = strips_of(shape)
    blocks = shape.blocks
    for task in range(first, last):
        b, strip = task // strips, task % strips
        r0, r1 = b * block, min((b + 1) * block, R)
        more = shape.tail_columns if b == blocks - 1 else 0
        reduce_block(x, dy, weight, mask, lanes32, r0, r1, more, strip, shape, table, scratch[thread], partial, b)
    return 0


# -------------------------------------------------------------------------------------------------------------------- dx


@inline
def spread_coefficients(x, table, grads, scratch, first, channels, S, width, lanes32):
    """The numbers of `slope` by column, for the channels from `first` on; means only where x needs them, as `deviation_if_float64` says."""
    lanes = lanes64_unless(lanes32)
    means = moved(vectors(table, MEAN), first)
    if lanes32 is not None:
        spread_to_columns(constant_row(scratch, MEAN_ROW, lanes), means, channels, S, width)
    for k in range(2 if needs_two_words(x) else 0):  # MEAN, LOW
        spread_to_columns(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), first), channels, S, width)
    for k in range(min(3, grads.shape[0])):  # not unrolled, as in `expand_constants`: COEF_A, COEF_B, COEF_C
        values = moved(vectors(grads, COEF_A + k), first)
        if A_ROW + k == C_ROW:
            slopes, constants = moved(vectors(grads, COEF_B), first), values
            values = vectors(scratch, TEMPORARY_ROW)
            for c in range(0, channels, LANES):
                n = min(LANES, channels - c)
                constant, b, mean = load_masked(constants, c, n), load_masked(slopes, c, n), load_masked(means, c, n)
                store(values, c, constant_term(row(x, 0, 0), constant, b, mean, lanes32))
        spread_to_columns(constant_row(scratch, A_ROW + k, lanes), values, channels, S, width)


@inline
def coefficients_at(rows, j, lanes):
    """The coefficients of columns j..j+16."""
    means, lows, a, b, c = rows
    return read(means, j, lanes), read(lows, j, lanes), read(a, j, lanes), read(b, j, lanes), read(c, j, lanes)


@inline
def apply_row(xp, dyp, dxp, drp, mp, weight, r, frozen, lanes, head, width, S, rows, streamed, x_ahead, dy_ahead):
    """Row r of a strip; the first `head` columns come before the boundary that streaming needs."""
    j = position = 0
    if head > 0:
        apply_masked(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, head, coefficients_at(rows, j, lanes))
        j = head
        position = next_position(weight, position, head, S)
    while j + LANES <= width:
        prefetch(x_ahead, j)
        prefetch(dy_ahead, j)
        apply(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, coefficients_at(rows, j, lanes), streamed)
        j += LANES
        position = next_position(weight, position, LANES, S)
    if j < width:
        apply_masked(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, width - j, coefficients_at(rows, j, lanes))


@inline
def apply_rows(x, dy, dx, dresidual, weight, mask, frozen, lanes32, first, last, tail_columns, column, width, S, scratch, streamed, cached):
    """Rows first..last of a strip, and the `tail_columns` columns of row `last`, as memory lies; `cached` as in `normalise_rows`."""
    boundary = min(lanes_to_boundary(row(dx, first, column)), width) if streamed else 0
    lanes = lanes64_unless(lanes32)
    means, lows = constant_row(scratch, MEAN_ROW, lanes), constant_row(scratch, LOW_ROW, lanes)
    rows = (means, lows, constant_row(scratch, A_ROW, lanes), constant_row(scratch, B_ROW, lanes), constant_row(scratch, C_ROW, lanes))
    for r in range(first, last + (tail_columns > 0)):
        here, head, around = (tail_columns, 0, False) if r == last else (width, boundary, streamed)
        xp, dyp, dxp, drp = row(x, r, column), row(dy, r, column), row(dx, r, column), row(dresidual, r, column)
        x_ahead, dy_ahead = prefetch_row(x, r, column, width, cached), prefetch_row(dy, r, column, width, cached)
        mp = mask_row(mask, r, column)
        apply_row(xp, dyp, dxp, drp, mp, weight, r, frozen, lanes, head, here, S, rows, around, x_ahead, dy_ahead)


def apply_columns(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """dx and dresidual from the rows COEF_A to COEF_C of grads; parts from the last row to the first, as in the forward."""
    x, dy, dx, dresidual, weight, mask = gradients
    frozen, lanes32 = options
    R, S, part_rows, streamed = shape.rows, shape.S, shape.part, numbers.streamed
    strips = strips_of(shape)
    parts = max(1, (R + part_rows - 1) // part_rows)
    mine = scratch[thread]
    spread = -1  # the strip whose coefficients are there
    for task in range(first, last):
        part, strip = parts - 1 - task // strips, task % strips
        r0, r1 = part * part_rows, min((part + 1) * part_rows, R)
        more = shape.tail_columns if part == parts - 1 else 0
        c0, channels, column, width = strip_of(strip, shape)
        if strip != spread:
            spread_coefficients(x, table, grads, mine, c0, channels, S, width, lanes32)
            spread = strip
        apply_rows(x, dy, dx, dresidual, weight, mask, frozen, lanes32, r0, r1, more, column, width, S, mine, streamed, False)
    if streamed:
        fence()
    return 0


@inline
def reduce_strip(gradients, channels, lanes32, strip, shape, table, grads, count, partial, scratch):
    """From the sums of a strip to its coefficients; how many of its channels do not suit float32 sums."""
    x, dy, _, _, weight, mask = gradients
    R, block, blocks = shape.rows, shape.block, shape.blocks
    for b in range(blocks):
        r0, r1 = b * block, min((b + 1) * block, R)
        more = shape.tail_columns if b == blocks - 1 else 0
        reduce_block(x, dy, weight, mask, lanes32, r0, r1, more, strip, shape, table, scratch, partial, b)
    c0, channels_here, _, _ = strip_of(strip, shape)
    return finish_channels_backward(table, grads, channels, partial, c0, c0 + channels_here, blocks, count, False, lanes32)


@inline
def apply_strip(gradients, lanes32, strip, shape, table, grads, scratch, streamed):
    """dx of a strip out of the cache. While it is streamed out, the next strip is prefetched."""
    x, dy, dx, dresidual, weight, mask = gradients
    R, S, tail = shape.rows, shape.S, shape.tail_columns
    c0, channels, column, width = strip_of(strip, shape)
    spread_coefficients(x, table, grads, scratch, c0, channels, S, width, lanes32)
    apply_rows(x, dy, dx, dresidual, weight, mask, None, lanes32, 0, R, tail, column, width, S, scratch, streamed, True)


@inline
def strip_again(gradients, channels, left_out, strip, shape, table, grads, count, partial, scratch, streamed, lanes32):
    """Sums and dx of a strip in float64 lanes, where float32 sums do not suit it; whether that was so.

    A helper, as Numba drops the branches of an argument that is None, not those of a part of an argument.
    """
    if lanes32 is not None:  # noqa: SIM102
        if left_out:
            reduce_strip(gradients, channels, None, strip, shape, table, grads, count, partial, scratch)
            apply_strip(gradients, None, strip, shape, table, grads, scratch, streamed)
            return True
    return False


def backward_columns(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """Training backward of strips first..last: sums from memory, then dx out of the cache.

    A strip with a channel that does not suit float32 sums is reduced again, and written, in float64 lanes.
    """
    lanes32, streamed, own = options.lanes32, numbers.streamed, scratch[thread]
    for strip in range(first, last):
        left_out = reduce_strip(gradients, channels, lanes32, strip, shape, table, grads, numbers.count, partial, own)
        if not strip_again(gradients, channels, left_out, strip, shape, table, grads, numbers.count, partial, own, streamed, lanes32):
            apply_strip(gradients, lanes32, strip, shape, table, grads, own, streamed)
    if streamed:
        fence()
    return 0
