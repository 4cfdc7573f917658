"""What happens once a channel: merging blocks, from moments to scale, running statistics. Twin: kernels/cuda/channels.py.

A `table` has one float64 column for each channel, and the rows of kernels/rows.py. The forward fills GAMMA and BETA from the
parameters and the rest from the statistics; a context keeps the table for the backward, which needs a second one, `grads`.

Sixteen channels at a time go through the formulas, as lanes (simd/exact.py).
"""

import math

from fastbn.kernels import formulas
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    as_float32,
    exact,
    exact_lanes,
    get,
    how_many,
    load_masked,
    moved,
    put,
    put_lanes,
    set_values,
    splat,
    values_of,
    vectors,
)
from fastbn.kernels.formulas import where
from fastbn.kernels.rows import (  # noqa: F401  (this file names the rows for all CPU kernels)
    ANCHOR,
    BACKWARD_ROWS,
    BETA,
    COEF_A,
    COEF_B,
    COEF_C,
    GAMMA,
    INVSTD,
    LOW,
    MEAN,
    SCALE,
    SUM_DY,
    SUM_DY_XMU,
    TABLE_ROWS,
    VAR,
)

merge = inline(formulas.merge)
exact_sum = inline(formulas.exact_sum)
backward_coefficients = inline(formulas.backward_coefficients)
running_average = inline(formulas.running_average)
float32_anchor = inline(formulas.float32_anchor)
float32_products_hold = inline(formulas.float32_products_hold)


@inline
def smaller(a, b):
    return where(b < a, b, a)


@inline
def larger(a, b):
    return where(b > a, b, a)


@inline
def median(a, b, d):
    """The median of three scalars, or of three lanes."""
    return larger(smaller(a, b), smaller(larger(a, b), d))


@inline
def shift_of_channel(x, c, shift_places):
    """The median of three values of channel c: one outlier does not become the shift. `shift_places` are offsets."""
    p = moved(x[0], c * x[2])
    return median(get(p, shift_places[0]), get(p, shift_places[1]), get(p, shift_places[2]))


@inline
def find_shifts(x, c, n, shift_places, shifts):
    """shifts[c:c+n] = the shifts of channels c..c+n, 16 at most."""
    if x[2] == 1:
        a = exact(load_masked(x[0], shift_places[0] + c, n))
        b = exact(load_masked(x[0], shift_places[1] + c, n))
        d = exact(load_masked(x[0], shift_places[2] + c, n))
        put_lanes(shifts, c, median(a, b, d), n)
    else:
        for i in range(c, c + n):
            put(shifts, i, shift_of_channel(x, i, shift_places))


@inline
def moments_of_sums(s, q, count):
    """Mean (relative to the shift) and M2 of a block, from its sums of deviations and of their squares; of scalars or lanes."""
    d = s / (count if count > 0.0 else 1.0)  # sums of nothing are 0
    m2 = q - s * d
    return d, where(m2 < 0.0, 0.0, m2)  # rounding only: m2 is a sum of squares


@inline
def shift_is_far(count, d, m2):
    """Whether a block of float64 is to be gathered again, around its own mean; of scalars or lanes.

    M2 loses d^2 / variance times what its sums were rounded by, 2e-15: with a shift more than three standard deviations off, the bound
    of 1e-13 would be in danger. The median of three values is as far off in one channel of 100,000, if they are normally distributed.
    """
    return d * d * count > 9.0 * m2


@inline
def lanes_of(table, row, c, n):
    """Channels c..c+n of a row of the table, or of a block of partial."""
    return exact_lanes(vectors(table, row), c, n)


@inline
def set_lanes(table, row, c, v, n):
    put_lanes(vectors(table, row), c, v, n)


@inline
def finish_scale(table, channels, c, n, mean, low, var, eps):
    """The columns c..c+n of the table, 16 at most, from their statistics. How many of them float32 lanes cannot normalise."""
    gamma, beta = values_of(channels.gamma, c, n, 1.0), values_of(channels.beta, c, n, 0.0)
    invstd = 1.0 / math.sqrt(var + eps)
    scale = gamma * invstd
    anchor = float32_anchor(mean, var, scale, beta)
    set_lanes(table, GAMMA, c, gamma, n)
    set_lanes(table, VAR, c, var, n)
    set_lanes(table, INVSTD, c, invstd, n)
    set_lanes(table, MEAN, c, mean, n)
    set_lanes(table, LOW, c, low, n)
    set_lanes(table, SCALE, c, scale, n)
    set_lanes(table, BETA, c, beta, n)
    set_lanes(table, ANCHOR, c, anchor, n)
    return how_many(anchor != anchor, n)


@inline
def found(left_out, lanes64):
    """What a kernel of a forward finds: channels that its float32 lanes leave out. Float64 lanes leave out none."""
    return left_out if lanes64 is None else 0


@inline
def is_written(table, c, lanes64, leftovers):
    """Whether a kernel is to normalise channel c.

    In float32 lanes (`lanes64` is None) it takes those that fit, in float64 lanes all of them, or only the `leftovers`.
    """
    if lanes64 is None:
        return not math.isnan(table[ANCHOR, c])
    return leftovers is None or math.isnan(table[ANCHOR, c])


