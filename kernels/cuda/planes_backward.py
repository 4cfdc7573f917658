"""Backward kernels for channels first: x and dy are (N, C, S), S contiguous. Twin: kernels/cpu/planes_backward.py.

Versions
--------
1. Three kernels: the gradient of the activation as a tensor, two reductions, dx. The tensor costs a write and two reads of x's
   size.
2. (here) two: `reduce_planes` reads x, dy and a bit per element, and the last block of a channel turns its sums into dgamma, dbeta
   and the coefficients of dx; `apply_planes` reads x and dy again (dy alone where the statistics are frozen) and writes dx.
3. persistent.py: where x and dy of a channel fit one block's registers, in one launch and reading each once.

Tiles, blocks and the order of work are those of planes.py. A thread adds its tiles' sums with the rounding error carried along
(Knuth 1969), since a sum of equal terms rounds to the same side each time.

Checked on the CUDA simulator and by compiling to PTX and machine code; not yet run on a GPU.
"""

from functools import cache

from numba import float64, int32, int64, uint32

from fastbn.kernels.cuda.blocks import SCRATCH, block_sums, divide, is_last_block
from fastbn.kernels.cuda.channels import DA, DB, DC, HI, INV, LO, finish_backward
from fastbn.kernels.cuda.planes import advance, first_vector, steps, tile_access, valid_vectors
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import exact_sum, part_size, tile_gradient, tile_masked, tile_size, tile_sums
from fastbn.kernels.cuda.vectors import access


@device
def merge_sums(partials, first, splits, scratch):
    """The two sums of `splits` rows of partials, in an order that depends on their number and the block's size alone."""
    a, b = 0.0, 0.0
    k = int64(cuda.threadIdx.x)
    while k < splits:
        a += partials[(first + k) * 2]
        b += partials[(first + k) * 2 + 1]
        k += int64(cuda.blockDim.x)
    return block_sums(a, b, scratch)


@cache
def reduce_planes(kind, lanes, relu, weighted=False):
    """The kernel for arrays of `kind`: the sums of dy and of dy * xhat, then all that follows from them; `relu` reads the mask."""
    T = kind.compute
    TILE = tile_size(T)
    per_tile = TILE // lanes
    load_tile, load_some = tile_access(kind, lanes, TILE)
    sums = tile_sums(T, weighted)
    masked = tile_masked(T, TILE)

    def reduce_planes(
        x, dy, counts, mask, N, C, S, splits, chunk, partials, counters, table, grads, coefs, grad_coefs, dgamma, dbeta, frozen
    ):
        scratch = cuda.shared.array(SCRATCH, T)
        scratch64 = cuda.shared.array(SCRATCH, float64)
        ticket = cuda.shared.array(1, int32)
        x_tile = cuda.local.array(TILE, T)
        dy_tile = cuda.local.array(TILE, T)
        c, k = divide(int64(cuda.blockIdx.x), splits)
        hi, lo, invstd = coefs[HI * C + c], coefs[LO * C + c], coefs[INV * C + c]
        threads = int64(cuda.blockDim.x)
        SV, _ = divide(S, lanes)
        vectors = N * SV
        tile_vectors = threads * per_tile
        first = k * chunk
        whole, rest = divide(vectors, tile_vectors)
        tiles = whole + (1 if rest > 0 else 0)
        step, step_s, wrap = steps(C, S, SV, lanes)
        address, s = first_vector(first * tile_vectors + int64(cuda.threadIdx.x), c, C, S, SV, lanes)
        sum_dy, sum_xhat, lost_dy, lost_xhat = T(0), T(0), T(0), T(0)
        # tile -> thread
        for t in range(first, min(first + chunk, whole)):
            load_tile(x, x_tile, address, s, SV, step, step_s, wrap)
            address, s = load_tile(dy, dy_tile, address, s, SV, step, step_s, wrap)
            if relu:
                masked(dy_tile, mask[(c * tiles + t) * threads + int64(cuda.threadIdx.x)], 0)
            a, b = sums(x_tile, dy_tile, hi, lo, invstd, TILE)
            sum_dy, error = exact_sum(sum_dy, a)
            lost_dy += error
            sum_xhat, error = exact_sum(sum_xhat, b)
            lost_xhat += error
        # the channel's last tile, where it is not whole
        if rest > 0 and first + chunk > whole:
            count = valid_vectors(whole * tile_vectors + int64(cuda.threadIdx.x), vectors, per_tile)
            load_some(x, x_tile, address, s, SV, step, step_s, wrap, count)
            load_some(dy, dy_tile, address, s, SV, step, step_s, wrap, count)
            if relu:
                masked(dy_tile, mask[(c * tiles + whole) * threads + int64(cuda.threadIdx.x)], 0)
            a, b = sums(x_tile, dy_tile, hi, lo, invstd, count * lanes)
            sum_dy += a
            sum_xhat += b
        # thread -> block
        sum_dy, sum_xhat = block_sums(sum_dy + lost_dy, sum_xhat + lost_xhat, scratch)
        # block -> channel
        if cuda.threadIdx.x == 0:
            partials[(c * splits + k) * 2] = float64(sum_dy)
            partials[(c * splits + k) * 2 + 1] = float64(sum_xhat)
        if is_last_block(counters, c, splits, ticket):
            a64, b64 = merge_sums(partials, c * splits, splits, scratch64)
            if cuda.threadIdx.x == 0:
                count64 = counts[0] if weighted else float64(N * S)
                finish_backward(table, grads, grad_coefs, c, C, a64, b64, count64, dgamma, dbeta, frozen)

    return reduce_planes


