"""Backward kernels for planes: channels first, each (n, c) a contiguous run of S values. Twin: kernels/cuda/planes_backward.py.

With g = dy where the ReLU passed and 0 elsewhere, a channel needs two sums, of g and of g * (x - mean); then

    dx = A * g + B * (x - mean) + C,   dresidual = g,

in float64 lanes for float32 too, where memory takes the time.

In float32 lanes (the option `lanes32`) are computed dx and its sums of float16 and bfloat16, whose dx is rounded to 11 bits or 8, and of
float32 in planes_cached.py, where arithmetic takes the time. Parts of 224 values, 14 a lane, are summed in float32 and then added to
float64. x - mean is taken around the mean in float32; what that leaves out is put right in the sum, and in C. Beside the sums go the
largest g and, of float32, the largest x - mean. They tell whether float32 has room for the products, and whether dx keeps the bound
(`float32_products_hold` in formulas.py): not where B * (x - mean) is much larger than A * g, which takes one outlier. Such a channel is
computed again, in float64 lanes, before anything of it is written: dx may take the place of dy. With the largest values in tow a sum
from memory takes 1.13 times as long, for more instructions between two loads: hence float64 there.

Versions, in passes over memory (the floor is three):

1. two sweeps over the whole tensors: five passes over memory, six with ordinary stores;
2. channel by channel, so that the second sweep reads the cache, with streaming stores: three;
3. `backward_planes`, the fused sweep, as in the forward: dx of one group of channels, sums of the next;
4. float32 lanes for half types: 32x512x28x28 in 0.66 of the time in float64 lanes, 8x64x56x56 on one thread in 0.5 (float16; both in turn);
5. counted loops, which LLVM unrolls: in float32 lanes the fused sweep of 32x64x56x56 from 1.12 times its time in float64 lanes to 1.0.
"""

from fastbn.kernels.cpu.channels import COEF_A, COEF_B, COEF_C, LOW, MEAN, finish_channels_backward, suits_float32
from fastbn.kernels.cpu.gradients import add_products, apply, apply_masked, close_sums, gradient, gradient_masked, open_sums
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.planes import PREFETCH, head_of, next_segment, prefetch_pointer, segment_of
from fastbn.kernels.cpu.simd import (
    LANES,
    constant_term,
    deviation,
    fence,
    first_lanes,
    lanes64_unless,
    largest_lane,
    load,
    load_like,
    load_masked,
    load_masked_like,
    moved,
    plane,
    prefetch,
    rounded,
    splat,
    store,
    sum_end,
    sum_lanes,
    vectors,
)
from fastbn.kernels.cpu.sums import FARTHEST, LARGEST, load_sums, save_sums

# A scalar of a scratch row, behind four vectors of sums: whether float32 lanes do not do for the channel.
LEFT_OUT = 4 * LANES

# ------------------------------------------------------------------------------------------------------ sums over a plane


@inline
def reduce(xp, dyp, mp, weight, j, mean, low, part):
    return add_products(xp, part, gradient(dyp, mp, j, mean), deviation(xp, load_like(xp, j, mean), mean, low), weight)


@inline
def reduce_masked(xp, dyp, mp, weight, j, n, mean, low, part):
    xmu = first_lanes(deviation(xp, load_masked_like(xp, j, n, mean), mean, low), n)
    return add_products(xp, part, gradient_masked(dyp, mp, j, n, mean), xmu, weight)


