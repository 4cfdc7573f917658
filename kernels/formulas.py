"""The formulas of batch normalisation, once, as plain scalar functions that each backend compiles for itself.

They take and return Python, Numba CPU or CUDA scalars, or the CPU's lanes of channels (kernels/cpu/simd/exact.py), and know nothing of
arrays or threads.

References
----------
Chan, Golub and LeVeque (1983), "Algorithms for Computing the Sample Variance", The American Statistician 37(3), eq. 2.1.
Ioffe and Szegedy (2015), "Batch Normalization", arXiv:1502.03167: algorithm 1 and the gradients below it.
Knuth (1969), TAOCP 2, section 4.2.2, theorem B (the error of a floating-point sum).
"""

import math


def where(condition, a, b):
    """a if the condition holds, else b; lane by lane."""
    return a if condition else b


def merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Count, mean and sum of squared deviations of two samples together (Chan et al. 1983, eq. 2.1). Not both may be empty."""
    n = n_a + n_b
    delta = mean_b - mean_a
    share = n_b / n
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


def exact_sum(a, b):
    """a + b and the rounding error of that sum, exactly (Knuth 1969)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def float32_anchor(mean, var, scale, beta):
    """The number m for which float32 arithmetic computes y = (x - m) * scale + b well, b being beta - (mean - m) * scale; NaN if none.

    m is 0 or the mean (rounded to float32 by those who use it). With u = 2**-24, and without an FMA, the roundings of the difference,
    of scale, of the product, of b and of the sum add up to at most u * (3 |y - b| + |b| + |y|), which is u * (4 |y| + 4 |b|):
    9.5e-7 * max(1, |y|) where |b| <= 3. Beyond, where a large bias cancels, float32 is not enough. Nor is it where scale, or a
    difference that should be finite, leaves its range; from a mean of 2**103 on the largest float32 less the mean does.

    An m of 0 spares a rounding, and is better unless it makes the bias larger: for normal values the largest error is 9e-8 then, and
    1.2e-7 with the mean. A constant channel needs the mean, to give exactly beta. A scale that is NaN gives NaN in any arithmetic.
    """
    size = abs(scale)
    fits = (abs(mean) <= 2.0**103) & ((size >= 2.0**-126) & (size <= 2.0**127) | (size == 0.0))
    largest = where(abs(beta) + 2.0 < 3.0, abs(beta) + 2.0, 3.0)
    zero = fits & (var > 0.0) & (abs(beta - mean * scale) <= largest) | (size != size)
    near = fits & (abs(beta) + abs(mean) * size * 2.0**-24 <= 3.0)
    return where(zero, 0.0, where(near, mean, math.nan))


def float32_products_hold(a, b, largest, farthest, std, count):
    """Whether dx and the sums of a channel may be computed in float32, with dx = a * dy + b * (x - mean) + c.

    `largest` is the largest abs(dy), `farthest` the largest abs(x - mean), or 0 where dx is rounded to a half type.

    Deviations from the mean are between std, the largest at least, and sqrt(count) * std. Products of them with dy, and dx itself, must
    not overflow; what vanishes, 2**-149 of a product or of the slope, must not count. Rounding costs a float32 dx at most
    2**-24 * (4 * abs(b) * farthest + 5 * abs(a) * largest), since abs(c) <= abs(a) * largest: with the limit of 2 below 0.8e-6 of
    abs(a) * largest, where 1e-6 is allowed. Only an outlier, or dy that goes with x, comes near: at random b * std is a / sqrt(count).
    """
    size = abs(a) * largest
    if abs(b) * farthest > 2.0 * size:
        return False
    largest_product = largest * math.sqrt(count) * std
    if largest_product == 0.0:
        return largest <= 2.0**100 and size <= 2.0**100
    if not (largest * std >= 2.0**-100 and largest_product <= 2.0**100 and largest <= 2.0**100):
        return False
    return a == 0.0 or 2.0**-100 * max(1.0, math.sqrt(count) * std) <= size <= 2.0**100


def backward_coefficients(gamma, invstd, sum_dy, sum_dy_xmu, count):
    """(a, b, c) of dx = a * dy + b * (x - mean) + c, where sum_dy_xmu is the sum of dy * (x - mean).

    Ioffe and Szegedy (2015) with their three gradients with respect to x, the variance and the mean collected. b is a product of two
    factors of moderate size: the third power of invstd leaves float64's range where std is 1e105, or eps 1e-210.
    """
    a = gamma * invstd
    return a, -(a * invstd) * (invstd * sum_dy_xmu / count), -a * sum_dy / count


def running_average(old, new, momentum):
    """(1 - momentum) * old + momentum * new."""
    return (1.0 - momentum) * old + momentum * new
