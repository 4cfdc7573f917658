"""Kernels that hold a channel in registers: x is (N, C, S), a block a channel, one launch. Twin: kernels/cpu/planes.py.

Versions
--------
1. planes.py: two launches; x crosses the memory bus three times in the forward, five times (x, dy twice each, dx) in the backward.
2. (here) a thread keeps `held` elements of its channel from the first read to the last write: the forward moves each element twice
   (read x, write y), the backward three times (read x and dy, write dx). 512 threads x 64 elements = 128 KiB of float32 is
   the largest channel of the forward; the backward holds x and dy, so half of that. (96 elements fit 128 registers in the bare
   kernel, but spill 36 to 600 bytes with the features.)

The statistics are two passes over registers, around a first value and then around the mean so found, with the remainder
corrected (Chan, Golub and LeVeque 1983, eq. 1.7). Loops have constant bounds: they must unroll, or the values would go to memory.

Checked on the CUDA simulator and by compiling to PTX and machine code; not yet run on a GPU.
"""

import math
from functools import cache

from numba import float32, float64, int64, uint32

from fastbn.kernels.cuda.blocks import SCRATCH, block_sums, divide
from fastbn.kernels.cuda.channels import DA, DB, DC, HI, INV, LO, SCALE_T, SHIFT, finish_backward, finish_stats
from fastbn.kernels.cuda.planes import SMALL, advance, first_vector, steps, valid_vectors
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import tile_normalise, tile_size
from fastbn.kernels.cuda.vectors import access


