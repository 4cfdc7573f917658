"""What the backward of planes and of columns share: g, its sums in the making, and dx from their coefficients.

Like `sums.py` for the forward. Formulas and kinds of lanes are those of planes_backward.py.
"""

from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    bits_above_zero,
    deviation_if_float64,
    float32_sum,
    float64_sum,
    get_bits,
    largest,
    largest_if_float32,
    load_like,
    load_masked_like,
    store,
    store_masked,
    stream,
    where_bits,
)


@inline
def open_sums(sums, like):
    """(sum of g, sum of g * (x - mean), largest g, largest x - mean) to go on with in lanes of `like`'s kind."""
    return float32_sum(sums[0], like), float32_sum(sums[1], like), sums[2], sums[3]


@inline
def close_sums(sums, part):
    """The sums with what the part has added."""
    return float64_sum(sums[0], part[0]), float64_sum(sums[1], part[1]), part[2], part[3]


@inline
def gradient(dyp, mp, j, like):
    """g: what the ReLU lets through of dy[j:j+16], in lanes of `like`'s kind."""
    return load_like(dyp, j, like) if mp is None else where_bits(load_like(dyp, j, like), get_bits(mp, j))


@inline
def gradient_masked(dyp, mp, j, n, like):
    return load_masked_like(dyp, j, n, like) if mp is None else where_bits(load_masked_like(dyp, j, n, like), get_bits(mp, j))


@inline
def add_products(xp, part, g, xmu, weight):
    """Add to (sum of g, sum of g * (x - mean), largest g, largest x - mean).

    Under weights a masked x may be NaN: it counts only where g does.
    """
    s, p, most, farthest = part
    if weight is not None:
        xmu = where_bits(xmu, bits_above_zero(g * g))
    return s + g, p + g * xmu, largest(most, g), largest_if_float32(xp, farthest, xmu)


@inline
def slope(g, xmu, coefficients, w, frozen):
    """dx = A * g + w * (B * (x - mean) + C); where the weight is 0, x may be NaN. Frozen statistics leave A * g, without x."""
    _, _, a, b, c = coefficients
    if frozen is not None:
        return a * g
    statistics = b * xmu + c
    if w is not None:
        statistics = w * where_bits(statistics, bits_above_zero(w))
    return a * g + statistics


@inline
def apply(xp, dyp, dxp, drp, mp, w, frozen, j, coefficients, streamed):
    """dx[j:j+16], and dresidual where there is one; `streamed` only where both are equally aligned."""
    mean, low = coefficients[0], coefficients[1]
    g = gradient(dyp, mp, j, mean)
    xmu = deviation_if_float64(xp, load_like(xp, j, mean), mean, low)
    v = slope(g, xmu, coefficients, w, frozen)
    if streamed:
        stream(dxp, j, v)
        if drp is not None:
            stream(drp, j, g)
    else:
        store(dxp, j, v)
        if drp is not None:
            store(drp, j, g)


@inline
def apply_masked(xp, dyp, dxp, drp, mp, w, frozen, j, n, coefficients):
    mean, low = coefficients[0], coefficients[1]
    g = gradient_masked(dyp, mp, j, n, mean)
    xmu = deviation_if_float64(xp, load_masked_like(xp, j, n, mean), mean, low)
    v = slope(g, xmu, coefficients, w, frozen)
    store_masked(dxp, j, v, n)
    if drp is not None:
        store_masked(drp, j, g, n)
