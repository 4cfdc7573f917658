"""Backward kernels for columns: a matrix whose columns belong to channels. Twin: kernels/cuda/columns_backward.py.

The layouts and the strips are those of columns.py, the formulas those of planes_backward.py. `reduce_columns` and `apply_columns`
sweep everything once each; `backward_columns` takes short planes, or few rows, strip by strip, so that the second sweep reads the cache.
"""

from fastbn.kernels.cpu.channels import COEF_A, COEF_B, MEAN, finish_blocks_backward
from fastbn.kernels.cpu.columns import constant_row
from fastbn.kernels.cpu.gradients import add_products, apply, apply_some, close_part, gradient, gradient_some, open_part
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    centre,
    fence,
    get,
    joined,
    keep,
    lanes_to_boundary,
    load,
    load_like,
    load_some,
    load_some_like,
    moved,
    prefetch,
    read,
    rounded,
    row,
    store,
    two_words,
    vectors,
    wide_unless,
)
from fastbn.kernels.cpu.strips import (
    ahead_of,
    clear,
    collapse,
    collapse_largest,
    expand,
    lead_at,
    next_position,
    next_tile,
    rows_ahead,
    strip_of,
    weight_vector,
)

# Rows of a thread's scratch: constants and accumulators by column.
MEAN_ROW, LOW_ROW, DY_ROW, DY_XMU_ROW, LARGEST_ROW = range(5)
A_ROW, B_ROW, C_ROW, TEMPORARY_ROW = range(2, 6)

# ------------------------------------------------------------------------------------------------------------------ sums


@inline
def mask_row(mask, r, column):
    """Strips start at a multiple of 16 columns, so at a word of the row's mask."""
    return row(mask, r, column >> 4)


@inline
def reduce_tile(x, dy, weight, mask, brief, first, last, column, width, scratch, lead):
    """Add rows first..last of a strip, TILE at most, to its sums; prefetch `lead` values on."""
    lanes = wide_unless(brief)
    means, lows = vectors(scratch, MEAN_ROW), vectors(scratch, LOW_ROW)
    sums, products = vectors(scratch, DY_ROW), vectors(scratch, DY_XMU_ROW)
    most = constant_row(scratch, LARGEST_ROW, lanes)
    for j in range(0, width, LANES):
        mean, low = rounded(load(means, j), lanes), rounded(load(lows, j), lanes)
        total = (load(sums, j), load(products, j), read(most, j, lanes))
        acc = open_part(total, mean)
        if j + LANES <= width:
            for r in range(first, last):
                xp, dyp = row(x, r, column), row(dy, r, column)
                prefetch(xp, j + lead)
                prefetch(dyp, j + lead)
                g = gradient(dyp, mask_row(mask, r, column), j, mean)
                acc = add_products(acc, g, centre(xp, load_like(xp, j, mean), mean, low), weight)
        else:
            n = width - j
            for r in range(first, last):
                xp = row(x, r, column)
                g = gradient_some(row(dy, r, column), mask_row(mask, r, column), j, n, mean)
                acc = add_products(acc, g, keep(centre(xp, load_some_like(xp, j, n, mean), mean, low), n), weight)
        total = close_part(total, acc)
        store(sums, j, total[0])
        store(products, j, total[1])
        if brief is not None:
            store(most, j, total[2])


@inline
def reduce_block(x, dy, weight, mask, brief, first, last, rest, strip, group, C, S, fold, table, scratch, partial, block):
    """Both sums, and the largest g, of rows first..last of a strip and the `rest` columns of row `last`, as block `block` of partial."""
    c0, channels, column, width = strip_of(strip, group, C, S, fold)
    for k in range(2 if two_words(x) else 1):  # MEAN, LOW
        expand(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), c0), channels, S, width)
    clear(vectors(scratch, DY_ROW), width)
    clear(vectors(scratch, DY_XMU_ROW), width)
    most = constant_row(scratch, LARGEST_ROW, wide_unless(brief))
    if brief is not None:
        clear(most, width)
    lead = rows_ahead(x, width)
    r, end = first, last + (rest > 0)
    while r < end:
        stop = next_tile(r, last)
        here = rest if r == last else width
        reduce_tile(x, dy, weight, mask, brief, r, stop, column, here, scratch, lead_at(x, width, stop, last, lead))
        r = stop
    collapse(vectors(scratch, DY_ROW), channels, S, width)
    collapse(vectors(scratch, DY_XMU_ROW), channels, S, width)
    if brief is not None:
        collapse_largest(most, channels, S, width)
    for c in range(channels):
        partial[c0 + c, block, 0] = get(vectors(scratch, DY_ROW), c)
        partial[c0 + c, block, 1] = get(vectors(scratch, DY_XMU_ROW), c)
        partial[c0 + c, block, 2] = 0.0 if brief is None else get(most, c)


