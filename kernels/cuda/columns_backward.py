"""Backward kernels for NC and channels last: x and dy are (rows, C), C contiguous. Twin: kernels/cpu/columns_backward.py.

Versions
--------
1. A thread a channel, down all rows: with 64 channels 64 threads work.
2. (here) the blocks and tiles of columns.py, and the two launches of planes_backward.py: sums, then dx.

Checked on the CUDA simulator and by compiling to PTX and machine code; not yet run on a GPU.
"""

from functools import cache

from numba import float64, int32, int64, uint32

from fastbn.kernels.cuda.blocks import divide, is_last_block
from fastbn.kernels.cuda.channels import DA, DB, DC, HI, INV, LO, finish_backward
from fastbn.kernels.cuda.columns import add_columns, place, row_access, valid_rows
from fastbn.kernels.cuda.target import cuda
from fastbn.kernels.cuda.tiles import exact_sum, part_size, tile_gradient, tile_masked, tile_size
from fastbn.kernels.cuda.vectors import access


@cache
def reduce_columns(kind, lanes, threads, widest, relu, weighted=False):
    """The kernel for arrays of `kind`: the sums of dy and of dy * xhat, then all that follows from them; `relu` reads the mask."""
    T = kind.compute
    TILE = tile_size(T)
    load_rows = row_access(kind, lanes, TILE)
    masked = tile_masked(T, TILE)
    per_tile = TILE // lanes
    most = widest * lanes
    cells = threads * lanes
    room = max(threads, most)

    def reduce_columns(
        x, dy, counts, mask, rows, C, wide, splits, chunk, partials, counters, table, grads, coefs, grad_coefs, dgamma, dbeta, frozen
    ):
        a_cells = cuda.shared.array(cells, T)
        b_cells = cuda.shared.array(cells, T)
        a_sum = cuda.shared.array(most, T)
        b_sum = cuda.shared.array(most, T)
        a_merge = cuda.shared.array(room, float64)
        b_merge = cuda.shared.array(room, float64)
        a_total = cuda.shared.array(most, float64)
        b_total = cuda.shared.array(most, float64)
        ticket = cuda.shared.array(1, int32)
        x_tile = cuda.local.array(TILE, T)
        dy_tile = cuda.local.array(TILE, T)
        hi = cuda.local.array(lanes, T)
        lo = cuda.local.array(lanes, T)
        invstd = cuda.local.array(lanes, T)
        sum_dy = cuda.local.array(lanes, T)
        sum_xhat = cuda.local.array(lanes, T)
        lost_dy = cuda.local.array(lanes, T)
        lost_xhat = cuda.local.array(lanes, T)
        high, _ = divide(threads, wide)
        columns = wide * lanes
        rows_a_tile = high * per_tile
        column_tiles, _ = divide(C + columns - 1, columns)
        column_tile, k, tx, ty, c, row = place(wide, lanes, column_tiles, chunk, rows_a_tile, int64(cuda.blockIdx.x))
        inside = c < C
        end = min(rows, (k + 1) * chunk * rows_a_tile)
        for v in range(lanes):
            sum_dy[v], sum_xhat[v], lost_dy[v], lost_xhat[v] = T(0), T(0), T(0), T(0)
            if inside:
                hi[v] = coefs[HI * C + c + v]
                lo[v] = coefs[LO * C + c + v]
                invstd[v] = coefs[INV * C + c + v]
        # tile -> thread
        t = k * chunk
        while inside and row < end:
            count = valid_rows(row, end, high, per_tile)
            load_rows(x, x_tile, row, count, high, C, c)
            load_rows(dy, dy_tile, row, count, high, C, c)
            if relu:
                masked(dy_tile, mask[(t * column_tiles + column_tile) * threads + int64(cuda.threadIdx.x)], 0)
            for v in range(lanes):
                a, b = T(0), T(0)
                for u in range(per_tile):
                    i = u * lanes + v
                    if u < count:
                        a += dy_tile[i]
                        if not weighted or dy_tile[i] != T(0):  # where it weighs 0, x may be NaN: it counts only where dy does
                            b += dy_tile[i] * (((x_tile[i] - hi[v]) - lo[v]) * invstd[v])
                sum_dy[v], error = exact_sum(sum_dy[v], a)
                lost_dy[v] += error
                sum_xhat[v], error = exact_sum(sum_xhat[v], b)
                lost_xhat[v] += error
            t += 1
            row += rows_a_tile
        # thread -> block
        for v in range(lanes):
            cell = ty * columns + tx * lanes + v
            a_cells[cell] = sum_dy[v] + lost_dy[v]
            b_cells[cell] = sum_xhat[v] + lost_xhat[v]
        add_columns(a_cells, columns, high, a_sum)
        add_columns(b_cells, columns, high, b_sum)
        # block -> channel; rows of partials are (split, channel)
        if ty == 0 and inside:
            for v in range(lanes):
                partials[(k * C + c + v) * 2] = float64(a_sum[tx * lanes + v])
                partials[(k * C + c + v) * 2 + 1] = float64(b_sum[tx * lanes + v])
        if is_last_block(counters, column_tile, splits, ticket):
            groups, _ = divide(threads, columns)  # threads a column
            groups = max(groups, 1)
            merge_cells = groups * columns
            cell = int64(cuda.threadIdx.x)
            while cell < merge_cells:
                k, column = divide(cell, columns)
                c = column_tile * columns + column
                a64, b64 = 0.0, 0.0
                if c < C:
                    rounds, _ = divide(splits - k + groups - 1, groups)
                    for r in range(rounds):
                        at = ((k + r * groups) * C + c) * 2
                        a64 += partials[at]
                        b64 += partials[at + 1]
                a_merge[cell] = a64
                b_merge[cell] = b64
                cell += threads
            add_columns(a_merge, columns, groups, a_total)
            add_columns(b_merge, columns, groups, b_total)
            column = int64(cuda.threadIdx.x)
            while column < columns:
                c = column_tile * columns + column
                if c < C:
                    count = counts[0] if weighted else float64(rows)
                    a64, b64 = a_total[column], b_total[column]
                    finish_backward(table, grads, grad_coefs, c, C, a64, b64, count, dgamma, dbeta, frozen)
                column += threads

    return reduce_columns


