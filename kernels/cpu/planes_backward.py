"""Backward kernels for planes: channels first, each (n, c) a contiguous run of S values. Twin: kernels/cuda/planes_backward.py.

With g = dy where the ReLU passed and 0 elsewhere, a channel needs two sums, of g and of g * (x - mean); then

    dx = A * g + B * (x - mean) + C,   dresidual = g,

in float64 lanes for float32 too: float32 would lose the bound where B * (x - mean) is much larger than A * g, which takes one outlier.

Of float16 and bfloat16, whose dx is rounded to 11 bits or 8, dx and its sums are computed in float32 lanes (the option `lanes32`).
Each 128 values, 8 a lane, are summed in float32 and then added to float64: that is 8 roundings of 6e-8 at most. x - mean is
taken around the mean in float32; what that leaves out is put right in the sum, and in C. Beside the sums goes the largest g, which
tells whether float32 has room for the products (`float32_products_hold` in formulas.py). What has not is computed again, in float64 lanes,
before anything is written: dx may take the place of dy.

Versions, in passes over memory (the floor is three):

1. two sweeps over the whole tensors: five passes over memory, six with ordinary stores;
2. channel by channel, so that the second sweep reads the cache, with streaming stores: three;
3. `backward_planes`, the fused sweep, as in the forward: dx of one group of channels, sums of the next;
4. float32 lanes for half types: 32x512x28x28 in 0.66 of the time in float64 lanes, 8x64x56x56 on one thread in 0.5 (float16; both in turn).
"""

from fastbn.kernels.cpu.channels import COEF_A, COEF_B, COEF_C, LOW, MEAN, finish_channels_backward, suits_float32
from fastbn.kernels.cpu.gradients import add_products, apply, apply_masked, close_sums, gradient, gradient_masked, open_sums
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.planes import PREFETCH, head_of, prefetch_pointer
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
from fastbn.kernels.cpu.sums import LARGEST, load_sums, save_sums

# A scalar of a scratch row, behind three vectors of sums: whether float32 lanes do not do for the channel.
LEFT_OUT = 3 * LANES

# ------------------------------------------------------------------------------------------------------ sums over a plane


@inline
def reduce(xp, dyp, mp, weight, j, mean, low, part):
    return add_products(part, gradient(dyp, mp, j, mean), deviation(xp, load_like(xp, j, mean), mean, low), weight)


@inline
def reduce_masked(xp, dyp, mp, weight, j, n, mean, low, part):
    xmu = first_lanes(deviation(xp, load_masked_like(xp, j, n, mean), mean, low), n)
    return add_products(part, gradient_masked(dyp, mp, j, n, mean), xmu, weight)


@inline
def reduce_tail(xp, dyp, mp, weight, start, stop, mean, low, sums, part):
    """Both sums over start..stop of a plane, with a part that has been begun."""
    j = start
    while j < stop:
        full = sum_end(j, mean)
        end = min(full, stop)
        while j + LANES <= end:
            part = reduce(xp, dyp, mp, weight, j, mean, low, part)
            j += LANES
        if j < end:
            part = reduce_masked(xp, dyp, mp, weight, j, end - j, mean, low, part)
            j = end
        if j == full:
            sums = close_sums(sums, part)
            part = open_sums(sums, mean)
    return close_sums(sums, part)


@inline
def reduce_plane(xp, dyp, mp, weight, start, stop, mean, low, sums):
    """Both sums over start..stop of a plane."""
    return reduce_tail(xp, dyp, mp, weight, start, stop, mean, low, sums, open_sums(sums, mean))


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
    while j + LANES <= stop:
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
    part = open_sums(sums, mean)
    while j + LANES <= S:  # as in `normalise_and_gather`
        if i >= turn:
            x_next, dy_next, turn = moved(x_after, PREFETCH - left), moved(dy_after, PREFETCH - left), S
        full = sum_end(i, mean)
        end = min(full, turn)
        while j + LANES <= S and i < end:
            prefetch(x_next, i)
            prefetch(dy_next, i)
            part = reduce(x_ahead, dy_ahead, m_ahead, weight, i, mean, low, part)
            apply(xp, dyp, dxp, drp, mp, load(wp, j), None, j, coefficients, streamed)
            i += LANES
            j += LANES
        if i == full:
            sums = close_sums(sums, part)
            part = open_sums(sums, mean)
    if j < S:
        apply_masked(xp, dyp, dxp, drp, mp, load_masked(wp, j, S - j), None, j, S - j, coefficients)
    return reduce_tail(x_ahead, dy_ahead, m_ahead, weight, i, S, mean, low, sums, part)


# -------------------------------------------------------------------------------------------------------------- kernels


@inline
def clear_totals(scratch, row):
    zero = splat(0.0)
    save_totals(scratch, row, (zero, zero, zero))


@inline
def load_totals(scratch, row, lanes):
    """The sums, and the largest g in the lanes that the gradient has."""
    s, p = load_sums(scratch, row)
    return s, p, rounded(load(vectors(scratch, row), LARGEST), lanes)


@inline
def save_totals(scratch, row, totals):
    save_sums(scratch, row, (totals[0], totals[1]))
    store(vectors(scratch, row), LARGEST, totals[2])


@inline
def reduce_channel(x, dy, weight, mask, table, c, n_first, n_last, start, stop, lanes):
    """Both sums over start..stop of a channel's planes n_first..n_last, and the largest g there."""
    mean, low = mean_vectors(table, c, lanes)
    zero = splat(0.0)
    sums = (zero, zero, rounded(zero, lanes))
    for n in range(n_first, n_last):
        sums = reduce_plane(plane(x, n, c), plane(dy, n, c), plane(mask, n, c), weight, start, stop, mean, low, sums)
    return totals_of(sums)


@inline
def totals_of(sums):
    """Sums and largest g of a channel, from those of its lanes."""
    return sum_lanes(sums[0]), sum_lanes(sums[1]), largest_lane(sums[2])


@inline
def set_sums(partial, block, c, totals):
    """The sums of a block of channel c."""
    partial[block, 0, c], partial[block, 1, c], partial[block, 2, c] = totals


# Numba drops the branches of an argument that is None, not those of a part of an argument: hence the two helpers.


@inline
def reduce_again(gradients, channels, table, grads, c, N, S, count, partial, scratch, row, lanes32):
    """The sums and coefficients of a channel that float32 sums do not suit, in float64."""
    if lanes32 is not None:
        left_out = not suits_float32(table, grads, partial, c, 1, count)
        scratch[row, LEFT_OUT] = left_out
        if left_out:
            x, dy, _, _, weight, mask = gradients
            set_sums(partial, 0, c, reduce_channel(x, dy, weight, mask, table, c, 0, N, 0, S, True))
            finish_channels_backward(table, grads, channels, partial, c, c + 1, 1, count, False, None)


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
                reduce_again(gradients, channels, table, grads, c, N, S, count, partial, mine, c - start, lanes32)
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
                        sums = reduce_plane(ahead, dy_ahead, m_ahead, weight, 0, S, mean, low, sums)
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
    segments = (S + segment - 1) // segment
    for task in range(first, last):
        start = (task % segments) * segment
        stop = min(start + segment, S)
        c = task // segments % C
        n = task // segments // C
        drp, mp, wp = plane(dresidual, n, c), plane(mask, n, c), plane(weight, n, 0)
        xp = plane(x, n, c)
        coefficients = coefficient_vectors(xp, table, grads, c, lanes32)
        apply_plane(xp, plane(dy, n, c), plane(dx, n, c), drp, mp, wp, frozen, start, stop, coefficients, streamed)
    if streamed:
        fence()
    return 0
