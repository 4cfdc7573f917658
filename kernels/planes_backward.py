"""Backward kernels for planes: channels first, each (n, c) a contiguous run of S values. Twin: kernels/cuda/planes_backward.py.

With g = dy where the ReLU passed and 0 elsewhere, a channel needs two sums, of g and of g * (x - mean); then

    dx = A * g + B * (x - mean) + C,   dresidual = g,

in float64 lanes for every dtype: float32 would lose the bound where B * (x - mean) is much larger than A * g, which takes one outlier.

Versions, in passes over memory (the floor is three):

1. two sweeps over the whole tensors: five passes over memory, six with ordinary stores;
2. channel by channel, so that the second sweep reads the cache, with streaming stores: three;
3. `backward_planes`, the fused sweep, as in the forward: dx of one group of channels, sums of the next.
"""

from fastbn.kernels.channels import COEF_A, COEF_B, COEF_C, LOW, MEAN, finish_channel_backward
from fastbn.kernels.helpers import inline
from fastbn.kernels.planes import PREFETCH, ahead_of_run, head_of
from fastbn.kernels.simd import (
    LANES,
    apart,
    bits_above_zero,
    centre,
    fence,
    get_bits,
    joined,
    keep,
    load,
    load_some,
    moved,
    only,
    plane,
    prefetch,
    splat,
    store,
    store_some,
    stream,
    sum_lanes,
)
from fastbn.kernels.sums import load_sums, save_sums

# ------------------------------------------------------------------------------------------------------ sums over a plane


@inline
def gradient(dyp, mp, j):
    """g: what the ReLU lets through of dy[j:j+16]."""
    return load(dyp, j) if mp is None else only(load(dyp, j), get_bits(mp, j))


@inline
def gradient_some(dyp, mp, j, n):
    return load_some(dyp, j, n) if mp is None else only(load_some(dyp, j, n), get_bits(mp, j))


@inline
def add_products(sums, g, xmu, weight):
    """Add to (sum of g, sum of g * (x - mean)). Under weights a masked x may be NaN: it counts only where g does."""
    s, p, t = sums
    if weight is not None:
        xmu = only(xmu, bits_above_zero(g * g))
    return s + g, p + g * xmu, t


@inline
def reduce(xp, dyp, mp, weight, j, mean, low, sums):
    return add_products(sums, gradient(dyp, mp, j), centre(xp, load(xp, j), mean, low), weight)


@inline
def reduce_some(xp, dyp, mp, weight, j, n, mean, low, sums):
    return add_products(sums, gradient_some(dyp, mp, j, n), keep(centre(xp, load_some(xp, j, n), mean, low), n), weight)


@inline
def reduce_plane(xp, dyp, mp, weight, start, stop, mean, low, sums):
    """Both sums over start..stop of a plane."""
    j = start
    while j + LANES <= stop:
        sums = reduce(xp, dyp, mp, weight, j, mean, low, sums)
        j += LANES
    if j < stop:
        sums = reduce_some(xp, dyp, mp, weight, j, stop - j, mean, low, sums)
    return sums


# ------------------------------------------------------------------------------------------------------------ dx of a plane


@inline
def slope(g, xmu, coefficients, w, frozen):
    """dx = A * g + w * (B * (x - mean) + C); where the weight is 0, x may be NaN. Frozen statistics leave A * g, without x."""
    _, _, a, b, c = coefficients
    if frozen is not None:
        return a * g
    statistics = b * xmu + c
    if w is not None:
        statistics = w * only(statistics, bits_above_zero(w))
    return a * g + statistics


@inline
def apply(xp, dyp, dxp, drp, mp, w, frozen, j, coefficients, streamed):
    """dx[j:j+16], and dresidual where there is one; `streamed` only where both are equally aligned."""
    g = gradient(dyp, mp, j)
    xmu = apart(xp, load(xp, j), coefficients[0], coefficients[1])
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
def apply_some(xp, dyp, dxp, drp, mp, w, frozen, j, n, coefficients):
    g = gradient_some(dyp, mp, j, n)
    xmu = apart(xp, load_some(xp, j, n), coefficients[0], coefficients[1])
    v = slope(g, xmu, coefficients, w, frozen)
    store_some(dxp, j, v, n)
    if drp is not None:
        store_some(drp, j, g, n)


@inline
def coefficient_vectors(xp, table, grads, c):
    mean, low = splat(table[MEAN, c]), splat(table[LOW, c])
    a, b, d = splat(grads[COEF_A, c]), splat(grads[COEF_B, c]), splat(grads[COEF_C, c])
    return mean, low, a, b, joined(xp, d, b, mean)


@inline
def apply_plane(xp, dyp, dxp, drp, mp, wp, frozen, start, stop, coefficients, streamed):
    """dx of start..stop of a plane."""
    j = start
    head = head_of(dxp, start, stop, streamed)
    if head > 0:
        apply_some(xp, dyp, dxp, drp, mp, load_some(wp, j, head), frozen, j, head, coefficients)
        j += head
    while j + LANES <= stop:
        apply(xp, dyp, dxp, drp, mp, load(wp, j), frozen, j, coefficients, streamed)
        j += LANES
    if j < stop:
        apply_some(xp, dyp, dxp, drp, mp, load_some(wp, j, stop - j), frozen, j, stop - j, coefficients)


