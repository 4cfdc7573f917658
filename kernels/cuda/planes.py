"""Forward kernels for channels first: x is (N, C, S), S contiguous. Twin: kernels/cpu/planes.py.

Versions
--------
1. A block a plane: 2048 channels of 7x7 start 65,536 blocks that read 196 bytes each.
2. (here) `splits` blocks a channel. The vectors of a channel are numbered j = n * SV + s across its planes, and a block takes
   `chunk` tiles of them, so planes of any size fill it. Each thread reads TILE elements (8 vectors of float32) before it uses
   them.
   Statistics: tile -> thread -> block -> channel; the block of a channel that finishes last merges the others' moments in order.
3. persistent.py: where a channel fits one block's registers, in one launch and without reading x twice.

Inside a block each thread's moments are around its own first value (a shift), so that a mean a million times the deviation
costs no accuracy in float32. Blocks merge by sums of deviations around one shift: Chan, Golub and LeVeque's merge (1983) of many
samples at once, without a division for each, corrected as their eq. 1.7. Where squares overflow float32 (values of 1e25) the
block starts over with x scaled by a power of two. Bits depend on the shape alone.

Checked on the CUDA simulator and by compiling to PTX and machine code; not yet run on a GPU.
"""

import math
from functools import cache

from numba import float32, float64, int32, int64, uint32

from fastbn.kernels.cuda.blocks import SCRATCH, block_sums, divide, is_last_block
from fastbn.kernels.cuda.channels import FIELDS, HI, LO, SCALE_T, SHIFT, finish_stats, given_coefs
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import merge, part_size, tile_moments, tile_normalise, tile_size
from fastbn.kernels.cuda.vectors import access
from fastbn.kernels.cuda.weights import weighted_share

# The scale of the second attempt: squares of 3e38 * 2**-80, summed over 2**31 values, are finite in float32.
SMALL = 2.0**-80
# Elements of shared memory that `merge_threads` needs.
MERGE_SCRATCH = SCRATCH + 1


@device
def advance(address, s, SV, step, step_s, wrap):
    """From a thread's vector to its next one, blockDim vectors on: element address, and vector s of the plane."""
    address += step
    s += step_s
    if s >= SV:
        s -= SV
        address += wrap
    return address, s


@device
def first_vector(j, c, C, S, SV, lanes):
    """Element address and s of vector j of channel c."""
    n, s = divide(j, SV)
    return (n * C + c) * S + s * lanes, s


@device
def steps(C, S, SV, lanes):
    """(step, step_s, wrap) for `advance`."""
    step_n, step_s = divide(int64(cuda.blockDim.x), SV)
    return step_n * C * S + step_s * lanes, step_s, (C - 1) * S


@device
def valid_vectors(j, vectors, per_tile):
    """How many of a thread's vectors j, j + blockDim, ... of one tile lie before the channel's end."""
    threads = int64(cuda.blockDim.x)
    left, _ = divide(max(vectors - j, 0) + threads - 1, threads)
    return min(left, per_tile)


@cache
def tile_access(kind, lanes, size):
    """(load_tile, load_some): `size` elements of a thread's tile from memory; returns the address and s of what follows."""
    load, _ = access(kind, lanes)
    per_tile = size // lanes

    @device
    def load_tile(x, tile, address, s, SV, step, step_s, wrap):
        for u in range(per_tile):
            load(x, address, tile, u * lanes)
            address, s = advance(address, s, SV, step, step_s, wrap)
        return address, s

    @device
    def load_some(x, tile, address, s, SV, step, step_s, wrap, count):
        for u in range(per_tile):
            if u < count:
                load(x, address, tile, u * lanes)
                address, s = advance(address, s, SV, step, step_s, wrap)
        return address, s

    return load_tile, load_some


@cache
def merge_threads(T):
    """merge_threads(n, shift, mean, m2, scratch): (count, centre, s1, s2), deviations of a block around a centre near its mean.

    First a centre from the shift of thread 0, then deviations around that centre: their sum s1 is almost 0, so that
    s2 - s1**2 / count does not cancel (Chan, Golub and LeVeque 1983, eq. 1.7).
    """

    @device
    def merge_threads(n, shift, mean, m2, scratch):
        if cuda.threadIdx.x == 0:
            scratch[SCRATCH] = shift
        cuda.syncthreads()
        centre = scratch[SCRATCH]
        count, s1 = block_sums(n, n * ((shift - centre) + mean), scratch)
        if count > T(0):  # a block whose values all weigh 0 has none
            centre = centre + s1 / count
        deviation = (shift - centre) + mean
        if n == T(0):
            deviation = T(0)
        s1, s2 = block_sums(n * deviation, m2 + n * deviation * deviation, scratch)
        return count, centre, s1, s2

    return merge_threads