@inline
def finish_channels(table, partial, channels, first, last, blocks, eps):
    """All rows of the table for channels first..last, from the moments of their first `blocks` blocks. How many float32 lanes leave out.

    Blocks are merged in order, so that the bits do not depend on who computed which. All channels have the same counts.
    """
    left_out = 0
    for c in range(first, last, LANES):
        n = min(LANES, last - c)
        count = partial[0, 0, c]
        average, m2, shift = lanes_of(partial[0], 1, c, n), lanes_of(partial[0], 2, c, n), lanes_of(partial[0], 3, c, n)
        for b in range(1, blocks):
            more = partial[b, 0, c]
            average_b, m2_b, shift_b = lanes_of(partial[b], 1, c, n), lanes_of(partial[b], 2, c, n), lanes_of(partial[b], 3, c, n)
            if count == 0.0:
                count, average, m2, shift = more, average_b, m2_b, shift_b
            elif more > 0.0:
                count, average, m2 = merge(count, average, m2, more, (shift_b - shift) + average_b, m2_b)
        mean, low = exact_sum(shift, average)
        left_out += finish_scale(table, channels, c, n, mean, low, m2 / count, eps)
    return left_out


def finish_stats(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """All rows of the table from the parameters and the moments of blocks: (count, mean - shift, M2, shift), by channel.

    How many channels do not fit float32 lanes.
    """
    return found(finish_channels(table, partial, channels, 0, shape.C, shape.blocks, numbers.eps), options.lanes64)


def finish_given(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """All rows of the table where mean and variance are given. How many channels do not fit float32 lanes."""
    left_out = 0
    for c in range(0, shape.C, LANES):
        n = min(LANES, shape.C - c)
        mean, low = values_of(channels.mean, c, n, 0.0), values_of(channels.low, c, n, 0.0)
        left_out += finish_scale(table, channels, c, n, mean, low, values_of(channels.var, c, n, 0.0), numbers.eps)
    return found(left_out, options.lanes64)


@inline
def move_running(running, c, n, new, fits, momentum):
    """Move channels c..c+n of running statistics, but those of which `fits` is false."""
    old = values_of(running, c, n, 0.0)
    set_values(running, c, where(fits, running_average(old, new, momentum), old), n)


def update_running(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Move the running statistics, if there are any, towards the batch's. How many channels are not finite.

    Such a channel leaves its running statistics as they were: one bad batch does not destroy them. With any such channel nothing
    is written unless `force`, so that the caller can warn first.
    """
    correction, limit = numbers.correction, numbers.limit
    skipped = 0
    if channels.mean[1] == 0:
        return skipped
    for moving in range(2):
        for c in range(0, shape.C, LANES):
            n = min(LANES, shape.C - c)
            mean, var = lanes_of(table, MEAN, c, n), lanes_of(table, VAR, c, n) * correction
            fits = (abs(mean) <= limit) & (var <= limit)
            if moving:
                move_running(channels.mean, c, n, mean, fits, numbers.momentum)
                move_running(channels.var, c, n, var, fits, numbers.momentum)
            else:
                skipped += n - how_many(fits, n)
        if skipped > 0 and not numbers.force:
            break
    return skipped


@inline
def finish_channels_backward(table, grads, channels, partial, first, last, blocks, count, constant, lanes32):
    """dx = A * dy + B * (x - mean) + C of channels first..last, from the sums of `blocks` blocks; frozen statistics are constants.

    How many channels do not suit sums in float32 lanes. Such sums are of dy * (x - m), with m the mean in float32.
    """
    for c in range(first, last, LANES):
        n = min(LANES, last - c)
        zero = exact(splat(0.0))
        sum_dy, sum_dy_xmu = zero, zero
        for b in range(blocks):
            sum_dy, sum_dy_xmu = sum_dy + lanes_of(partial[b], 0, c, n), sum_dy_xmu + lanes_of(partial[b], 1, c, n)
        mean, invstd = lanes_of(table, MEAN, c, n), lanes_of(table, INVSTD, c, n)
        if lanes32 is not None:
            sum_dy_xmu = sum_dy_xmu + (as_float32(mean) - mean) * sum_dy
        set_lanes(grads, SUM_DY, c, sum_dy, n)
        set_lanes(grads, SUM_DY_XMU, c, sum_dy_xmu, n)
        set_values(channels.dgamma, c, sum_dy_xmu * invstd, n)
        set_values(channels.dbeta, c, sum_dy, n)
        slope, on_deviation, term = backward_coefficients(lanes_of(table, GAMMA, c, n), invstd, sum_dy, sum_dy_xmu, count)
        set_lanes(grads, COEF_A, c, slope, n)
        set_lanes(grads, COEF_B, c, zero if constant else on_deviation, n)
        set_lanes(grads, COEF_C, c, zero if constant else term, n)
    left_out = 0
    if lanes32 is not None:
        for c in range(first, last):
            left_out += 0 if suits_float32(table, grads, partial, c, blocks, count) else 1
    return left_out


@inline
def suits_float32(table, grads, partial, c, blocks, count):
    """Whether the numbers of a channel suit sums in float32 lanes."""
    largest, farthest = 0.0, 0.0
    for b in range(blocks):
        largest, farthest = max(largest, partial[b, 2, c]), max(farthest, partial[b, 3, c])
    return float32_products_hold(grads[COEF_A, c], grads[COEF_B, c], largest, farthest, math.sqrt(table[VAR, c]), count)


def finish_backward(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """The rows of the backward's table from the sums of blocks: (sum dy, sum dy * (x - mean), largest dy, -), by channel.

    How many channels do not suit float32 sums.
    """
    count, constant, lanes32 = numbers.count, numbers.constant, options.lanes32
    return finish_channels_backward(table, grads, channels, partial, 0, shape.C, shape.blocks, count, constant, lanes32)
