"""What happens once a channel: merging blocks, from moments to scale, running statistics. Twin: kernels/cuda/channels.py.

A `table` has one float64 column for each channel, and the rows of kernels/rows.py. The forward fills GAMMA and BETA from the
parameters and the rest from the statistics; a context keeps the table for the backward, which needs a second one.
"""

import math

import numpy as np

from fastbn.kernels import formulas
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import get, moved, put, two_words
from fastbn.kernels.rows import (  # noqa: F401  (this file names the rows for all CPU kernels)
    ANCHOR,
    BACKWARD_ROWS,
    BETA,
    COEF_A,
    COEF_B,
    COEF_C,
    DGAMMA,
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
brief_products_hold = inline(formulas.brief_products_hold)


@inline
def shift_of_channel(x, c, points):
    """The median of three values of channel c: one outlier does not become the shift. Points are offsets in the channel."""
    p = moved(x[0], c * x[2])
    a, b, d = get(p, points[0]), get(p, points[1]), get(p, points[2])
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
def off_centre(x, count, d, m2):
    """Whether a block of float64 is to be gathered again, around its own mean.

    M2 loses d^2 / variance times what its sums were rounded by, 2e-15: with a shift more than three standard deviations off, the bound
    of 1e-13 would be in danger. The median of three values is as far off in one channel of 100,000, if they are normally distributed.
    """
    return two_words(x) and d * d * count > 9.0 * m2


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
def takes(table, c, wide):
    """Whether a kernel is to normalise channel c.

    In float32 lanes (`wide` is None) it takes those that fit, in float64 lanes all of them or, as a second run, the others.
    """
    if wide is None:
        return not math.isnan(table[ANCHOR, c])
    return wide or math.isnan(table[ANCHOR, c])


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


def finish_stats(table, partial, C, eps):
    """The rows MEAN to SCALE and ANCHOR from the moments of blocks; a row of partial is (count, mean - shift, M2, shift).

    How many channels do not fit float32 lanes.
    """
    unfit = 0
    for c in range(C):
        unfit += finish_blocks(table, partial, c, eps)
    return unfit


def finish_given(table, C, eps):
    """INVSTD, SCALE and ANCHOR where mean and variance are given. How many channels do not fit float32 lanes."""
    unfit = 0
    for c in range(C):
        unfit += finish_scale(table, c, eps)
    return unfit


def update_running(table, running_mean, running_var, C, mean_stride, var_stride, momentum, correction, limit, force):
    """Move the running statistics towards the batch's; correction is n / (n - 1) or 1. How many channels are not finite.

    Such a channel leaves its running statistics as they were: one bad batch does not destroy them. With any such channel nothing
    is written unless `force`, so that the caller can warn first. `limit` is the largest number that the running dtype holds.
    """
    skipped = 0
    for c in range(C):
        if not (abs(table[MEAN, c]) <= limit and table[VAR, c] * correction <= limit):
            skipped += 1
    if skipped == 0 or force:
        for c in range(C):
            mean, var = table[MEAN, c], table[VAR, c] * correction
            if abs(mean) <= limit and var <= limit:
                put(running_mean, c * mean_stride, running_average(get(running_mean, c * mean_stride), mean, momentum))
                put(running_var, c * var_stride, running_average(get(running_var, c * var_stride), var, momentum))
    return skipped


@inline
def finish_channel_backward(table, grads, c, sum_dy, sum_dy_xmu, largest, count, constant, brief):
    """dx = A * dy + B * (x - mean) + C of a channel; frozen statistics are constants.

    1 if the channel's numbers do not suit brief sums and float32 lanes, else 0; `largest` is its largest abs(dy). Brief sums are of
    dy * (x - m), with m the mean in float32.
    """
    if brief is not None:
        sum_dy_xmu += (np.float32(table[MEAN, c]) - table[MEAN, c]) * sum_dy
    grads[SUM_DY, c] = sum_dy
    grads[SUM_DY_XMU, c] = sum_dy_xmu
    grads[DGAMMA, c] = sum_dy_xmu * table[INVSTD, c]
    a, b, d = backward_coefficients(table[GAMMA, c], table[INVSTD, c], sum_dy, sum_dy_xmu, count)
    grads[COEF_A, c] = a
    grads[COEF_B, c] = 0.0 if constant else b
    grads[COEF_C, c] = 0.0 if constant else d
    if brief is None or brief_products_hold(a, largest, math.sqrt(table[VAR, c]), count):
        return 0
    return 1


@inline
def finish_blocks_backward(table, grads, partial, c, count, constant, brief):
    sum_dy, sum_dy_xmu, largest = 0.0, 0.0, 0.0
    for b in range(partial.shape[1]):
        sum_dy += partial[c, b, 0]
        sum_dy_xmu += partial[c, b, 1]
        largest = max(largest, partial[c, b, 2])
    return finish_channel_backward(table, grads, c, sum_dy, sum_dy_xmu, largest, count, constant, brief)


def finish_backward(table, grads, partial, C, count, constant, brief):
    """The rows of the backward's table from the sums of blocks; a row of partial is (sum dy, sum dy * (x - mean), largest dy, -).

    How many channels do not suit brief sums.
    """
    unfit = 0
    for c in range(C):
        unfit += finish_blocks_backward(table, grads, partial, c, count, constant, brief)
    return unfit