@cache
def channel_access(kind, lanes, held):
    """(load_channel, load_one): a thread's share of a channel from memory; load_one reads the single value at an address."""
    load, _ = access(kind, lanes)
    load_one, _ = access(kind, 1)

    @device
    def load_channel(x, values, address, s, SV, step, step_s, wrap, count):
        for u in range(held // lanes):
            if u < count:
                load(x, address, values, u * lanes)
                address, s = advance(address, s, SV, step, step_s, wrap)

    return load_channel, load_one


@device
def keep_steps(kept, step, step_s, wrap, SV):
    """Put the steps of `advance` into shared memory, to be read back for the second walk over the channel.

    A compiler that knows them there keeps them, and addresses of the first walk, in registers all through the epilogue, and has too
    few of them for its float64: kernels with 64 held elements then spill 8 to 24 bytes. The backward's do not care.
    """
    if cuda.threadIdx.x == 0:
        kept[0] = step
        kept[1] = step_s
        kept[2] = wrap
        kept[3] = SV


@cache
def sums_around(T, lanes, held):
    """sums_around(values, count, centre, scale): the sums of e and e**2, e = value * scale - centre, over `count` vectors."""

    @device
    def sums_around(values, count, centre, scale):
        a = cuda.local.array(4, T)
        b = cuda.local.array(4, T)
        for k in range(4):
            a[k] = T(0)
            b[k] = T(0)
        for u in range(held // lanes):
            if u < count:
                for v in range(lanes):
                    k = u * lanes + v
                    e = values[k] * scale - centre
                    a[k % 4] += e
                    b[k % 4] += e * e
        return (a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3])

    return sums_around


@cache
def forward_planes(kind, lanes, held, relu, residual):
    """The kernel for arrays of `kind`: statistics, y and running statistics of channel blockIdx.x."""
    T = kind.compute
    TILE = tile_size(T)
    rescale = float32 == T
    _, store = access(kind, lanes)
    load_channel, load_one = channel_access(kind, lanes, held)
    group = min(4, 16 // lanes)  # vectors of the residual in registers
    load_added, _ = channel_access(kind, lanes, group * lanes)
    around = sums_around(T, lanes, held)
    normalise = tile_normalise(T, relu, residual)
    small = T(SMALL)
    room = group * lanes if residual else 1
    words = held // TILE
    a_word = TILE // lanes  # vectors

    def forward_planes(x, y, residual_x, mask, N, C, S, table, coefs, gamma, beta, running_mean, running_var, momentum, eps, correction):
        scratch = cuda.shared.array(SCRATCH, T)
        kept = cuda.shared.array(4, int64)
        values = cuda.local.array(held, T)
        added = cuda.local.array(room, T)
        c = int64(cuda.blockIdx.x)
        threads = int64(cuda.blockDim.x)
        SV, _ = divide(S, lanes)
        tiles, _ = divide(N * SV + threads * a_word - 1, threads * a_word)
        step, step_s, wrap = steps(C, S, SV, lanes)
        j = int64(cuda.threadIdx.x)
        address, s = first_vector(j, c, C, S, SV, lanes)
        count = valid_vectors(j, N * SV, held // lanes)
        # read
        load_one(x, c * S, values, 0)
        first = values[0]
        load_channel(x, values, address, s, SV, step, step_s, wrap, count)

        # mean, then M2
        scale = T(1)
        total = T(N * S)
        while True:
            centre = first * scale
            s1, s2 = around(values, count, centre, scale)
            s1, s2 = block_sums(s1, s2, scratch)
            centre = centre + s1 / total
            s1, s2 = around(values, count, centre, scale)
            s1, s2 = block_sums(s1, s2, scratch)
            if not rescale or math.isfinite(s2) or scale != T(1):
                break
            scale = small
        if cuda.threadIdx.x == 0:
            unscale = 1.0 / float64(scale)
            average = float64(s1) / float64(N * S)
            m2 = (float64(s2) - average * float64(s1)) * unscale * unscale
            finish_stats(
                table, coefs, c, C, float64(centre) * unscale, float64(N * S), average * unscale, m2, gamma, beta,
                running_mean, running_var, momentum, eps, correction,
            )  # fmt: skip
        keep_steps(kept, step, step_s, wrap, SV)
        cuda.syncthreads()

        # y
        step, step_s, wrap, SV = kept[0], kept[1], kept[2], kept[3]
        address, s = first_vector(j, c, C, S, SV, lanes)
        hi, lo, by, shift = coefs[HI * C + c], coefs[LO * C + c], coefs[SCALE_T * C + c], coefs[SHIFT * C + c]
        for w in range(words):
            word = uint32(0)
            for g in range(a_word // group):
                first_u = w * a_word + g * group
                if residual:  # a few vectors of it at a time: registers are full of x
                    load_added(residual_x, added, address, s, SV, step, step_s, wrap, count - first_u)
                for i in range(group):
                    u = first_u + i
                    if u < count:
                        for v in range(lanes):
                            k = u * lanes + v
                            word = normalise(values, k, added, i * lanes + v, hi, lo, by, shift, word, k % TILE)
                        store(y, address, values, u * lanes)
                        address, s = advance(address, s, SV, step, step_s, wrap)
            if relu and w < tiles:
                mask[(c * tiles + w) * threads + j] = word

    return forward_planes


@cache
def backward_planes(kind, lanes, held, relu, residual):
    """The kernel for arrays of `kind`: dgamma, dbeta and dx of channel blockIdx.x; `residual` writes the gradient before it too."""
    T = kind.compute
    TILE = tile_size(T)
    _, store = access(kind, lanes)
    load_channel, _ = channel_access(kind, lanes, held)
    halves = held // (TILE // 2)  # `held` is a multiple of half a word's bits
    a_word = TILE // lanes  # vectors

    def backward_planes(x, dy, dx, dresidual, mask, N, C, S, table, grads, coefs, grad_coefs, dgamma, dbeta):
        scratch = cuda.shared.array(SCRATCH, T)
        x_values = cuda.local.array(held, T)
        dy_values = cuda.local.array(held, T)
        c = int64(cuda.blockIdx.x)
        threads = int64(cuda.blockDim.x)
        hi, lo, invstd = coefs[HI * C + c], coefs[LO * C + c], coefs[INV * C + c]
        SV, _ = divide(S, lanes)
        tiles, _ = divide(N * SV + threads * a_word - 1, threads * a_word)
        step, step_s, wrap = steps(C, S, SV, lanes)
        j = int64(cuda.threadIdx.x)
        address, s = first_vector(j, c, C, S, SV, lanes)
        count = valid_vectors(j, N * SV, held // lanes)
        # read
        load_channel(x, x_values, address, s, SV, step, step_s, wrap, count)
        load_channel(dy, dy_values, address, s, SV, step, step_s, wrap, count)

        # the two sums
        a = cuda.local.array(4, T)
        b = cuda.local.array(4, T)
        for k in range(4):
            a[k] = T(0)
            b[k] = T(0)
        for h in range(halves):
            word = uint32(0)
            if relu and h // 2 < tiles:
                word = mask[(c * tiles + h // 2) * threads + j] >> uint32(h % 2 * (TILE // 2))
            for i in range(TILE // 2):
                k = h * (TILE // 2) + i
                if k < count * lanes:
                    if relu and (word >> uint32(i)) & uint32(1) == uint32(0):
                        dy_values[k] = T(0)
                    x_values[k] = ((x_values[k] - hi) - lo) * invstd
                    a[i % 4] += dy_values[k]
                    b[i % 4] += dy_values[k] * x_values[k]
        sum_dy, sum_xhat = block_sums((a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]), scratch)
        if cuda.threadIdx.x == 0:
            finish_backward(table, grads, grad_coefs, c, C, float64(sum_dy), float64(sum_xhat), float64(N * S), dgamma, dbeta, 0)
        cuda.syncthreads()

        # dx; x_values holds xhat by now
        da, db, dc = grad_coefs[DA * C + c], grad_coefs[DB * C + c], grad_coefs[DC * C + c]
        for u in range(held // lanes):
            if u < count:
                if residual:
                    store(dresidual, address, dy_values, u * lanes)
                for v in range(lanes):
                    k = u * lanes + v
                    dy_values[k] = da * dy_values[k] + (db * x_values[k] + dc)
                store(dx, address, dy_values, u * lanes)
                address, s = advance(address, s, SV, step, step_s, wrap)

    return backward_planes
