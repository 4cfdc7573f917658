"""Backward kernels for columns: a matrix whose columns belong to channels. Twin: kernels/cuda/columns_backward.py.

The layouts and the strips are those of columns.py, the formulas those of planes_backward.py. `reduce_columns` and `apply_columns`
sweep everything once each; `backward_columns` takes short planes strip by strip, so that the second sweep reads the cache.
"""

from fastbn.kernels.channels import COEF_A, MEAN, finish_blocks_backward
from fastbn.kernels.columns import (
    clear,
    collapse,
    expand,
    expand_weights,
    lanes_at,
    next_tile,
    rows_ahead,
    strip_of,
    weight_vector,
)
from fastbn.kernels.planes_backward import add_products, apply, apply_some, gradient, gradient_some
from fastbn.kernels.simd import (
    LANES,
    centre,
    fence,
    get,
    keep,
    lanes_to_boundary,
    load,
    load_some,
    moved,
    prefetch,
    row,
    splat,
    store,
    vectors,
)
from fastbn.kernels.variants import inline

# Rows of a thread's scratch: constants and accumulators by column. The weights of a tile stand behind them.
MEAN_ROW, LOW_ROW, DY_ROW, DY_XMU_ROW = range(4)
A_ROW, B_ROW, C_ROW = range(2, 5)
WEIGHT_ROWS = 5

# ------------------------------------------------------------------------------------------------------------------ sums


@inline
def mask_row(mask, r, column):
    """Strips start at a multiple of 16 columns, so at a word of the row's mask."""
    return row(mask, r, column >> 4)


@inline
def reduce_tile(x, dy, weight, mask, first, last, column, width, scratch, lead):
    """Add rows first..last of a strip to its sums; prefetch `lead` values on."""
    means, lows = vectors(scratch, MEAN_ROW), vectors(scratch, LOW_ROW)
    sums, products = vectors(scratch, DY_ROW), vectors(scratch, DY_XMU_ROW)
    zero = splat(0.0)
    for j in range(0, width, LANES):
        mean, low = load(means, j), load(lows, j)
        acc = (load(sums, j), load(products, j), zero)
        if j + LANES <= width:
            for r in range(first, last):
                xp, dyp = row(x, r, column), row(dy, r, column)
                prefetch(xp, j + lead)
                prefetch(dyp, j + lead)
                g = gradient(dyp, mask_row(mask, r, column), j)
                acc = add_products(acc, g, centre(xp, load(xp, j), mean, low), weight)
        else:
            n = width - j
            for r in range(first, last):
                xp = row(x, r, column)
                g = gradient_some(row(dy, r, column), mask_row(mask, r, column), j, n)
                acc = add_products(acc, g, keep(centre(xp, load_some(xp, j, n), mean, low), n), weight)
        store(sums, j, acc[0])
        store(products, j, acc[1])


@inline
def reduce_block(x, dy, weight, mask, first, last, rest, strip, group, C, S, fold, table, scratch, partial, block):
    """Both sums of rows first..last of a strip, and of the `rest` columns of row `last`, as block `block` of partial."""
    c0, channels, column, width = strip_of(strip, group, C, S, fold)
    for k in range(min(2, table.shape[0])):  # MEAN, LOW
        expand(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), c0), channels, S, width)
    clear(vectors(scratch, DY_ROW), width)
    clear(vectors(scratch, DY_XMU_ROW), width)
    lead = rows_ahead(x, width)
    r, end = first, last + (rest > 0)
    while r < end:
        stop = next_tile(r, last)
        reduce_tile(x, dy, weight, mask, r, stop, column, rest if r == last else width, scratch, lead)
        r = stop
    collapse(vectors(scratch, DY_ROW), channels, S, width)
    collapse(vectors(scratch, DY_XMU_ROW), channels, S, width)
    for c in range(channels):
        partial[c0 + c, block, 0] = get(vectors(scratch, DY_ROW), c)
        partial[c0 + c, block, 1] = get(vectors(scratch, DY_XMU_ROW), c)


def reduce_columns(x, dy, weight, mask, R, rest, C, S, fold, table, partial, scratch, thread, first, last, group, rows_a_block):
    """Both sums of tasks first..last, into the first two numbers of a row of partial; task = block * strips + strip."""
    strips = (C + group - 1) // group
    blocks = partial.shape[1]
    for task in range(first, last):
        b, strip = task // strips, task % strips
        r0, r1 = b * rows_a_block, min((b + 1) * rows_a_block, R)
        more = rest if b == blocks - 1 else 0
        reduce_block(x, dy, weight, mask, r0, r1, more, strip, group, C, S, fold, table, scratch[thread], partial, b)


# -------------------------------------------------------------------------------------------------------------------- dx


