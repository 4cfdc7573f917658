"""Forward kernels for planes: channels first, each (n, c) a contiguous run of S values. Twin: kernels/cuda/planes.py.

Versions:

1. statistics sweep, then normalising sweep over the whole tensor: reads x twice from memory, and y before writing it;
2. channel by channel: a channel fits L2, so the second sweep reads the cache; streaming stores: y is not read before it is written;
3. `forward_planes`, the fused sweep: one loop normalises channel c out of the cache and gathers the moments of a channel ahead
   from memory, so that reads and streaming writes overlap as in a copy;
4. groups of channels, so that short planes form longer runs, and software prefetch across the ends of runs. 32x256x56x56 float32
   on 2 threads of an AVX-512 machine: from 3.1 times a streaming copy's time to 1.3;
5. output in float32 lanes where they are good enough (`float32_anchor` in formulas.py): inference from 1.12 to 1.04; half types, which
   move half the bytes, from 1.1 times float32's speed to 1.6 and more;
6. a residual is prefetched as what is read once, so that x stays in the caches: 32x512x28x28 with one in 0.93 of the time.

A tensor is a tuple (pointer, stride of n, stride of c), in elements. A `table` row holds one float64 per channel. Optional
arguments are None or present, and Numba compiles one variant for each choice: no branch is left in the loops.

Moments are gathered around a shift K that is a value of the channel, so that nothing cancels, in float64; a block of about 65,000
values is summed, then merged with the blocks before it (Chan, Golub and LeVeque 1983). `counts` are the sums of the blocks' weights, which
the host knows, or None. `wide` says in which lanes y is computed: None
for float32, for those channels alone that fit; True for float64; False for float64, and for those channels alone that did not fit.
"""

from fastbn.kernels.cpu.channels import ANCHOR, BETA, LOW, MEAN, SCALE, finish_channel, off_centre, shift_of_channel, takes
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    bias,
    bits_above_zero,
    centre,
    fence,
    keep,
    lanes_to_boundary,
    load,
    load_some,
    moved,
    only,
    plane,
    prefetch,
    prefetch_once,
    put_bits,
    read,
    read_some,
    rounded,
    splat,
    store,
    store_some,
    stream,
)
from fastbn.kernels.cpu.sums import (
    AVERAGE,
    COUNT,
    M2,
    SHIFT,
    add_value,
    block_moments,
    close_block,
    load_sums,
    open_channel,
    save_sums,
)

# Values between a load and the prefetch of what comes, into the next run where this one ends: a plane of 12 KB is too short for the
# hardware's prefetcher (32x256x56x56: 3.1 times a streaming copy without, 1.3 with; 1024 to 8192 differ by less than a tenth).
PREFETCH = 2048


# ---------------------------------------------------------------------------------------------------- moments of a plane


@inline
def gather(xp, wp, j, shift, sums):
    e = load(xp, j) - shift
    return add_value(sums, e, load(wp, j))


@inline
def gather_some(xp, wp, j, n, shift, sums):
    e = keep(load_some(xp, j, n) - shift, n)
    return add_value(sums, e, load_some(wp, j, n))


@inline
def gather_plane(xp, wp, start, stop, shift, sums):
    """Sums of xp[start:stop] around shift."""
    k = splat(shift)
    j = start
    while j + LANES <= stop:
        sums = gather(xp, wp, j, k, sums)
        j += LANES
    if j < stop:
        sums = gather_some(xp, wp, j, stop - j, k, sums)
    return sums


@inline
def gather_planes(x, weight, c, n_first, n_last, start, stop, shift):
    """Sums of start..stop of a channel's planes n_first..n_last around shift."""
    zero = splat(0.0)
    sums = (zero, zero)
    for n in range(n_first, n_last):
        sums = gather_plane(plane(x, n, c), plane(weight, n, 0), start, stop, shift, sums)
    return sums


@inline
def count_of(counts, block, elements):
    """The sum of a block's weights, or how many values it has."""
    return float(elements) if counts is None else counts[block]


@inline
def end_block(x, weight, count, c, n_first, n_last, S, scratch, row):
    """From the sums of the planes n_first..n_last of a channel to moments, which are merged with those of the blocks before."""
    shift = scratch[row, SHIFT]
    d, m2 = block_moments(load_sums(scratch, row), count)
    if off_centre(x, count, d, m2):
        centre = shift + d
        d, m2 = block_moments(gather_planes(x, weight, c, n_first, n_last, 0, S, centre), count)
        if scratch[row, COUNT] == 0.0:
            scratch[row, SHIFT] = centre
        else:
            d += centre - shift
    close_block(scratch, row, count, d, m2)


# ------------------------------------------------------------------------------------------------- output of a plane


