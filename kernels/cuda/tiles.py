"""What a thread does with a tile: `tile_size` values in a local array that the compiler keeps in registers.

Versions
--------
1. Welford, element by element: a division each, and each step waits for the one before.
2. (here) the tile's mean, then its sum of squares around that mean, from registers; one merge a tile (Chan et al. 1983). Four
   accumulators shorten the chains of additions and their rounding errors.

Loops have constant bounds: they must unroll, or the tile would go to memory.
"""

from functools import cache

from numba import float64, uint32

from fastbn.kernels import formulas
from fastbn.kernels.cuda.target import cuda, device


def tile_size(T):
    """Elements that a thread reads before it uses them: 128 bytes in flight, and no more than the bits of one word of the mask."""
    return 16 if float64 == T else 32


def part_size(T, lanes):
    """Elements of a tile that an elementwise kernel works on at a time: half of it, a quarter where each has an address of its own.

    Whole tiles of two tensors and their addresses take more than the 128 registers that let two blocks of 256 threads share a
    multiprocessor. Twice the threads with half the loads each have as many in flight.
    """
    return tile_size(T) // (4 if lanes == 1 else 2)


merge = device(formulas.merge)
exact_sum = device(formulas.exact_sum)


@cache
def tile_moments(T):
    """moments(tile, shift, scale, valid): mean and M2 of scale * tile - shift over its first `valid` elements; tile is overwritten.

    Two functions: for a whole tile, and for one whose end is not valid.
    """
    TILE = tile_size(T)
    share = T(1.0 / TILE)

    @device
    def whole(tile, shift, scale):
        sums = cuda.local.array(4, T)
        for k in range(4):
            sums[k] = T(0)
        for k in range(TILE):
            tile[k] = tile[k] * scale - shift
            sums[k % 4] += tile[k]
        mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * share
        for k in range(4):
            sums[k] = T(0)
        for k in range(TILE):
            deviation = tile[k] - mean
            sums[k % 4] += deviation * deviation
        return mean, (sums[0] + sums[1]) + (sums[2] + sums[3])

    @device
    def some(tile, shift, scale, valid):
        total = T(0)
        for k in range(TILE):
            tile[k] = tile[k] * scale - shift
            if k < valid:
                total += tile[k]
        mean = total / T(valid)
        m2 = T(0)
        for k in range(TILE):
            deviation = tile[k] - mean
            if k < valid:
                m2 += deviation * deviation
        return mean, m2

    return whole, some


@cache
def tile_normalise(T, relu, residual):
    """normalise(tile, k, added, i, hi, lo, scale, shift, word, bit): y of element k in place, plus added[i]; sets its bit in word.

    A NaN passes the activation, and so does its gradient.
    """

    @device
    def normalise(tile, k, added, i, hi, lo, scale, shift, word, bit):
        value = ((tile[k] - hi) - lo) * scale + shift
        if residual:
            value = value + added[i]
        if relu:
            if value <= T(0):
                value = T(0)
            else:
                word |= uint32(1) << uint32(bit)
        tile[k] = value
        return word

    return normalise


@cache
def tile_masked(T, size):
    """masked(dy, word, first): the elements of dy whose bit in the mask's word, counted from `first`, is 0 become 0, in place."""

    @device
    def masked(dy, word, first):
        for k in range(size):
            if (word >> uint32(first + k)) & uint32(1) == uint32(0):
                dy[k] = T(0)

    return masked


@cache
def tile_sums(T, weighted=False):
    """sums(x, dy, hi, lo, invstd, valid): the sums of dy and of dy * xhat over the first `valid` elements of two tiles.

    Under weights x may be NaN where it weighs 0: it counts only where dy does.
    """
    TILE = tile_size(T)

    @device
    def sums(x, dy, hi, lo, invstd, valid):
        a = cuda.local.array(4, T)
        b = cuda.local.array(4, T)
        for k in range(4):
            a[k] = T(0)
            b[k] = T(0)
        for k in range(TILE):
            if k < valid:
                a[k % 4] += dy[k]
                if not weighted or dy[k] != T(0):
                    b[k % 4] += dy[k] * (((x[k] - hi) - lo) * invstd)
        return (a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3])

    return sums


@cache
def tile_gradient(T, frozen, weighted=False):
    """gradient(x, dy, k, ..., w): dx of element k, in place of dy; w is the element's weight, read if `weighted`."""

    @device
    def gradient(x, dy, k, hi, lo, invstd, a, b, c, w):
        if weighted:
            through = w * (b * (((x[k] - hi) - lo) * invstd) + c) if w > T(0) else T(0)
            dy[k] = a * dy[k] + through
        elif frozen:
            dy[k] = a * dy[k]
        else:
            dy[k] = a * dy[k] + (b * (((x[k] - hi) - lo) * invstd) + c)

    return gradient