@inline
def expand_coefficients(table, grads, scratch, first, channels, S, width):
    for k in range(min(2, table.shape[0])):  # MEAN, LOW
        expand(vectors(scratch, MEAN_ROW + k), moved(vectors(table, MEAN + k), first), channels, S, width)
    for k in range(min(3, grads.shape[0])):  # COEF_A, COEF_B, COEF_C
        expand(vectors(scratch, A_ROW + k), moved(vectors(grads, COEF_A + k), first), channels, S, width)


@inline
def apply_column(x, dy, dx, dresidual, weight, mask, frozen, first, last, column, S, j, n, scratch, streamed, lead):
    """Columns j..j+n (n <= 16) of rows first..last: their coefficients are loaded once."""
    mean, low = load(vectors(scratch, MEAN_ROW), j), load(vectors(scratch, LOW_ROW), j)
    a, b, c = load(vectors(scratch, A_ROW), j), load(vectors(scratch, B_ROW), j), load(vectors(scratch, C_ROW), j)
    coefficients = (mean, low, a, b, c)
    if n == LANES:
        for r in range(first, last):
            xp, dyp, dxp, drp = row(x, r, column), row(dy, r, column), row(dx, r, column), row(dresidual, r, column)
            prefetch(xp, j + lead)
            prefetch(dyp, j + lead)
            w = weight_vector(weight, scratch, WEIGHT_ROWS, first, r, S, j)
            apply(xp, dyp, dxp, drp, mask_row(mask, r, column), w, frozen, j, coefficients, streamed)
    else:
        for r in range(first, last):
            xp, dyp, dxp, drp = row(x, r, column), row(dy, r, column), row(dx, r, column), row(dresidual, r, column)
            w = weight_vector(weight, scratch, WEIGHT_ROWS, first, r, S, j)
            apply_some(xp, dyp, dxp, drp, mask_row(mask, r, column), w, frozen, j, n, coefficients)


@inline
def apply_rows(x, dy, dx, dresidual, weight, mask, frozen, first, last, rest, column, width, S, scratch, streamed, lead):
    """Rows first..last of a strip, and the `rest` columns of row `last`; prefetch `lead` values on."""
    boundary = min(lanes_to_boundary(row(dx, first, column)), width) if streamed else 0
    r, end = first, last + (rest > 0)
    while r < end:
        stop = next_tile(r, last)
        here, head, around = (rest, 0, False) if r == last else (width, boundary, streamed)
        expand_weights(weight, scratch, WEIGHT_ROWS, r, stop, S, here)
        j = 0
        while j < here:
            n = lanes_at(j, head, here)
            apply_column(x, dy, dx, dresidual, weight, mask, frozen, r, stop, column, S, j, n, scratch, around, lead)
            j += n
        r = stop


def apply_columns(
    x,
    dy,
    dx,
    dresidual,
    weight,
    mask,
    frozen,
    R,
    rest,
    C,
    S,
    fold,
    table,
    grads,
    scratch,
    thread,
    first,
    last,
    group,
    rows_a_block,
    streamed,
):
    """dx and dresidual from the rows COEF_A to COEF_C of grads; blocks of rows from the last to the first, as in the forward."""
    strips = (C + group - 1) // group
    blocks = max(1, (R + rows_a_block - 1) // rows_a_block)
    mine = scratch[thread]
    for task in range(first, last):
        b, strip = blocks - 1 - task // strips, task % strips
        r0, r1 = b * rows_a_block, min((b + 1) * rows_a_block, R)
        more = rest if b == blocks - 1 else 0
        c0, channels, column, width = strip_of(strip, group, C, S, fold)
        expand_coefficients(table, grads, mine, c0, channels, S, width)
        lead = rows_ahead(x, width)
        apply_rows(x, dy, dx, dresidual, weight, mask, frozen, r0, r1, more, column, width, S, mine, streamed, lead)
    if streamed:
        fence()


def backward_columns(
    x,
    dy,
    dx,
    dresidual,
    weight,
    mask,
    R,
    C,
    S,
    table,
    grads,
    count,
    partial,
    scratch,
    thread,
    first,
    last,
    group,
    rows_a_block,
    streamed,
):
    """Training backward of short planes, strips first..last: sums from memory, then dx out of the cache."""
    mine = scratch[thread]
    for strip in range(first, last):
        for b in range(partial.shape[1]):
            r0, r1 = b * rows_a_block, min((b + 1) * rows_a_block, R)
            reduce_block(x, dy, weight, mask, r0, r1, 0, strip, group, C, S, 1, table, mine, partial, b)
        c0, channels, column, width = strip_of(strip, group, C, S, 1)
        for c in range(c0, c0 + channels):
            finish_blocks_backward(table, grads, partial, c, count, False)
        expand_coefficients(table, grads, mine, c0, channels, S, width)
        # While dx is streamed out, the next strip is prefetched.
        apply_rows(x, dy, dx, dresidual, weight, mask, None, 0, R, 0, column, width, S, mine, streamed, width)
    if streamed:
        fence()
