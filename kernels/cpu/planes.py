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
6. a residual is prefetched as what is read once, so that x stays in the caches: 32x512x28x28 with one in 0.93 of the time;
7. sample and channel of a task counted, not divided: inference of 128x16x12x12 in 0.86 of the time.

A tensor is a tuple (pointer, stride of n, stride of c), in elements. A `table` row holds one float64 per channel. Optional
arguments are None or present, and Numba compiles one variant for each choice: no branch is left in the loops.

Moments are gathered around a shift K that is a value of the channel, so that nothing cancels, in float64; a block of about 65,000
values is summed, then merged with the blocks before it (Chan, Golub and LeVeque 1983).

The option `lanes64` says in which lanes y is computed. None: in float32 lanes, for those channels alone that fit. True: in float64 lanes,
for all channels, or with the option `leftovers` for those alone that do not fit.
"""

from fastbn.kernels.cpu.channels import ANCHOR, BETA, LOW, MEAN, SCALE, finish_channels, found, is_written, shift_is_far, shift_of_channel
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.simd import (
    LANES,
    bias,
    bits_above_zero,
    deviation,
    fence,
    lanes_to_boundary,
    moved,
    needs_two_words,
    plane,
    prefetch,
    prefetch_once,
    put_bits,
    read,
    read_masked,
    rounded,
    splat,
    store,
    store_masked,
    stream,
    where_bits,
)
from fastbn.kernels.cpu.sums import (
    block_moments,
    end_block,
    gather,
    gather_masked,
    gather_plane,
    gather_planes,
    load_sums,
    open_channel,
    save_sums,
    set_block,
    weight_of_block,
)

# Values between a load and the prefetch of what comes, into the next run where this one ends: a plane of 12 KB is too short for the
# hardware's prefetcher (32x256x56x56: 3.1 times a streaming copy without, 1.3 with; 1024 to 8192 differ by less than a tenth).
PREFETCH = 2048


# ------------------------------------------------------------------------------------------------- output of a plane


@inline
def push_bits(mp, pending_bits, j, bits, n):
    """Append n bits at position j of a plane's mask: a word is written when it is full, the rest is carried on."""
    pending_bits |= bits << (j & 15)
    if (j & 15) + n >= LANES:
        put_bits(mp, j >> 4, pending_bits)
        pending_bits >>= LANES
    return pending_bits


@inline
def activate(v, relu, mp, pending_bits, j, n):
    """ReLU that lets NaN through, and its mask where the backward needs one."""
    if relu is not None:
        bits = bits_above_zero(v)
        v = where_bits(v, bits)
        if mp is not None:
            if n < LANES:
                bits &= (1 << n) - 1
            pending_bits = push_bits(mp, pending_bits, j, bits, n)
    return v, pending_bits


@inline
def normalise(xp, yp, rp, mp, relu, lanes64, j, channel, streamed, pending_bits):
    """y[j:j+16] = activation((x - mean) * scale + beta + residual)."""
    mean, low, scale, beta = channel
    v = deviation(xp, read(xp, j, lanes64), mean, low) * scale + beta
    if rp is not None:
        v += read(rp, j, lanes64)
    v, pending_bits = activate(v, relu, mp, pending_bits, j, LANES)
    if streamed:
        stream(yp, j, v)
    else:
        store(yp, j, v)
    return pending_bits


@inline
def normalise_masked(xp, yp, rp, mp, relu, lanes64, j, n, channel, pending_bits):
    mean, low, scale, beta = channel
    v = deviation(xp, read_masked(xp, j, n, lanes64), mean, low) * scale + beta
    if rp is not None:
        v += read_masked(rp, j, n, lanes64)
    v, pending_bits = activate(v, relu, mp, pending_bits, j, n)
    store_masked(yp, j, v, n)
    return pending_bits


@inline
def flush_bits(mp, pending_bits, stop):
    if mp is not None and stop & 15:
        put_bits(mp, stop >> 4, pending_bits)


