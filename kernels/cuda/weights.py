"""Sample weights: a weight >= 0 for each value of a channel, the same for all channels.

The kernels that have a flag `weighted` call these. `weight` is in the type of arithmetic and is read at
n * weight_n + s * weight_s, so that one weight a sample (weight_s == 0) needs no copy of S times its size. What weighs 0 may be
NaN: it is selected away, not multiplied by 0. `counts` (float64) holds the sum of the weights, and n / (n - 1) of their effective
number n = sum(w)**2 / sum(w**2).
"""

from functools import cache

from numba import int64

from fastbn.kernels.cuda.blocks import divide
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import merge, tile_size
from fastbn.kernels.cuda.vectors import access


@cache
def weighted_moments(T, stride):
    """moments(tile, w, v, shift, scale, n, mean, m2): merge elements v, v + stride, ... of a tile, of weights w, into moments.

    Returns the moments and their shift, which is the first value that weighs something. Overwrites the tile.
    """
    size = tile_size(T)

    @device
    def moments(tile, w, v, shift, scale, n, mean, m2):
        weight = T(0)
        for k in range(0, size, stride):
            weight += w[k + v]
        if weight > T(0):
            if n == T(0):
                for k in range(0, size, stride):
                    if w[k + v] > T(0):
                        shift = tile[k + v] * scale
            total = T(0)
            for k in range(0, size, stride):
                tile[k + v] = tile[k + v] * scale - shift
                if w[k + v] > T(0):
                    total += w[k + v] * tile[k + v]
            tile_mean = total / weight
            tile_m2 = T(0)
            for k in range(0, size, stride):
                deviation = tile[k + v] - tile_mean
                if w[k + v] > T(0):
                    tile_m2 += w[k + v] * deviation * deviation
            n, mean, m2 = merge(n, mean, m2, weight, tile_mean, tile_m2)
        return n, shift, mean, m2

    return moments


@cache
def weighted_share(kind, lanes):
    """share(x, weight, ...): the moments of a thread's tiles `first` to `last` of channel c of planes."""
    T = kind.compute
    size = tile_size(T)
    per_tile = size // lanes
    load, _ = access(kind, lanes)
    moments = weighted_moments(T, 1)

    @device
    def share(x, weight, weight_n, weight_s, c, N, C, S, first, last, scale):
        tile = cuda.local.array(size, T)
        w = cuda.local.array(size, T)
        threads = int64(cuda.blockDim.x)
        SV, _ = divide(S, lanes)
        vectors = N * SV
        n, shift, mean, m2 = T(0), T(0), T(0), T(0)
        for t in range(first, last):
            for u in range(per_tile):
                j = (t * per_tile + u) * threads + int64(cuda.threadIdx.x)
                i, s = divide(j, SV)
                for v in range(lanes):
                    w[u * lanes + v] = T(0)
                if j < vectors:  # not i < N: `divide` wraps where j, past the end, reaches 2**32
                    load(x, (i * C + c) * S + s * lanes, tile, u * lanes)
                    for v in range(lanes):
                        w[u * lanes + v] = weight[i * weight_n + (s * lanes + v) * weight_s]
            n, shift, mean, m2 = moments(tile, w, 0, shift, scale, n, mean, m2)
        return n, shift, mean, m2

    return share
