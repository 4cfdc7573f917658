"""What happens once a channel: merging blocks, from moments to scale, running statistics. Twin: kernels/cuda/channels.py.

A `table` has one float64 column for each channel, and the rows of kernels/rows.py. The forward fills GAMMA and BETA from the
parameters and the rest from the statistics; a context keeps the table for the backward, which needs a second one.
"""

import math

import numpy as np

from fastbn.kernels import formulas
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import get, get_channel, moved, needs_two_words, put_channel
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
def shift_of_channel(x, c, shift_places):
    """The median of three values of channel c: one outlier does not become the shift. `shift_places` are offsets."""
    p = moved(x[0], c * x[2])
    a, b, d = get(p, shift_places[0]), get(p, shift_places[1]), get(p, shift_places[2])
    return max(min(a, b), min(max(a, b), d))


@inline
def moments_of_sums(s, q, count):
    """Mean (relative to the shift) and M2 of a block, from its sums of deviations and of their squares."""
    if count == 0.0:
        return 0.0, 0.0
    d = s / count
    m2 = q - s * d
    if m2 < 0.0:  # rounding only: m2 is a sum of squares
        m2 = 0.0
    return d, m2


@inline
def shift_is_far(x, count, d, m2):
    """Whether a block of float64 is to be gathered again, around its own mean.

    M2 loses d^2 / variance times what its sums were rounded by, 2e-15: with a shift more than three standard deviations off, the bound
    of 1e-13 would be in danger. The median of three values is as far off in one channel of 100,000, if they are normally distributed.
    """
    return needs_two_words(x) and d * d * count > 9.0 * m2


@inline
def value_of(vector, c, absent):
    """The value of channel c, or `absent` where there is no such vector."""
    return get_channel(vector[0], c * vector[1], vector[2], absent)


@inline
def set_value(vector, c, value):
    """Write the value of channel c."""
    put_channel(vector[0], c * vector[1], vector[2], value)


@inline
def open_column(table, channels, c):
    """The parameters of channel c into its column of the table."""
    table[GAMMA, c] = value_of(channels.gamma, c, 1.0)
    table[BETA, c] = value_of(channels.beta, c, 0.0)


@inline
def finish_scale(table, c, eps):
    """1/std and scale of a channel, and whether float32 lanes can normalise it. 1 if not, 0 if so."""
    table[INVSTD, c] = 1.0 / math.sqrt(table[VAR, c] + eps)
    table[SCALE, c] = table[GAMMA, c] * table[INVSTD, c]
    table[ANCHOR, c] = float32_anchor(table[MEAN, c], table[VAR, c], table[SCALE, c], table[BETA, c])
    return 1 if math.isnan(table[ANCHOR, c]) else 0


@inline
def finish_channel(table, c, shift, count, average, m2, eps):
    """Mean as two words, variance, 1/std and scale of a channel, from its moments around the shift; see `finish_scale`."""
    mean, low = exact_sum(shift, average)
    table[MEAN, c] = mean
    table[LOW, c] = low
    table[VAR, c] = m2 / count
    return finish_scale(table, c, eps)


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
def finish_blocks(table, partial, c, eps):
    """Merge the blocks of a channel in order, so that the bits do not depend on who computed which."""
    count, average, m2, shift = partial[c, 0, 0], partial[c, 0, 1], partial[c, 0, 2], partial[c, 0, 3]
    for b in range(1, partial.shape[1]):
        if count == 0.0:
            count, average, m2, shift = partial[c, b, 0], partial[c, b, 1], partial[c, b, 2], partial[c, b, 3]
        elif partial[c, b, 0] > 0.0:
            d = (partial[c, b, 3] - shift) + partial[c, b, 1]
            count, average, m2 = merge(count, average, m2, partial[c, b, 0], d, partial[c, b, 2])
    return finish_channel(table, c, shift, count, average, m2, eps)