@inline
def channel_vectors(table, c, lanes64):
    """(mean, its second word, scale, bias) of a channel, in the lanes that `lanes64` stands for."""
    mean, low, scale, beta = splat(table[MEAN, c]), splat(table[LOW, c]), splat(table[SCALE, c]), splat(table[BETA, c])
    anchor = splat(table[ANCHOR if lanes64 is None else MEAN, c])
    constant = bias(beta, mean, anchor, scale, lanes64)
    return rounded(anchor, lanes64), rounded(low, lanes64), rounded(scale, lanes64), rounded(constant, lanes64)


@inline
def head_of(yp, start, stop, streamed):
    """How many values come before the first that may be streamed."""
    return min(lanes_to_boundary(moved(yp, start)), stop - start) if streamed else 0


@inline
def normalise_plane(xp, yp, rp, mp, relu, lanes64, start, stop, channel, streamed):
    """One plane, or the part start..stop of it (start a multiple of 16 where there is a mask)."""
    pending_bits = 0
    j = start
    head = head_of(yp, start, stop, streamed)
    if head > 0:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, j, head, channel, pending_bits)
        j += head
    while j + LANES <= stop:
        pending_bits = normalise(xp, yp, rp, mp, relu, lanes64, j, channel, streamed, pending_bits)
        j += LANES
    if j < stop:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, j, stop - j, channel, pending_bits)
    flush_bits(mp, pending_bits, stop)


@inline
def prefetch_pointer(p, left, after):
    """What to prefetch at p, of which `left` values remain: PREFETCH values on, or in the next run. Of None: nothing."""
    return moved(p, PREFETCH) if left > PREFETCH else moved(after, PREFETCH - left)


@inline
def normalise_and_gather(xp, yp, rp, r_after, mp, relu, lanes64, channel, streamed, ahead, left, after, wp, shift, sums, S):
    """The fused sweep: y of the plane at xp, which is in the cache, and moments of the plane ahead, which is in memory."""
    pending_bits = 0
    k = splat(shift)
    head = head_of(yp, 0, S, streamed)
    if head > 0:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, 0, head, channel, pending_bits)
    i = 0
    j = head
    x_ahead, r_ahead = prefetch_pointer(ahead, left, after), prefetch_pointer(rp, left, r_after)
    turn = left - PREFETCH if left > PREFETCH else S
    while j + LANES <= S:
        while j + LANES <= S and i < turn:  # until what is prefetched lies in the next run; a choice for each vector is slower
            prefetch(x_ahead, i)
            prefetch_once(r_ahead, i)
            sums = gather(ahead, wp, i, k, sums)
            pending_bits = normalise(xp, yp, rp, mp, relu, lanes64, j, channel, streamed, pending_bits)
            i += LANES
            j += LANES
        x_ahead, r_ahead, turn = moved(after, PREFETCH - left), moved(r_after, PREFETCH - left), S
    if j < S:
        pending_bits = normalise_masked(xp, yp, rp, mp, relu, lanes64, j, S - j, channel, pending_bits)
    flush_bits(mp, pending_bits, S)
    # The gathering loop starts at 0 whatever y's alignment: the bits of the sums depend on the shape alone.
    if i + LANES <= S:
        sums = gather(ahead, wp, i, k, sums)
        i += LANES
    if i < S:
        sums = gather_masked(ahead, wp, i, S - i, k, sums)
    return sums


# ------------------------------------------------------------------------------------------------- segments in memory order


@inline
def segment_of(task, C, S, segment):
    """Sample, channel and first value of a task: segments are counted in memory order."""
    segments = (S + segment - 1) // segment
    index = task // segments
    return index // C, index % C, (task - index * segments) * segment


@inline
def next_segment(n, c, start, C, S, segment):
    """The same of the next task, without divisions: with four of them inference of 32x64x14x14 took 1.12 times as long (one thread)."""
    start += segment
    if start >= S:
        start = 0
        c += 1
        if c == C:
            c = 0
            n += 1
    return n, c, start


# -------------------------------------------------------------------------------------------------------------- kernels