@device
def put_partial(partials, row, count, centre, s1, s2, scale):
    """A block's moments as a row of partials, unscaled: count, shift, mean - shift, M2."""
    unscale = 1.0 / float64(scale)
    average = float64(s1) / float64(count) if count > 0 else 0.0
    partials[row * FIELDS] = float64(count)
    partials[row * FIELDS + 1] = float64(centre) * unscale
    partials[row * FIELDS + 2] = average * unscale
    partials[row * FIELDS + 3] = (float64(s2) - average * float64(s1)) * unscale * unscale


@device
def first_shift(partials, at, stride, splits):
    """(shift, mean - shift) of the first block that has counted something; rows start at `at`, `stride` elements apart."""
    for _ in range(1, splits):
        if partials[at] > 0.0:
            break
        at += stride
    return partials[at + 1], partials[at + 2]


@device
def merge_partials(partials, first, splits, scratch):
    """(count, shift, mean - shift, M2) of `splits` rows, in an order that depends on their number and the block's size alone."""
    shift, offset = first_shift(partials, first * FIELDS, FIELDS, splits)
    count, unused, s1, s2 = 0.0, 0.0, 0.0, 0.0
    k = int64(cuda.threadIdx.x)
    while k < splits:
        row = (first + k) * FIELDS
        n = partials[row]
        deviation = (partials[row + 1] - shift) + (partials[row + 2] - offset)
        count += n
        s1 += n * deviation
        s2 += partials[row + 3] + n * deviation * deviation
        k += int64(cuda.blockDim.x)
    count, unused = block_sums(count, unused, scratch)
    s1, s2 = block_sums(s1, s2, scratch)
    average = s1 / count
    return count, shift, offset + average, s2 - average * s1


@cache
def stats_planes(kind, lanes, weighted=False):
    """The kernel for arrays of `kind`, read `lanes` elements at a time; `weighted` reads a weight for each."""
    T = kind.compute
    TILE = tile_size(T)
    rescale = float32 == T
    per_tile = TILE // lanes
    load_tile, load_some = tile_access(kind, lanes, TILE)
    moments, moments_some = tile_moments(T)
    merge_block = merge_threads(T)
    share = weighted_share(kind, lanes)
    small = T(SMALL)

    def stats_planes(
        x, weight, weight_n, weight_s, counts, N, C, S, splits, chunk, partials, counters, table, coefs, gamma, beta,
        running_mean, running_var, momentum, eps, correction,
    ):  # fmt: skip
        scratch = cuda.shared.array(MERGE_SCRATCH, T)
        scratch64 = cuda.shared.array(SCRATCH, float64)
        ticket = cuda.shared.array(1, int32)
        tile = cuda.local.array(TILE, T)
        c, k = divide(int64(cuda.blockIdx.x), splits)
        SV, _ = divide(S, lanes)
        vectors = N * SV
        tile_vectors = int64(cuda.blockDim.x) * per_tile
        first = k * chunk
        whole, rest = divide(vectors, tile_vectors)
        last = min(first + chunk, whole)
        step, step_s, wrap = steps(C, S, SV, lanes)
        start, start_s = first_vector(first * tile_vectors + int64(cuda.threadIdx.x), c, C, S, SV, lanes)

        scale = T(1)
        while True:
            n, shift, mean, m2 = T(0), T(0), T(0), T(0)
            address, s = start, start_s
            # tile -> thread
            if weighted:
                tiles = min(first + chunk, whole + (1 if rest > 0 else 0))
                n, shift, mean, m2 = share(x, weight, weight_n, weight_s, c, N, C, S, first, tiles, scale)
            for _ in range(first, first if weighted else last):
                address, s = load_tile(x, tile, address, s, SV, step, step_s, wrap)
                if n == T(0):
                    shift = tile[0] * scale
                tile_mean, tile_m2 = moments(tile, shift, scale)
                n, mean, m2 = merge(n, mean, m2, T(TILE), tile_mean, tile_m2)
            # the channel's last tile, where it is not whole
            if not weighted and rest > 0 and first + chunk > whole:
                count = valid_vectors(whole * tile_vectors + int64(cuda.threadIdx.x), vectors, per_tile)
                if count > 0:
                    load_some(x, tile, address, s, SV, step, step_s, wrap, count)
                    if n == T(0):
                        shift = tile[0] * scale
                    tile_mean, tile_m2 = moments_some(tile, shift, scale, count * lanes)
                    n, mean, m2 = merge(n, mean, m2, T(count * lanes), tile_mean, tile_m2)
            # thread -> block
            total, centre, s1, s2 = merge_block(n, shift, mean, m2, scratch)
            if not rescale or math.isfinite(s2) or scale != T(1):
                break
            scale = small

        # block -> channel
        if cuda.threadIdx.x == 0:
            put_partial(partials, c * splits + k, total, centre, s1, s2, scale)
        if is_last_block(counters, c, splits, ticket):
            count64, shift64, average, m2_64 = merge_partials(partials, c * splits, splits, scratch64)
            if cuda.threadIdx.x == 0:
                if weighted:
                    count64, correction = counts[0], counts[1]
                finish_stats(
                    table, coefs, c, C, shift64, count64, average, m2_64, gamma, beta, running_mean, running_var,
                    momentum, eps, correction,
                )  # fmt: skip

    return stats_planes