@inline
def apply_and_reduce(
    xp, dyp, dxp, drp, mp, wp, coefficients, streamed,
    x_ahead, dy_ahead, m_ahead, left, x_after, dy_after, weight, mean, low, sums, S,
):  # fmt: skip
    """The fused sweep: dx of the plane at xp, which is in the cache, and the sums of the plane ahead, which is in memory."""
    head = head_of(dxp, 0, S, streamed)
    if head > 0:
        apply_some(xp, dyp, dxp, drp, mp, load_some(wp, 0, head), None, 0, head, coefficients)
    i = 0
    j = head
    x_next, dy_next = ahead_of_run(x_ahead, left, x_after), ahead_of_run(dy_ahead, left, dy_after)
    turn = left - PREFETCH if left > PREFETCH else S
    while j + LANES <= S:
        while j + LANES <= S and i < turn:  # as in `normalise_and_gather`
            prefetch(x_next, i)
            prefetch(dy_next, i)
            sums = reduce(x_ahead, dy_ahead, m_ahead, weight, i, mean, low, sums)
            apply(xp, dyp, dxp, drp, mp, load(wp, j), None, j, coefficients, streamed)
            i += LANES
            j += LANES
        x_next, dy_next, turn = moved(x_after, PREFETCH - left), moved(dy_after, PREFETCH - left), S
    if j < S:
        apply_some(xp, dyp, dxp, drp, mp, load_some(wp, j, S - j), None, j, S - j, coefficients)
    return reduce_plane(x_ahead, dy_ahead, m_ahead, weight, i, S, mean, low, sums)


# -------------------------------------------------------------------------------------------------------------- kernels


@inline
def clear_sums(scratch, row):
    zero = splat(0.0)
    save_sums(scratch, row, (zero, zero, zero))


def backward_planes(thread, first, last, x, dy, dx, dresidual, weight, mask, N, S, table, grads, count, scratch, group, streamed):
    """Training backward of the channels first..last: dx, dresidual, and the rows of grads.

    The group of channels at hand is written while the next group is reduced.
    """
    mine = scratch[thread]
    # sums of the first group
    for c in range(first, min(first + group, last)):
        clear_sums(mine, c - first)
    for n in range(N):
        for c in range(first, min(first + group, last)):
            mean, low, sums = splat(table[MEAN, c]), splat(table[LOW, c]), load_sums(mine, c - first)
            mp = plane(mask, n, c)
            save_sums(mine, c - first, reduce_plane(plane(x, n, c), plane(dy, n, c), mp, weight, 0, S, mean, low, sums))

    for start in range(first, last, group):
        stop = min(start + group, last)
        # from sums to coefficients
        for c in range(start, stop):
            sums = load_sums(mine, c - start)
            finish_channel_backward(table, grads, c, sum_lanes(sums[0]), sum_lanes(sums[1]), count, False)
            clear_sums(mine, c - start)
        # dx of this group, sums of the next
        for n in range(N):
            wp = plane(weight, n, 0)
            for c in range(start, stop):
                xp, dyp, dxp = plane(x, n, c), plane(dy, n, c), plane(dx, n, c)
                coefficients = coefficient_vectors(xp, table, grads, c)
                drp, mp = plane(dresidual, n, c), plane(mask, n, c)
                if c + group < last:
                    a = c + group
                    ahead, dy_ahead, m_ahead = plane(x, n, a), plane(dy, n, a), plane(mask, n, a)
                    mean, low, sums = splat(table[MEAN, a]), splat(table[LOW, a]), load_sums(mine, c - start)
                    left = (min(stop + group, last) - a) * S
                    x_after, dy_after = plane(x, n + 1, start + group), plane(dy, n + 1, start + group)
                    sums = apply_and_reduce(
                        xp, dyp, dxp, drp, mp, wp, coefficients, streamed,
                        ahead, dy_ahead, m_ahead, left, x_after, dy_after, weight, mean, low, sums, S,
                    )  # fmt: skip
                    save_sums(mine, c - start, sums)
                else:
                    apply_plane(xp, dyp, dxp, drp, mp, wp, None, 0, S, coefficients, streamed)
    if streamed:
        fence()
    return 0


def reduce_planes(thread, first, last, x, dy, weight, mask, N, S, table, partial, planes_a_block, segment):
    """Both sums of blocks first..last, into the first two numbers of a row of partial; blocks as in stats_planes."""
    segments = (S + segment - 1) // segment
    blocks = partial.shape[1]
    for task in range(first, last):
        c, b = task // blocks, task % blocks
        mean, low, zero = splat(table[MEAN, c]), splat(table[LOW, c]), splat(0.0)
        sums = (zero, zero, zero)
        start = (b % segments) * segment
        stop = min(start + segment, S)
        n_first = b // segments * planes_a_block
        for n in range(n_first, min(n_first + planes_a_block, N)):
            mp = plane(mask, n, c)
            sums = reduce_plane(plane(x, n, c), plane(dy, n, c), mp, weight, start, stop, mean, low, sums)
        partial[c, b, 0] = sum_lanes(sums[0])
        partial[c, b, 1] = sum_lanes(sums[1])
    return 0


def apply_planes(thread, first, last, x, dy, dx, dresidual, weight, mask, frozen, C, S, table, grads, segment, streamed):
    """dx and dresidual from the rows COEF_A to COEF_C of grads, for segments first..last in memory order."""
    segments = (S + segment - 1) // segment
    for task in range(first, last):
        start = (task % segments) * segment
        stop = min(start + segment, S)
        c = task // segments % C
        n = task // segments // C
        drp, mp, wp = plane(dresidual, n, c), plane(mask, n, c), plane(weight, n, 0)
        xp = plane(x, n, c)
        coefficients = coefficient_vectors(xp, table, grads, c)
        apply_plane(xp, plane(dy, n, c), plane(dx, n, c), drp, mp, wp, frozen, start, stop, coefficients, streamed)
    if streamed:
        fence()
    return 0