def reduce_columns(
    thread, first, last, x, dy, weight, mask, brief, R, rest, C, S, fold, table, partial, scratch, group, rows_a_block,
):  # fmt: skip
    """Both sums of tasks first..last, and the largest g, into a row of partial; task = block * strips + strip."""
    strips = (C + group - 1) // group
    blocks = partial.shape[1]
    for task in range(first, last):
        b, strip = task // strips, task % strips
        r0, r1 = b * rows_a_block, min((b + 1) * rows_a_block, R)
        more = rest if b == blocks - 1 else 0
        reduce_block(x, dy, weight, mask, brief, r0, r1, more, strip, group, C, S, fold, table, scratch[thread], partial, b)
    return 0


# -------------------------------------------------------------------------------------------------------------------- dx


@inline
def expand_coefficients(x, table, grads, scratch, first, channels, S, width, brief):
    """The numbers of `slope` by column, for the channels from `first` on; means only where x needs them, as `apart` says."""
    lanes = wide_unless(brief)
    means = moved(vectors(table, MEAN), first)
    if brief is not None:
        expand(constant_row(scratch, MEAN_ROW, lanes), means, channels, S, width)
    for k in range(2 if two_words(x) else 0):  # MEAN, LOW
        expand(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), first), channels, S, width)
    for k in range(min(3, grads.shape[0])):  # not unrolled, as in `expand_constants`: COEF_A, COEF_B, COEF_C
        values = moved(vectors(grads, COEF_A + k), first)
        if A_ROW + k == C_ROW:
            slopes, constants = moved(vectors(grads, COEF_B), first), values
            values = vectors(scratch, TEMPORARY_ROW)
            for c in range(0, channels, LANES):
                n = min(LANES, channels - c)
                constant, b, mean = load_some(constants, c, n), load_some(slopes, c, n), load_some(means, c, n)
                store(values, c, joined(row(x, 0, 0), constant, b, mean, brief))
        expand(constant_row(scratch, A_ROW + k, lanes), values, channels, S, width)


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
        apply_some(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, head, coefficients_at(rows, j, lanes))
        j = head
        position = next_position(weight, position, head, S)
    while j + LANES <= width:
        prefetch(x_ahead, j)
        prefetch(dy_ahead, j)
        apply(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, coefficients_at(rows, j, lanes), streamed)
        j += LANES
        position = next_position(weight, position, LANES, S)
    if j < width:
        apply_some(xp, dyp, dxp, drp, mp, weight_vector(weight, r, position), frozen, j, width - j, coefficients_at(rows, j, lanes))


@inline
def apply_rows(x, dy, dx, dresidual, weight, mask, frozen, brief, first, last, rest, column, width, S, scratch, streamed, cached):
    """Rows first..last of a strip, and the `rest` columns of row `last`, as memory lies; `cached` as in `normalise_rows`."""
    boundary = min(lanes_to_boundary(row(dx, first, column)), width) if streamed else 0
    lanes = wide_unless(brief)
    means, lows = constant_row(scratch, MEAN_ROW, lanes), constant_row(scratch, LOW_ROW, lanes)
    rows = (means, lows, constant_row(scratch, A_ROW, lanes), constant_row(scratch, B_ROW, lanes), constant_row(scratch, C_ROW, lanes))
    for r in range(first, last + (rest > 0)):
        here, head, around = (rest, 0, False) if r == last else (width, boundary, streamed)
        xp, dyp, dxp, drp = row(x, r, column), row(dy, r, column), row(dx, r, column), row(dresidual, r, column)
        x_ahead, dy_ahead = ahead_of(x, r, column, width, cached), ahead_of(dy, r, column, width, cached)
        mp = mask_row(mask, r, column)
        apply_row(xp, dyp, dxp, drp, mp, weight, r, frozen, lanes, head, here, S, rows, around, x_ahead, dy_ahead)