@cache
def normalise_planes(kind, lanes, relu, residual, given=False):
    """The kernel for arrays of `kind`: `relu` writes a word of the mask a tile, unless that is empty; `residual` is added first.

    `given`: coefs are empty and made from given statistics, once a block, so that inference is one launch.
    """
    T = kind.compute
    TILE = tile_size(T)
    _, store = access(kind, lanes)
    PART = part_size(T, lanes)
    load_part, load_some = tile_access(kind, lanes, PART)
    normalise = tile_normalise(T, relu, residual)
    given_channel = given_coefs(T)
    per_tile, per_part = TILE // lanes, PART // lanes
    room = PART if residual else 1

    def normalise_planes(x, y, residual_x, mask, N, C, S, splits, chunk, coefs, gamma, beta, running_mean, running_var, eps):
        tile = cuda.local.array(PART, T)
        added = cuda.local.array(room, T)
        # Channels from last to first: what stats_planes has read last is still in the L2 cache.
        c, k = divide(int64(cuda.gridDim.x - 1 - cuda.blockIdx.x), splits)
        if given:
            shared = cuda.shared.array(4, T)
            if cuda.threadIdx.x == 0:
                shared[0], shared[1], shared[2], shared[3] = given_channel(c, gamma, beta, running_mean, running_var, eps)
            cuda.syncthreads()
            hi, lo, scale, shift = shared[0], shared[1], shared[2], shared[3]
        else:
            hi, lo, scale, shift = coefs[HI * C + c], coefs[LO * C + c], coefs[SCALE_T * C + c], coefs[SHIFT * C + c]
        threads = int64(cuda.blockDim.x)
        SV, _ = divide(S, lanes)
        vectors = N * SV
        tile_vectors = threads * per_tile
        first = k * chunk
        whole, rest = divide(vectors, tile_vectors)
        tiles = whole + (1 if rest > 0 else 0)
        step, step_s, wrap = steps(C, S, SV, lanes)
        address, s = first_vector(first * tile_vectors + int64(cuda.threadIdx.x), c, C, S, SV, lanes)
        for t in range(first, min(first + chunk, whole)):
            word = uint32(0)
            for bit in range(0, TILE, PART):
                at, at_s = address, s
                address, s = load_part(x, tile, at, at_s, SV, step, step_s, wrap)
                if residual:
                    load_part(residual_x, added, at, at_s, SV, step, step_s, wrap)
                for u in range(per_part):
                    for v in range(lanes):
                        k = u * lanes + v
                        word = normalise(tile, k, added, k, hi, lo, scale, shift, word, bit + k)
                    store(y, at, tile, u * lanes)
                    at, at_s = advance(at, at_s, SV, step, step_s, wrap)
            if relu and mask.size > 0:
                mask[(c * tiles + t) * threads + int64(cuda.threadIdx.x)] = word
        if rest > 0 and first + chunk > whole:
            count = valid_vectors(whole * tile_vectors + int64(cuda.threadIdx.x), vectors, per_tile)
            word = uint32(0)
            for bit in range(0, TILE, PART):
                left = count - bit // lanes
                load_some(x, tile, address, s, SV, step, step_s, wrap, left)
                if residual:
                    load_some(residual_x, added, address, s, SV, step, step_s, wrap, left)
                for u in range(per_part):
                    if u < left:
                        for v in range(lanes):
                            k = u * lanes + v
                            word = normalise(tile, k, added, k, hi, lo, scale, shift, word, bit + k)
                        store(y, address, tile, u * lanes)
                        address, s = advance(address, s, SV, step, step_s, wrap)
            if relu and mask.size > 0:
                mask[(c * tiles + whole) * threads + int64(cuda.threadIdx.x)] = word

    return normalise_planes
