"""Kernels that hold a channel in registers: x is (N, C, S), a block a channel, one launch. Twin: kernels/planes.py.

Versions
--------
1. planes.py: two launches; x crosses the memory bus three times in the forward, five times (x, dy twice each, dx) in the backward.
2. (here) a thread keeps `held` elements of its channel from the first read to the last write: the forward moves each element twice
   (read x, write y), the backward three times (read x and dy, write dx). 512 threads x 96 float32 = 192 KiB is the largest
   channel of the forward; the backward holds x and dy, so half of that.

The statistics are two passes over registers, around a first value and then around the mean so found, with the remainder
corrected (Chan, Golub and LeVeque 1983, eq. 1.7). Loops have constant bounds: they must unroll, or the values would go to memory.
"""

import math
from functools import lru_cache

from numba import float32, float64, int64, uint32

from fastbn.kernels.cuda.blocks import SCRATCH, block_sums, divide
from fastbn.kernels.cuda.channels import DA, DB, DC, HI, INV, LO, SCALE_T, SHIFT, finish_backward, finish_stats
from fastbn.kernels.cuda.planes import SMALL, advance, first_vector, steps, valid_vectors
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import TILE, tile_gradient, tile_normalise
from fastbn.kernels.cuda.vectors import access


@lru_cache(maxsize=None)
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


@lru_cache(maxsize=None)
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


@lru_cache(maxsize=None)
def forward_planes(kind, lanes, held, relu, residual):
    """The kernel for arrays of `kind`: statistics, y and running statistics of channel blockIdx.x."""
    T = kind.compute
    rescale = T == float32
    _, store = access(kind, lanes)
    load_channel, load_one = channel_access(kind, lanes, held)
    load_lanes, _ = access(kind, lanes)
    around = sums_around(T, lanes, held)
    normalise = tile_normalise(T, relu, residual)
    small = T(SMALL)
    room = held if residual else 1
    words = -(-held // TILE)
    a_word = TILE // lanes  # vectors

    def forward_planes(
        x, y, residual_x, mask, N, C, S, table, coefs, gamma, beta, running_mean, running_var, momentum, eps, correction
    ):
        scratch = cuda.shared.array(SCRATCH, T)
        values = cuda.local.array(held, T)
        added = cuda.local.array(room, T)
        c = int64(cuda.blockIdx.x)
        threads = int64(cuda.blockDim.x)
        SV, _ = divide(S, lanes)
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
                table, coefs, c, C, float64(N * S), float64(centre) * unscale, average * unscale, m2, gamma, beta,
                running_mean, running_var, momentum, eps, correction,
            )  # fmt: skip
        cuda.syncthreads()

        # y
        hi, lo, by, shift = coefs[HI * C + c], coefs[LO * C + c], coefs[SCALE_T * C + c], coefs[SHIFT * C + c]
        if residual:
            load_channel(residual_x, added, address, s, SV, step, step_s, wrap, count)
        for w in range(words):
            word = uint32(0)
            for u in range(w * a_word, min((w + 1) * a_word, held // lanes)):
                if u < count:
                    for v in range(lanes):
                        word = normalise(values, u * lanes + v, added, hi, lo, by, shift, word)
                    store(y, address, values, u * lanes)
                    address, s = advance(address, s, SV, step, step_s, wrap)
            if relu:
                mask[(c * words + w) * threads + j] = word

    return forward_planes