def apply_columns(
    thread, first, last, x, dy, dx, dresidual, weight, mask, frozen, brief, R, rest, C, S, fold, table, grads, scratch, group,
    rows_a_part, streamed,
):  # fmt: skip
    """dx and dresidual from the rows COEF_A to COEF_C of grads; parts from the last row to the first, as in the forward."""
    strips = (C + group - 1) // group
    parts = max(1, (R + rows_a_part - 1) // rows_a_part)
    mine = scratch[thread]
    spread = -1  # the strip whose coefficients are there
    for task in range(first, last):
        part, strip = parts - 1 - task // strips, task % strips
        r0, r1 = part * rows_a_part, min((part + 1) * rows_a_part, R)
        more = rest if part == parts - 1 else 0
        c0, channels, column, width = strip_of(strip, group, C, S, fold)
        if strip != spread:
            expand_coefficients(x, table, grads, mine, c0, channels, S, width, brief)
            spread = strip
        apply_rows(x, dy, dx, dresidual, weight, mask, frozen, brief, r0, r1, more, column, width, S, mine, streamed, False)
    if streamed:
        fence()
    return 0


@inline
def reduce_strip(x, dy, weight, mask, brief, R, rest, strip, group, C, S, fold, table, grads, count, partial, scratch, rows_a_block):
    """From the sums of a strip to its coefficients; how many of its channels do not suit brief sums."""
    for b in range(partial.shape[1]):
        r0, r1 = b * rows_a_block, min((b + 1) * rows_a_block, R)
        more = rest if b == partial.shape[1] - 1 else 0
        reduce_block(x, dy, weight, mask, brief, r0, r1, more, strip, group, C, S, fold, table, scratch, partial, b)
    c0, channels, _, _ = strip_of(strip, group, C, S, fold)
    unfit = 0
    for c in range(c0, c0 + channels):
        unfit += finish_blocks_backward(table, grads, partial, c, count, False, brief)
    return unfit


@inline
def apply_strip(x, dy, dx, dresidual, weight, mask, brief, R, rest, strip, group, C, S, fold, table, grads, scratch, streamed):
    """dx of a strip out of the cache. While it is streamed out, the next strip is prefetched."""
    c0, channels, column, width = strip_of(strip, group, C, S, fold)
    expand_coefficients(x, table, grads, scratch, c0, channels, S, width, brief)
    apply_rows(x, dy, dx, dresidual, weight, mask, None, brief, 0, R, rest, column, width, S, scratch, streamed, True)


def backward_columns(
    thread, first, last, x, dy, dx, dresidual, weight, mask, brief, R, rest, C, S, fold, table, grads, count, partial, scratch,
    group, rows_a_block, streamed,
):  # fmt: skip
    """Training backward of strips first..last: sums from memory, then dx out of the cache.

    A strip with a channel that does not suit brief sums is reduced again, and written, in float64 lanes.
    """
    mine = scratch[thread]
    for strip in range(first, last):
        sums = (table, grads, count, partial, mine, rows_a_block)
        unfit = reduce_strip(x, dy, weight, mask, brief, R, rest, strip, group, C, S, fold, *sums)
        if brief is not None:  # noqa: SIM102  (by itself, so that Numba drops what follows where it is None)
            if unfit:
                reduce_strip(x, dy, weight, mask, None, R, rest, strip, group, C, S, fold, *sums)
                apply_strip(x, dy, dx, dresidual, weight, mask, None, R, rest, strip, group, C, S, fold, table, grads, mine, streamed)
                continue
        apply_strip(x, dy, dx, dresidual, weight, mask, brief, R, rest, strip, group, C, S, fold, table, grads, mine, streamed)
    if streamed:
        fence()
    return 0