@inline
def push_bits(mp, carry, j, bits, n):
    """Append n bits at position j of a plane's mask: a word is written when it is full, the rest is carried on."""
    carry |= bits << (j & 15)
    if (j & 15) + n >= LANES:
        put_bits(mp, j >> 4, carry)
        carry >>= LANES
    return carry


@inline
def activate(v, relu, mp, carry, j, n):
    """ReLU that lets NaN through, and its mask where the backward needs one."""
    if relu is not None:
        bits = bits_above_zero(v)
        v = only(v, bits)
        if mp is not None:
            if n < LANES:
                bits &= (1 << n) - 1
            carry = push_bits(mp, carry, j, bits, n)
    return v, carry


@inline
def normalise(xp, yp, rp, mp, relu, wide, j, channel, streamed, carry):
    """y[j:j+16] = activation((x - mean) * scale + beta + residual)."""
    mean, low, scale, beta = channel
    v = centre(xp, read(xp, j, wide), mean, low) * scale + beta
    if rp is not None:
        v += read(rp, j, wide)
    v, carry = activate(v, relu, mp, carry, j, LANES)
    if streamed:
        stream(yp, j, v)
    else:
        store(yp, j, v)
    return carry


@inline
def normalise_some(xp, yp, rp, mp, relu, wide, j, n, channel, carry):
    mean, low, scale, beta = channel
    v = centre(xp, read_some(xp, j, n, wide), mean, low) * scale + beta
    if rp is not None:
        v += read_some(rp, j, n, wide)
    v, carry = activate(v, relu, mp, carry, j, n)
    store_some(yp, j, v, n)
    return carry


@inline
def flush_bits(mp, carry, stop):
    if mp is not None and stop & 15:
        put_bits(mp, stop >> 4, carry)


@inline
def channel_vectors(table, c, wide):
    """(mean, its second word, scale, bias) of a channel, in the lanes that `wide` stands for."""
    mean, low, scale, beta = splat(table[MEAN, c]), splat(table[LOW, c]), splat(table[SCALE, c]), splat(table[BETA, c])
    anchor = splat(table[ANCHOR if wide is None else MEAN, c])
    return rounded(anchor, wide), rounded(low, wide), rounded(scale, wide), rounded(bias(beta, mean, anchor, scale, wide), wide)


@inline
def head_of(yp, start, stop, streamed):
    """How many values come before the first that may be streamed."""
    return min(lanes_to_boundary(moved(yp, start)), stop - start) if streamed else 0


@inline
def normalise_plane(xp, yp, rp, mp, relu, wide, start, stop, channel, streamed):
    """One plane, or the part start..stop of it (start a multiple of 16 where there is a mask)."""
    carry = 0
    j = start
    head = head_of(yp, start, stop, streamed)
    if head > 0:
        carry = normalise_some(xp, yp, rp, mp, relu, wide, j, head, channel, carry)
        j += head
    while j + LANES <= stop:
        carry = normalise(xp, yp, rp, mp, relu, wide, j, channel, streamed, carry)
        j += LANES
    if j < stop:
        carry = normalise_some(xp, yp, rp, mp, relu, wide, j, stop - j, channel, carry)
    flush_bits(mp, carry, stop)


@inline
def ahead_of_run(p, left, after):
    """What to prefetch at p, of which `left` values remain: PREFETCH values on, or in the next run. Of None: nothing."""
    return moved(p, PREFETCH) if left > PREFETCH else moved(after, PREFETCH - left)


@inline
def normalise_and_gather(xp, yp, rp, r_after, mp, relu, wide, channel, streamed, ahead, left, after, wp, shift, sums, S):
    """The fused sweep: y of the plane at xp, which is in the cache, and moments of the plane ahead, which is in memory."""
    carry = 0
    k = splat(shift)
    head = head_of(yp, 0, S, streamed)
    if head > 0:
        carry = normalise_some(xp, yp, rp, mp, relu, wide, 0, head, channel, carry)
    i = 0
    j = head
    x_ahead, r_ahead = ahead_of_run(ahead, left, after), ahead_of_run(rp, left, r_after)
    turn = left - PREFETCH if left > PREFETCH else S
    while j + LANES <= S:
        while j + LANES <= S and i < turn:  # until what is prefetched lies in the next run; a choice for each vector is slower
            prefetch(x_ahead, i)
            prefetch_once(r_ahead, i)
            sums = gather(ahead, wp, i, k, sums)
            carry = normalise(xp, yp, rp, mp, relu, wide, j, channel, streamed, carry)
            i += LANES
            j += LANES
        x_ahead, r_ahead, turn = moved(after, PREFETCH - left), moved(r_after, PREFETCH - left), S
    if j < S:
        carry = normalise_some(xp, yp, rp, mp, relu, wide, j, S - j, channel, carry)
    flush_bits(mp, carry, S)
    # The gathering loop starts at 0 whatever y's alignment: the bits of the sums depend on the shape alone.
    if i + LANES <= S:
        sums = gather(ahead, wp, i, k, sums)
        i += LANES
    if i < S:
        sums = gather_some(ahead, wp, i, S - i, k, sums)
    return sums