def forward_planes(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Training forward of the channels first..last: y, and the rows MEAN to SCALE and ANCHOR of the table.

    The group of channels at hand is normalised while the next group is gathered; the first turn gathers only. How many channels do not
    fit float32 lanes: if that is what they were normalised in, their y is to be written again.
    """
    x, y, residual, weight, block_weights, mask = data
    relu, lanes64, _ = options
    N, S, group, block = shape.N, shape.S, shape.group, shape.block
    eps, shift_places, streamed = numbers.eps, numbers.shift_places, numbers.streamed
    scratch = scratch[thread]
    left_out = 0
    for start in range(first - group, last, group):
        stop = min(start + group, last)
        # from moments to the table
        if start >= first:
            left_out += finish_channels(table, partial, channels, start, stop, 1, eps)
        for c in range(start + group, min(stop + group, last)):
            open_channel(scratch, c - start - group, partial, c, shift_of_channel(x, c, shift_places))
        # y of this group, moments of the next
        for n in range(N):
            wp = plane(weight, n, 0)
            for c in range(start, stop):
                row, a = c - start, c + group
                if a < last:
                    ahead, shift, sums = plane(x, n, a), partial[0, 3, a], load_sums(scratch, row)
                    if c >= first:
                        left, after = (min(stop + group, last) - a) * S, plane(x, n + 1, start + group)
                        sums = normalise_and_gather(
                            plane(x, n, c), plane(y, n, c), plane(residual, n, c), plane(residual, n + 1, start), plane(mask, n, c),
                            relu, lanes64, channel_vectors(table, c, lanes64), streamed, ahead, left, after, wp, shift, sums, S,
                        )  # fmt: skip
                    else:
                        sums = gather_plane(ahead, wp, 0, S, shift, sums)
                    save_sums(scratch, row, sums)
                    if (n + 1) % block == 0 or n + 1 == N:
                        begin = n // block * block
                        count = weight_of_block(block_weights, n // block, (n + 1 - begin) * S)
                        end_block(x, weight, count, a, begin, n + 1, S, scratch, row, partial)
                elif c >= first:
                    xp, yp, rp, mp = plane(x, n, c), plane(y, n, c), plane(residual, n, c), plane(mask, n, c)
                    normalise_plane(xp, yp, rp, mp, relu, lanes64, 0, S, channel_vectors(table, c, lanes64), streamed)
    if streamed:
        fence()
    return found(left_out, lanes64)


def stats_planes(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """Moments of blocks first..last; block = channel * blocks + k. Each is (count, mean - shift, M2, shift).

    A block is `block` whole planes, or, where a plane is longer than `segment`, one segment of a plane.
    """
    x, _, _, weight, block_weights, _ = data
    N, S, block, segment, shift_places = shape.N, shape.S, shape.block, shape.segment, numbers.shift_places
    segments = (S + segment - 1) // segment
    blocks = shape.blocks
    for task in range(first, last):
        c, b = task // blocks, task % blocks
        start = (b % segments) * segment
        stop = min(start + segment, S)
        n_first = b // segments * block
        n_last = min(n_first + block, N)
        count = weight_of_block(block_weights, b, (n_last - n_first) * (stop - start))
        shift = shift_of_channel(x, c, shift_places)
        d, m2 = 0.0, 0.0
        for attempt in range(2):
            d, m2 = block_moments(gather_planes(x, weight, c, n_first, n_last, start, stop, shift), count)
            if attempt == 1 or not (needs_two_words(x) and shift_is_far(count, d, m2)):
                break
            shift += d
        set_block(partial, b, c, count, d, m2, shift)
    return 0


def normalise_planes(thread, first, last, data, channels, shape, options, numbers, table, partial, scratch):
    """y from the rows MEAN, LOW, SCALE and BETA of the table, for segments first..last; segments are counted in memory order."""
    x, y, residual, _, _, mask = data
    relu, lanes64, leftovers = options
    C, S, segment, streamed = shape.C, shape.S, shape.segment, numbers.streamed
    n, c, start = segment_of(first, C, S, segment)
    for _ in range(first, last):
        stop = min(start + segment, S)
        if is_written(table, c, lanes64, leftovers):
            xp, yp, rp, mp = plane(x, n, c), plane(y, n, c), plane(residual, n, c), plane(mask, n, c)
            normalise_plane(xp, yp, rp, mp, relu, lanes64, start, stop, channel_vectors(table, c, lanes64), streamed)
        n, c, start = next_segment(n, c, start, C, S, segment)
    if streamed:
        fence()
    return 0