@inline
def reduce_plane(xp, dyp, mp, weight, start, stop, mean, low, x_ahead, dy_ahead, sums):
    """Both sums over start..stop of a plane; x_ahead and dy_ahead are prefetched meanwhile, or None."""
    j = start
    while j < stop:
        part = open_sums(sums, mean)
        end = min(sum_end(j, mean), stop)
        for _ in range((end - j) // LANES):
            prefetch(x_ahead, j)
            prefetch(dy_ahead, j)
            part = reduce(xp, dyp, mp, weight, j, mean, low, part)
            j += LANES
        if j < end:
            part = reduce_masked(xp, dyp, mp, weight, j, end - j, mean, low, part)
            j = end
        sums = close_sums(sums, part)
    return sums


# ------------------------------------------------------------------------------------------------------------ dx of a plane


@inline
def mean_vectors(table, c, lanes):
    """The mean of a channel, and its second word."""
    return rounded(splat(table[MEAN, c]), lanes), rounded(splat(table[LOW, c]), lanes)


@inline
def coefficient_vectors(xp, table, grads, c, lanes32):
    lanes = lanes64_unless(lanes32)
    mean, low = mean_vectors(table, c, lanes)
    a, b, d = splat(grads[COEF_A, c]), splat(grads[COEF_B, c]), splat(grads[COEF_C, c])
    d = constant_term(xp, d, b, splat(table[MEAN, c]), lanes32)
    return mean, low, rounded(a, lanes), rounded(b, lanes), rounded(d, lanes)


@inline
def apply_plane(xp, dyp, dxp, drp, mp, wp, frozen, start, stop, coefficients, streamed):
    """dx of start..stop of a plane."""
    j = start
    head = head_of(dxp, start, stop, streamed)
    if head > 0:
        apply_masked(xp, dyp, dxp, drp, mp, load_masked(wp, j, head), frozen, j, head, coefficients)
        j += head
    for _ in range((stop - j) // LANES):
        apply(xp, dyp, dxp, drp, mp, load(wp, j), frozen, j, coefficients, streamed)
        j += LANES
    if j < stop:
        apply_masked(xp, dyp, dxp, drp, mp, load_masked(wp, j, stop - j), frozen, j, stop - j, coefficients)


@inline
def apply_and_reduce(
    xp, dyp, dxp, drp, mp, wp, coefficients, streamed,
    x_ahead, dy_ahead, m_ahead, left, x_after, dy_after, weight, mean, low, sums, S,
):  # fmt: skip
    """The fused sweep: dx of the plane at xp, which is in the cache, and the sums of the plane ahead, which is in memory."""
    head = head_of(dxp, 0, S, streamed)
    if head > 0:
        apply_masked(xp, dyp, dxp, drp, mp, load_masked(wp, 0, head), None, 0, head, coefficients)
    i = 0
    j = head
    x_next, dy_next = prefetch_pointer(x_ahead, left, x_after), prefetch_pointer(dy_ahead, left, dy_after)
    turn = left - PREFETCH if left > PREFETCH else S
    while i < S:
        part = open_sums(sums, mean)
        full = min(sum_end(i, mean), S)
        while j + LANES <= S and i < full:  # as in `normalise_and_gather`
            if i >= turn:
                x_next, dy_next, turn = moved(x_after, PREFETCH - left), moved(dy_after, PREFETCH - left), S
            for _ in range(min(-(-(min(full, turn) - i) // LANES), (S - j) // LANES)):
                prefetch(x_next, i)
                prefetch(dy_next, i)
                part = reduce(x_ahead, dy_ahead, m_ahead, weight, i, mean, low, part)
                apply(xp, dyp, dxp, drp, mp, load(wp, j), None, j, coefficients, streamed)
                i += LANES
                j += LANES
        while i < full:
            part = reduce_masked(x_ahead, dy_ahead, m_ahead, weight, i, min(full - i, LANES), mean, low, part)
            i += LANES
        sums = close_sums(sums, part)
    if j < S:
        apply_masked(xp, dyp, dxp, drp, mp, load_masked(wp, j, S - j), None, j, S - j, coefficients)
    return sums


# -------------------------------------------------------------------------------------------------------------- kernels


@inline
def clear_totals(scratch, row):
    zero = splat(0.0)
    save_totals(scratch, row, (zero, zero, zero, zero))


@inline
def load_totals(scratch, row, lanes):
    """The sums, and the largest g and x - mean in the lanes that these have."""
    s, p = load_sums(scratch, row)
    at = vectors(scratch, row)
    return s, p, rounded(load(at, LARGEST), lanes), rounded(load(at, FARTHEST), lanes)


@inline
def save_totals(scratch, row, totals):
    save_sums(scratch, row, (totals[0], totals[1]))
    store(vectors(scratch, row), LARGEST, totals[2])
    store(vectors(scratch, row), FARTHEST, totals[3])


@inline
def plane_ahead(x, n, c, first, last, size):
    """What to prefetch while `size` values of plane n are read, one of first..last of channel c: PREFETCH values on or so."""
    if size > PREFETCH:
        return moved(plane(x, n, c), PREFETCH)
    m = n + PREFETCH // size + 1
    if m < last:
        return plane(x, m, c)
    return plane(x, m - last + first, c + 1)


@inline
def reduce_channel(x, dy, weight, mask, table, c, n_first, n_last, start, stop, lanes):
    """Both sums over start..stop of a channel's planes n_first..n_last, and the largest g and x - mean there."""
    mean, low = mean_vectors(table, c, lanes)
    zero = splat(0.0)
    sums = (zero, zero, rounded(zero, lanes), rounded(zero, lanes))
    for n in range(n_first, n_last):
        x_ahead, dy_ahead = plane_ahead(x, n, c, n_first, n_last, stop - start), plane_ahead(dy, n, c, n_first, n_last, stop - start)
        sums = reduce_plane(plane(x, n, c), plane(dy, n, c), plane(mask, n, c), weight, start, stop, mean, low, x_ahead, dy_ahead, sums)
    return totals_of(sums)


@inline
def totals_of(sums):
    """Sums and largest values of a channel, from those of its lanes."""
    return sum_lanes(sums[0]), sum_lanes(sums[1]), largest_lane(sums[2]), largest_lane(sums[3])


@inline
def set_sums(partial, block, c, totals):
    """The sums of a block of channel c."""
    partial[block, 0, c], partial[block, 1, c], partial[block, 2, c], partial[block, 3, c] = totals


# Numba drops the branches of an argument that is None, not those of a part of an argument: hence the two helpers.


@inline
def reduce_again(gradients, channels, table, grads, c, N, S, count, partial, lanes32):
    """The sums and coefficients of a channel that float32 sums do not suit, in float64; whether it is one."""
    if lanes32 is not None:  # noqa: SIM102
        if not suits_float32(table, grads, partial, c, 1, count):
            x, dy, _, _, weight, mask = gradients
            set_sums(partial, 0, c, reduce_channel(x, dy, weight, mask, table, c, 0, N, 0, S, True))
            finish_channels_backward(table, grads, channels, partial, c, c + 1, 1, count, False, None)
            return True
    return False


@inline
def apply_again(xp, dyp, dxp, drp, mp, wp, table, grads, c, S, scratch, row, streamed, lanes32):
    """dx of a plane of such a channel, in float64 lanes; whether it is one."""
    if lanes32 is not None:  # noqa: SIM102
        if scratch[row, LEFT_OUT]:
            apply_plane(xp, dyp, dxp, drp, mp, wp, None, 0, S, coefficient_vectors(xp, table, grads, c, None), streamed)
            return True
    return False


def backward_planes(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """Training backward of the channels first..last: dx, dresidual, and the rows of grads.

    The group of channels at hand is written while the next group is reduced; the first turn reduces only. A channel that does not suit
    float32 sums is reduced again, and written, in float64 lanes.
    """
    x, dy, dx, dresidual, weight, mask = gradients
    _, lanes32 = options
    N, S, group, count, streamed = shape.N, shape.S, shape.group, numbers.count, numbers.streamed
    mine = scratch[thread]
    lanes = lanes64_unless(lanes32)
    for start in range(first - group, last, group):
        stop = min(start + group, last)
        # from sums to coefficients
        if start >= first:
            for c in range(start, stop):
                set_sums(partial, 0, c, totals_of(load_totals(mine, c - start, lanes)))
            finish_channels_backward(table, grads, channels, partial, start, stop, 1, count, False, lanes32)
            for c in range(start, stop):
                mine[c - start, LEFT_OUT] = reduce_again(gradients, channels, table, grads, c, N, S, count, partial, lanes32)
        for row in range(stop - start):
            clear_totals(mine, row)
        # dx of this group, sums of the next
        for n in range(N):
            wp = plane(weight, n, 0)
            for c in range(start, stop):
                row, a = c - start, c + group
                xp, dyp, dxp = plane(x, n, c), plane(dy, n, c), plane(dx, n, c)
                drp, mp = plane(dresidual, n, c), plane(mask, n, c)
                to_write = c >= first
                if to_write and apply_again(xp, dyp, dxp, drp, mp, wp, table, grads, c, S, mine, row, streamed, lanes32):
                    to_write = False
                if a < last:
                    ahead, dy_ahead, m_ahead = plane(x, n, a), plane(dy, n, a), plane(mask, n, a)
                    mean, low = mean_vectors(table, a, lanes)
                    sums = load_totals(mine, row, lanes)
                    if to_write:
                        left = (min(stop + group, last) - a) * S
                        x_after, dy_after = plane(x, n + 1, start + group), plane(dy, n + 1, start + group)
                        sums = apply_and_reduce(
                            xp, dyp, dxp, drp, mp, wp, coefficient_vectors(xp, table, grads, c, lanes32), streamed,
                            ahead, dy_ahead, m_ahead, left, x_after, dy_after, weight, mean, low, sums, S,
                        )  # fmt: skip
                    else:
                        sums = reduce_plane(ahead, dy_ahead, m_ahead, weight, 0, S, mean, low, None, None, sums)
                    save_totals(mine, row, sums)
                elif to_write:
                    apply_plane(xp, dyp, dxp, drp, mp, wp, None, 0, S, coefficient_vectors(xp, table, grads, c, lanes32), streamed)
    if streamed:
        fence()
    return 0


def reduce_planes(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """Both sums of blocks first..last, and the largest g, into partial; blocks as in stats_planes."""
    x, dy, _, _, weight, mask = gradients
    _, lanes32 = options
    N, S, block, segment = shape.N, shape.S, shape.block, shape.segment
    segments = (S + segment - 1) // segment
    blocks = shape.blocks
    for task in range(first, last):
        c, b = task // blocks, task % blocks
        start = (b % segments) * segment
        stop = min(start + segment, S)
        n_first = b // segments * block
        n_last = min(n_first + block, N)
        set_sums(partial, b, c, reduce_channel(x, dy, weight, mask, table, c, n_first, n_last, start, stop, lanes64_unless(lanes32)))
    return 0


def apply_planes(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """dx and dresidual from the rows COEF_A to COEF_C of grads, for segments first..last in memory order."""
    x, dy, dx, dresidual, weight, mask = gradients
    frozen, lanes32 = options
    C, S, segment, streamed = shape.C, shape.S, shape.segment, numbers.streamed
    n, c, start = segment_of(first, C, S, segment)
    for _ in range(first, last):
        stop = min(start + segment, S)
        drp, mp, wp = plane(dresidual, n, c), plane(mask, n, c), plane(weight, n, 0)
        xp = plane(x, n, c)
        coefficients = coefficient_vectors(xp, table, grads, c, lanes32)
        apply_plane(xp, plane(dy, n, c), plane(dx, n, c), drp, mp, wp, frozen, start, stop, coefficients, streamed)
        n, c, start = next_segment(n, c, start, C, S, segment)
    if streamed:
        fence()
    return 0
