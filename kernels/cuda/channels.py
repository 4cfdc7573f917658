"""What happens once a channel, in float64: from merged moments to scale, running statistics. Twin: kernels/cpu/channels.py.

Arrays are flat. `table` (float64) has the rows of kernels/rows.py but the last, ANCHOR. `coefs` has the rows below in the type of
arithmetic: kernels that touch every element read those and nothing in float64.
"""

import math
from functools import cache

from numba import float64

from fastbn.kernels import formulas
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.rows import BETA, COEF_A, COEF_B, COEF_C, GAMMA, INVSTD, LOW, MEAN, SCALE, SUM_DY, SUM_DY_XMU, VAR

# Rows of the forward's coefficients: y = ((x - HI) - LO) * SCALE_T + SHIFT; the mean is the two words HI + LO.
HI, LO, INV, SCALE_T, SHIFT = range(5)
COEF_ROWS = 5
# Rows of the backward's coefficients: dx = DA * dy + DB * xhat + DC with xhat = ((x - HI) - LO) * INV. It is xhat and not
# x - mean, since b of formulas.backward_coefficients leaves float32's range where x is of the size of 1e25.
DA, DB, DC = range(3)
GRAD_ROWS = 3
# Fields of a block's partial moments: count, shift, mean - shift, M2.
FIELDS = 4
# Fields of a block's partial sums of the backward: dy and dy * xhat.
SUM_FIELDS = 2

exact_sum = device(formulas.exact_sum)
backward_coefficients = device(formulas.backward_coefficients)
running_average = device(formulas.running_average)


@device
def update_running(running_mean, running_var, c, mean, var, momentum):
    """Move the running statistics towards the batch's, unless their type cannot hold those.

    The batch's are stored first: reading them back is what rounds them to that type, without float64 arithmetic.
    """
    if running_mean.size > 0:
        old_mean, old_var = running_mean[c], running_var[c]
        running_mean[c] = mean
        running_var[c] = var
        if math.isfinite(running_mean[c]) and math.isfinite(running_var[c]):
            running_mean[c] = running_average(float64(old_mean), mean, momentum)
            running_var[c] = running_average(float64(old_var), var, momentum)
        else:
            running_mean[c] = old_mean
            running_var[c] = old_var


@device
def finish_channel(table, coefs, c, C, gamma, beta, mean, low, var, eps):
    """The rows of table and coefs of channel c, from its mean (two words) and variance. An empty gamma is 1, an empty beta 0."""
    g = float64(gamma[c]) if gamma.size > 0 else 1.0
    b = float64(beta[c]) if beta.size > 0 else 0.0
    invstd = 1.0 / math.sqrt(var + eps)
    # In the order of the rows, so that one address serves all: in another, kernels that hold 64 half values a thread spill 48 bytes.
    table[GAMMA * C + c] = g
    table[VAR * C + c] = var
    table[INVSTD * C + c] = invstd
    table[MEAN * C + c] = mean
    table[LOW * C + c] = low
    table[SCALE * C + c] = g * invstd
    table[BETA * C + c] = b
    coefs[HI * C + c] = mean
    coefs[LO * C + c] = (mean - float64(coefs[HI * C + c])) + low  # what rounding to coefs' type has lost
    coefs[INV * C + c] = invstd
    coefs[SCALE_T * C + c] = g * invstd
    coefs[SHIFT * C + c] = b


@device
def finish_stats(table, coefs, c, C, shift, count, average, m2, gamma, beta, running_mean, running_var, momentum, eps, correction):
    """Everything that follows from the moments of channel c around its shift; correction is n / (n - 1) or 1."""
    mean, low = exact_sum(shift, average)
    var = m2 / count
    if var < 0.0:  # rounding only: m2 is a sum of squares
        var = 0.0
    finish_channel(table, coefs, c, C, gamma, beta, mean, low, var, eps)
    update_running(running_mean, running_var, c, mean, var * correction, momentum)


@device
def finish_backward(table, grads, coefs, c, C, sum_dy, sum_dy_xhat, count, dgamma, dbeta, frozen):
    """dgamma, dbeta and the coefficients of dx of channel c from its two sums; frozen statistics are constants."""
    invstd = table[INVSTD * C + c]
    sum_dy_xmu = sum_dy_xhat / invstd
    a, b, d = backward_coefficients(table[GAMMA * C + c], invstd, sum_dy, sum_dy_xmu, count)
    if frozen != 0:
        b = 0.0
        d = 0.0
    grads[SUM_DY * C + c] = sum_dy
    grads[SUM_DY_XMU * C + c] = sum_dy_xmu
    grads[COEF_A * C + c] = a
    grads[COEF_B * C + c] = b
    grads[COEF_C * C + c] = d
    coefs[DA * C + c] = a
    coefs[DB * C + c] = b / invstd
    coefs[DC * C + c] = d
    if dgamma.size > 0:
        dgamma[c] = sum_dy_xhat
    if dbeta.size > 0:
        dbeta[c] = sum_dy


@cache
def given_coefs(T):
    """coefs(c, gamma, beta, mean, var, eps): (HI, LO, SCALE_T, SHIFT) of channel c from given statistics, as in finish_channel."""

    @device
    def coefs(c, gamma, beta, running_mean, running_var, eps):
        mean = float64(running_mean[c])
        hi = T(mean)
        g = float64(gamma[c]) if gamma.size > 0 else 1.0
        b = float64(beta[c]) if beta.size > 0 else 0.0
        return hi, T(mean - float64(hi)), T(g * (1.0 / math.sqrt(float64(running_var[c]) + eps))), T(b)

    return coefs


def finish_given(table, coefs, C, gamma, beta, running_mean, running_var, eps):
    """Kernel: table and coefs from given statistics, a thread a channel (the forward with frozen statistics)."""
    c = cuda.grid(1)
    if c < C:
        mean, var = float64(running_mean[c]), float64(running_var[c])
        finish_channel(table, coefs, c, C, gamma, beta, mean, 0.0, var, eps)