@cache
def apply_planes(kind, lanes, relu, residual, frozen, weighted=False):
    """The kernel for arrays of `kind`: dx; `residual` writes the gradient before the normalisation too; `frozen` needs no x."""
    T = kind.compute
    TILE = tile_size(T)
    PART = part_size(T, lanes)
    per_tile, per_part = TILE // lanes, PART // lanes
    _, store = access(kind, lanes)
    load_part, load_some = tile_access(kind, lanes, PART)
    gradient = tile_gradient(T, frozen, weighted)
    masked = tile_masked(T, PART)

    def apply_planes(x, dy, dx, dresidual, weight, weight_n, weight_s, mask, N, C, S, splits, chunk, coefs, grad_coefs):
        x_tile = cuda.local.array(PART, T)
        dy_tile = cuda.local.array(PART, T)
        # Channels from last to first: what reduce_planes has read last is still in the L2 cache.
        c, k = divide(int64(cuda.gridDim.x - 1 - cuda.blockIdx.x), splits)
        hi, lo, invstd = coefs[HI * C + c], coefs[LO * C + c], coefs[INV * C + c]
        a, b, d = grad_coefs[DA * C + c], grad_coefs[DB * C + c], grad_coefs[DC * C + c]
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
            word = mask[(c * tiles + t) * threads + int64(cuda.threadIdx.x)] if relu else uint32(0)
            for bit in range(0, TILE, PART):
                at, at_s = address, s
                if not frozen:
                    load_part(x, x_tile, at, at_s, SV, step, step_s, wrap)
                address, s = load_part(dy, dy_tile, at, at_s, SV, step, step_s, wrap)
                if relu:
                    masked(dy_tile, word, bit)
                for u in range(per_part):
                    if residual:
                        store(dresidual, at, dy_tile, u * lanes)
                    if weighted:
                        i, w_s = divide((t * per_tile + bit // lanes + u) * threads + int64(cuda.threadIdx.x), SV)
                        w_at = i * weight_n + w_s * lanes * weight_s
                    for v in range(lanes):
                        w = weight[w_at + v * weight_s] if weighted else T(1)
                        gradient(x_tile, dy_tile, u * lanes + v, hi, lo, invstd, a, b, d, w)
                    store(dx, at, dy_tile, u * lanes)
                    at, at_s = advance(at, at_s, SV, step, step_s, wrap)
        if rest > 0 and first + chunk > whole:
            count = valid_vectors(whole * tile_vectors + int64(cuda.threadIdx.x), vectors, per_tile)
            word = mask[(c * tiles + whole) * threads + int64(cuda.threadIdx.x)] if relu else uint32(0)
            for bit in range(0, TILE, PART):
                left = count - bit // lanes
                if not frozen:
                    load_some(x, x_tile, address, s, SV, step, step_s, wrap, left)
                load_some(dy, dy_tile, address, s, SV, step, step_s, wrap, left)
                if relu:
                    masked(dy_tile, word, bit)
                for u in range(per_part):
                    if u < left:
                        if residual:
                            store(dresidual, address, dy_tile, u * lanes)
                        if weighted:
                            i, w_s = divide((whole * per_tile + bit // lanes + u) * threads + int64(cuda.threadIdx.x), SV)
                            w_at = i * weight_n + w_s * lanes * weight_s
                        for v in range(lanes):
                            w = weight[w_at + v * weight_s] if weighted else T(1)
                            gradient(x_tile, dy_tile, u * lanes + v, hi, lo, invstd, a, b, d, w)
                        store(dx, address, dy_tile, u * lanes)
                        address, s = advance(address, s, SV, step, step_s, wrap)

    return apply_planes