@cache
def apply_columns(kind, lanes, threads, widest, relu, residual, frozen, weighted=False):
    """The kernel for arrays of `kind`: dx; `residual` writes the gradient before the normalisation too; `frozen` needs no x."""
    T = kind.compute
    TILE = tile_size(T)
    _, store = access(kind, lanes)
    PART = part_size(T, lanes)
    load_rows = row_access(kind, lanes, PART)
    gradient = tile_gradient(T, frozen, weighted)
    masked = tile_masked(T, PART)
    per_tile, per_part = TILE // lanes, PART // lanes

    def apply_columns(x, dy, dx, dresidual, weight, weight_n, mask, rows, C, wide, chunk, coefs, grad_coefs):
        x_tile = cuda.local.array(PART, T)
        dy_tile = cuda.local.array(PART, T)
        hi = cuda.local.array(lanes, T)
        lo = cuda.local.array(lanes, T)
        invstd = cuda.local.array(lanes, T)
        a = cuda.local.array(lanes, T)
        b = cuda.local.array(lanes, T)
        d = cuda.local.array(lanes, T)
        high, _ = divide(threads, wide)
        columns = wide * lanes
        rows_a_tile = high * per_tile
        column_tiles, _ = divide(C + columns - 1, columns)
        # Rows from last to first: what reduce_columns has read last is still in the L2 cache.
        column_tile, k, _, _, c, row = place(wide, lanes, column_tiles, chunk, rows_a_tile, int64(cuda.gridDim.x - 1 - cuda.blockIdx.x))
        end = min(rows, (k + 1) * chunk * rows_a_tile)
        if c < C:
            for v in range(lanes):
                hi[v] = coefs[HI * C + c + v]
                lo[v] = coefs[LO * C + c + v]
                invstd[v] = coefs[INV * C + c + v]
                a[v] = grad_coefs[DA * C + c + v]
                b[v] = grad_coefs[DB * C + c + v]
                d[v] = grad_coefs[DC * C + c + v]
            t = k * chunk
            while row < end:
                count = valid_rows(row, end, high, per_tile)
                word = mask[(t * column_tiles + column_tile) * threads + int64(cuda.threadIdx.x)] if relu else uint32(0)
                for bit in range(0, TILE, PART):
                    part, left = row + bit // lanes * high, count - bit // lanes
                    if not frozen:
                        load_rows(x, x_tile, part, left, high, C, c)
                    load_rows(dy, dy_tile, part, left, high, C, c)
                    if relu:
                        masked(dy_tile, word, bit)
                    for u in range(per_part):
                        if u < left:
                            at = (part + u * high) * C + c
                            if residual:
                                store(dresidual, at, dy_tile, u * lanes)
                            w = weight[(part + u * high) * weight_n] if weighted else T(1)
                            for v in range(lanes):
                                gradient(x_tile, dy_tile, u * lanes + v, hi[v], lo[v], invstd[v], a[v], b[v], d[v], w)
                            store(dx, at, dy_tile, u * lanes)
                t += 1
                row += rows_a_tile

    return apply_columns