# -------------------------------------------------------------------------------------------------------------- kernels


def forward_planes(
    thread, first, last, x, y, residual, weight, counts, mask, relu, wide, N, S, table, eps, points, scratch, group, planes_a_block,
    streamed,
):  # fmt: skip
    """Training forward of the channels first..last: y, and the rows MEAN to SCALE and ANCHOR of the table.

    The group of channels at hand is normalised while the next group is gathered; the first turn gathers only. How many channels do not
    fit float32 lanes: if that is what they were normalised in, their y is to be written again.
    """
    scratch = scratch[thread]
    unfit = 0
    for start in range(first - group, last, group):
        stop = min(start + group, last)
        # from moments to the table
        for c in range(start, stop):
            row = c - start
            if c >= first:
                unfit += finish_channel(table, c, scratch[row, SHIFT], scratch[row, COUNT], scratch[row, AVERAGE], scratch[row, M2], eps)
            if c + group < last:
                open_channel(scratch, row, shift_of_channel(x, c + group, points))
        # y of this group, moments of the next
        for n in range(N):
            wp = plane(weight, n, 0)
            for c in range(start, stop):
                row, a = c - start, c + group
                if a < last:
                    ahead, shift, sums = plane(x, n, a), scratch[row, SHIFT], load_sums(scratch, row)
                    if c >= first:
                        left, after = (min(stop + group, last) - a) * S, plane(x, n + 1, start + group)
                        sums = normalise_and_gather(
                            plane(x, n, c), plane(y, n, c), plane(residual, n, c), plane(residual, n + 1, start), plane(mask, n, c),
                            relu, wide, channel_vectors(table, c, wide), streamed, ahead, left, after, wp, shift, sums, S,
                        )  # fmt: skip
                    else:
                        sums = gather_plane(ahead, wp, 0, S, shift, sums)
                    save_sums(scratch, row, sums)
                    if (n + 1) % planes_a_block == 0 or n + 1 == N:
                        begin = n // planes_a_block * planes_a_block
                        count = count_of(counts, n // planes_a_block, (n + 1 - begin) * S)
                        end_block(x, weight, count, a, begin, n + 1, S, scratch, row)
                elif c >= first:
                    xp, yp, rp, mp = plane(x, n, c), plane(y, n, c), plane(residual, n, c), plane(mask, n, c)
                    normalise_plane(xp, yp, rp, mp, relu, wide, 0, S, channel_vectors(table, c, wide), streamed)
    if streamed:
        fence()
    return unfit


def stats_planes(thread, first, last, x, weight, counts, N, S, partial, points, planes_a_block, segment):
    """Moments of blocks first..last; block = channel * blocks + k. A row of partial is (count, mean - shift, M2, shift).

    A block is `planes_a_block` whole planes, or, where a plane is longer than `segment`, one segment of a plane.
    """
    segments = (S + segment - 1) // segment
    blocks = partial.shape[1]
    for task in range(first, last):
        c, b = task // blocks, task % blocks
        start = (b % segments) * segment
        stop = min(start + segment, S)
        n_first = b // segments * planes_a_block
        n_last = min(n_first + planes_a_block, N)
        count = count_of(counts, b, (n_last - n_first) * (stop - start))
        shift = shift_of_channel(x, c, points)
        d, m2 = 0.0, 0.0
        for attempt in range(2):
            d, m2 = block_moments(gather_planes(x, weight, c, n_first, n_last, start, stop, shift), count)
            if attempt == 1 or not off_centre(x, count, d, m2):
                break
            shift += d
        partial[c, b, 0], partial[c, b, 1], partial[c, b, 2], partial[c, b, 3] = count, d, m2, shift
    return 0


def normalise_planes(thread, first, last, x, y, residual, mask, relu, wide, C, S, table, segment, streamed):
    """y from the rows MEAN, LOW, SCALE and BETA of the table, for segments first..last; segments are counted in memory order."""
    segments = (S + segment - 1) // segment
    for task in range(first, last):
        start = (task % segments) * segment
        stop = min(start + segment, S)
        c = task // segments % C
        n = task // segments // C
        if takes(table, c, wide):
            rp, mp = plane(residual, n, c), plane(mask, n, c)
            normalise_plane(plane(x, n, c), plane(y, n, c), rp, mp, relu, wide, start, stop, channel_vectors(table, c, wide), streamed)
    if streamed:
        fence()
    return 0