def finish_stats(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """All rows of the table from the parameters and the moments of blocks; a row of partial is (count, mean - shift, M2, shift).

    How many channels do not fit float32 lanes.
    """
    left_out = 0
    for c in range(shape.C):
        open_column(table, channels, c)
        left_out += finish_blocks(table, partial, c, numbers.eps)
    return found(left_out, options.lanes64)


def finish_given(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """All rows of the table where mean and variance are given. How many channels do not fit float32 lanes."""
    left_out = 0
    for c in range(shape.C):
        open_column(table, channels, c)
        table[MEAN, c], table[VAR, c] = value_of(channels.mean, c, 0.0), value_of(channels.var, c, 0.0)
        table[LOW, c] = value_of(channels.low, c, 0.0)
        left_out += finish_scale(table, c, numbers.eps)
    return found(left_out, options.lanes64)


def update_running(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Move the running statistics, if there are any, towards the batch's. How many channels are not finite.

    Such a channel leaves its running statistics as they were: one bad batch does not destroy them. With any such channel nothing
    is written unless `force`, so that the caller can warn first.
    """
    momentum, correction, limit = numbers.momentum, numbers.correction, numbers.limit
    skipped = 0
    if channels.mean[2] == 0:
        return skipped
    for c in range(shape.C):
        if not (abs(table[MEAN, c]) <= limit and table[VAR, c] * correction <= limit):
            skipped += 1
    if skipped == 0 or numbers.force:
        for c in range(shape.C):
            mean, var = table[MEAN, c], table[VAR, c] * correction
            if abs(mean) <= limit and var <= limit:
                set_value(channels.mean, c, running_average(value_of(channels.mean, c, 0.0), mean, momentum))
                set_value(channels.var, c, running_average(value_of(channels.var, c, 0.0), var, momentum))
    return skipped


@inline
def finish_channel_backward(table, grads, channels, c, sum_dy, sum_dy_xmu, largest, count, constant, lanes32):
    """dx = A * dy + B * (x - mean) + C of a channel; frozen statistics are constants.

    1 if the channel's numbers do not suit sums in float32 lanes, else 0; `largest` is its largest abs(dy). Such sums are of
    dy * (x - m), with m the mean in float32.
    """
    if lanes32 is not None:
        sum_dy_xmu += (np.float32(table[MEAN, c]) - table[MEAN, c]) * sum_dy
    grads[SUM_DY, c] = sum_dy
    grads[SUM_DY_XMU, c] = sum_dy_xmu
    set_value(channels.dgamma, c, sum_dy_xmu * table[INVSTD, c])
    set_value(channels.dbeta, c, sum_dy)
    a, b, d = backward_coefficients(table[GAMMA, c], table[INVSTD, c], sum_dy, sum_dy_xmu, count)
    grads[COEF_A, c] = a
    grads[COEF_B, c] = 0.0 if constant else b
    grads[COEF_C, c] = 0.0 if constant else d
    if lanes32 is None or float32_products_hold(a, largest, math.sqrt(table[VAR, c]), count):
        return 0
    return 1


@inline
def finish_blocks_backward(table, grads, channels, partial, c, count, constant, lanes32):
    sum_dy, sum_dy_xmu, largest = 0.0, 0.0, 0.0
    for b in range(partial.shape[1]):
        sum_dy += partial[c, b, 0]
        sum_dy_xmu += partial[c, b, 1]
        largest = max(largest, partial[c, b, 2])
    return finish_channel_backward(table, grads, channels, c, sum_dy, sum_dy_xmu, largest, count, constant, lanes32)


def finish_backward(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """The rows of the backward's table from the sums of blocks; a row of partial is (sum dy, sum dy * (x - mean), largest dy, -).

    How many channels do not suit float32 sums.
    """
    left_out = 0
    for c in range(shape.C):
        left_out += finish_blocks_backward(table, grads, channels, partial, c, numbers.count, numbers.constant, options.lanes32)
    return left_out
