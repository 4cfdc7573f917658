"""Forward kernels for NC and channels last: x is (rows, C), C contiguous. Twin: kernels/cpu/columns.py.

Versions
--------
1. A thread a channel, down all rows: with 64 channels 64 threads work.
2. (here) blocks of `wide` x `high` threads; `widest` and the number of threads are fixed when compiling, so that few channels need
   no kernels of their own. A thread owns the `lanes` channels of one vector and reads every high-th row, TILE
   elements (8 rows of float32 vectors) before it uses them. Rows are cut into `splits`; a block takes `chunk` tiles of rows of one
   column tile. Statistics: tile -> thread -> block -> channel; the block of a column tile that finishes last merges, in order.

Numbers are as in planes.py: a shift for each thread and channel, merges around a common centre, a second attempt with x scaled
where squares overflow float32. Bits depend on the shape alone.

Checked on the CUDA simulator and by compiling to PTX and machine code; not yet run on a GPU.
"""

import math
from functools import cache

from numba import float32, float64, int32, int64, uint32

from fastbn.kernels.cuda.blocks import divide, is_last_block
from fastbn.kernels.cuda.channels import FIELDS, HI, LO, SCALE_T, SHIFT, finish_stats, given_coefs
from fastbn.kernels.cuda.planes import SMALL, first_shift, put_partial
from fastbn.kernels.cuda.target import cuda, device
from fastbn.kernels.cuda.tiles import merge, part_size, tile_normalise, tile_size
from fastbn.kernels.cuda.vectors import access
from fastbn.kernels.cuda.weights import weighted_moments


@device
def place(wide, lanes, column_tiles, chunk, rows_a_tile, block):
    """(column tile, split, tx, ty, first channel, first row) of this thread in block number `block`."""
    k, column_tile = divide(block, column_tiles)
    ty, tx = divide(int64(cuda.threadIdx.x), wide)
    return column_tile, k, tx, ty, (column_tile * wide + tx) * lanes, k * chunk * rows_a_tile + ty


@device
def valid_rows(row, rows, high, per_tile):
    """How many of a thread's rows row, row + high, ... of one tile exist."""
    left, _ = divide(max(rows - row, 0) + high - 1, high)
    return min(left, per_tile)


@cache
def row_access(kind, lanes, size):
    """load_rows(x, tile, row, count, high, C, c): `count` rows of one vector; `size` elements without a branch between the loads."""
    load, _ = access(kind, lanes)
    per_tile = size // lanes

    @device
    def load_rows(x, tile, row, count, high, C, c):
        if count >= per_tile:
            for u in range(per_tile):
                load(x, (row + u * high) * C + c, tile, u * lanes)
        else:
            for u in range(per_tile):
                if u < count:
                    load(x, (row + u * high) * C + c, tile, u * lanes)

    return load_rows


@cache
def lane_moments(T, lanes):
    """moments(tile, count, shift, scale, n, mean, m2): merge `count` rows of a tile into each lane's moments. Overwrites tile."""
    per_tile = tile_size(T) // lanes

    @device
    def moments(tile, count, shift, scale, n, mean, m2):
        rows = T(count)
        for v in range(lanes):
            total = T(0)
            for u in range(per_tile):
                k = u * lanes + v
                tile[k] = tile[k] * scale - shift[v]
                if u < count:
                    total += tile[k]
            tile_mean = total / rows
            tile_m2 = T(0)
            for u in range(per_tile):
                deviation = tile[u * lanes + v] - tile_mean
                if u < count:
                    tile_m2 += deviation * deviation
            _, mean[v], m2[v] = merge(n, mean[v], m2[v], rows, tile_mean, tile_m2)
        return n + rows

    return moments


@device
def add_columns(values, columns, high, out):
    """out[column] = the sum of values[ty * columns + column] over ty, in order. All threads; syncs before and after."""
    cuda.syncthreads()
    column = int64(cuda.threadIdx.x)
    while column < columns:
        total = values[column]
        for ty in range(1, high):
            total += values[ty * columns + column]
        out[column] = total
        column += int64(cuda.blockDim.x)
    cuda.syncthreads()


@cache
def merge_columns(room):
    """merge_columns(partials, column_tile, columns, ...): a tile's channels over all splits, in order; as many threads a channel as fit.

    `room` is the largest of threads and columns.
    """

    @device
    def merge_columns(
        partials, column_tile, columns, C, splits, counts, table, coefs, gamma, beta, running_mean, running_var, momentum, eps,
        correction,
    ):  # fmt: skip
        s0_cells = cuda.shared.array(room, float64)
        s1_cells = cuda.shared.array(room, float64)
        s2_cells = cuda.shared.array(room, float64)
        groups, _ = divide(int64(cuda.blockDim.x), columns)
        groups = max(groups, 1)
        merge_cells = groups * columns
        cell = int64(cuda.threadIdx.x)
        while cell < merge_cells:
            g, column = divide(cell, columns)
            c = column_tile * columns + column
            s0, s1, s2 = 0.0, 0.0, 0.0
            if c < C:
                shift, offset = first_shift(partials, c * FIELDS, C * FIELDS, splits)
                rounds, _ = divide(splits - g + groups - 1, groups)  # a loop that ends at `splits` would divide int64, by a call
                for r in range(rounds):
                    row = ((g + r * groups) * C + c) * FIELDS
                    n = partials[row]
                    deviation = (partials[row + 1] - shift) + (partials[row + 2] - offset)
                    s0 += n
                    s1 += n * deviation
                    s2 += partials[row + 3] + n * deviation * deviation
            s0_cells[cell] = s0
            s1_cells[cell] = s1
            s2_cells[cell] = s2
            cell += int64(cuda.blockDim.x)
        cuda.syncthreads()
        column = int64(cuda.threadIdx.x)
        while column < columns:
            c = column_tile * columns + column
            if c < C:
                s0, s1, s2 = s0_cells[column], s1_cells[column], s2_cells[column]
                for g in range(1, groups):
                    s0 += s0_cells[g * columns + column]
                    s1 += s1_cells[g * columns + column]
                    s2 += s2_cells[g * columns + column]
                average = s1 / s0
                shift, offset = first_shift(partials, c * FIELDS, C * FIELDS, splits)
                if counts.size > 0:
                    s0, correction = counts[0], counts[1]
                finish_stats(
                    table, coefs, c, C, shift, s0, offset + average, s2 - average * s1, gamma, beta, running_mean, running_var,
                    momentum, eps, correction,
                )  # fmt: skip
            column += int64(cuda.blockDim.x)

    return merge_columns


@cache
def stats_columns(kind, lanes, threads, widest, weighted=False):
    """The kernel for arrays of `kind` with blocks of `threads` threads, at most `widest` vectors across; `weighted` weighs the rows."""
    T = kind.compute
    TILE = tile_size(T)
    rescale = float32 == T
    load_rows = row_access(kind, lanes, TILE)
    moments = lane_moments(T, lanes)
    weighted_lane = weighted_moments(T, lanes)
    room = TILE if weighted else 1
    per_tile = TILE // lanes
    most = widest * lanes
    cells = threads * lanes
    merge_blocks = merge_columns(max(threads, most))
    small = T(SMALL)

    def stats_columns(
        x, weight, weight_n, counts, rows, C, wide, splits, chunk, partials, counters, table, coefs, gamma, beta,
        running_mean, running_var, momentum, eps, correction,
    ):  # fmt: skip
        a_cells = cuda.shared.array(cells, T)
        b_cells = cuda.shared.array(cells, T)
        centre = cuda.shared.array(most, T)
        a_sum = cuda.shared.array(most, T)
        b_sum = cuda.shared.array(most, T)
        n_cells = cuda.shared.array(threads, T)
        ticket = cuda.shared.array(1, int32)
        tile = cuda.local.array(TILE, T)
        w = cuda.local.array(room, T)
        shift = cuda.local.array(lanes, T)
        mean = cuda.local.array(lanes, T)
        m2 = cuda.local.array(lanes, T)
        high, _ = divide(threads, wide)
        columns = wide * lanes
        rows_a_tile = high * per_tile
        column_tiles, _ = divide(C + columns - 1, columns)
        column_tile, k, tx, ty, c, first = place(wide, lanes, column_tiles, chunk, rows_a_tile, int64(cuda.blockIdx.x))
        inside = c < C
        end = min(rows, (k + 1) * chunk * rows_a_tile)

        scale = T(1)
        while True:
            n = T(0)
            for v in range(lanes):
                shift[v], mean[v], m2[v] = T(0), T(0), T(0)
            # tile -> thread
            row = first
            while inside and row < end:
                count = valid_rows(row, end, high, per_tile)
                load_rows(x, tile, row, count, high, C, c)
                if weighted:
                    for u in range(per_tile):
                        for v in range(lanes):
                            w[u * lanes + v] = weight[(row + u * high) * weight_n] if u < count else T(0)
                    after = n
                    for v in range(lanes):
                        after, shift[v], mean[v], m2[v] = weighted_lane(tile, w, v, shift[v], scale, n, mean[v], m2[v])
                    n = after
                else:
                    if n == T(0):
                        for v in range(lanes):
                            shift[v] = tile[v] * scale
                    n = moments(tile, count, shift, scale, n, mean, m2)
                row += rows_a_tile
            # thread -> block: a centre from the threads of ty == 0, then deviations around it
            column = tx * lanes
            if ty == 0:
                for v in range(lanes):
                    centre[column + v] = shift[v]
            if tx == 0:
                n_cells[ty] = n
            cuda.syncthreads()
            total = T(0)
            for h in range(high):
                total += n_cells[h]
            for v in range(lanes):
                deviation = (shift[v] - centre[column + v]) + mean[v]
                a_cells[ty * columns + column + v] = n * deviation if n > T(0) else T(0)
            add_columns(a_cells, columns, high, a_sum)
            for v in range(lanes):
                middle = centre[column + v]
                if total > T(0):  # a block whose rows all weigh 0 has none
                    middle += a_sum[column + v] / total
                deviation = (shift[v] - middle) + mean[v]
                if n == T(0):
                    deviation = T(0)
                a_cells[ty * columns + column + v] = n * deviation
                b_cells[ty * columns + column + v] = m2[v] + n * deviation * deviation
                shift[v] = middle
            add_columns(b_cells, columns, high, b_sum)
            add_columns(a_cells, columns, high, a_sum)
            overflow = 0
            for v in range(lanes):
                if inside and not math.isfinite(b_sum[column + v]):
                    overflow = 1
            if not rescale or cuda.syncthreads_or(overflow) == 0 or scale != T(1):
                break
            scale = small

        # block -> channel; rows of partials are (split, channel)
        if ty == 0 and inside:
            for v in range(lanes):
                column = tx * lanes + v
                put_partial(partials, k * C + c + v, total, shift[v], a_sum[column], b_sum[column], scale)
        if is_last_block(counters, column_tile, splits, ticket):
            merge_blocks(
                partials, column_tile, columns, C, splits, counts, table, coefs, gamma, beta, running_mean, running_var,
                momentum, eps, correction,
            )  # fmt: skip

    return stats_columns


@cache
def normalise_columns(kind, lanes, threads, widest, relu, residual, given=False):
    """The kernel for arrays of `kind`: `relu` writes a word of the mask a tile, unless that is empty; `residual` is added first.

    `given`: coefs are empty and made from given statistics, once a block, so that inference is one launch.
    """
    T = kind.compute
    TILE = tile_size(T)
    _, store = access(kind, lanes)
    PART = part_size(T, lanes)
    load_rows = row_access(kind, lanes, PART)
    normalise = tile_normalise(T, relu, residual)
    given_channel = given_coefs(T)
    per_tile, per_part = TILE // lanes, PART // lanes
    room = PART if residual else 1
    cells = 4 * widest * lanes if given else 1

    def normalise_columns(x, y, residual_x, mask, rows, C, wide, chunk, coefs, gamma, beta, running_mean, running_var, eps):
        tile = cuda.local.array(PART, T)
        added = cuda.local.array(room, T)
        hi = cuda.local.array(lanes, T)
        lo = cuda.local.array(lanes, T)
        scale = cuda.local.array(lanes, T)
        shift = cuda.local.array(lanes, T)
        high, _ = divide(threads, wide)
        columns = wide * lanes
        rows_a_tile = high * per_tile
        column_tiles, _ = divide(C + columns - 1, columns)
        # Rows from last to first: what stats_columns has read last is still in the L2 cache.
        column_tile, k, tx, _, c, row = place(wide, lanes, column_tiles, chunk, rows_a_tile, int64(cuda.gridDim.x - 1 - cuda.blockIdx.x))
        end = min(rows, (k + 1) * chunk * rows_a_tile)
        if given:
            shared = cuda.shared.array(cells, T)
            column = int64(cuda.threadIdx.x)
            while column < columns and column_tile * columns + column < C:
                i = 4 * column
                shared[i], shared[i + 1], shared[i + 2], shared[i + 3] = given_channel(
                    column_tile * columns + column, gamma, beta, running_mean, running_var, eps
                )
                column += threads
            cuda.syncthreads()
        if c < C:
            for v in range(lanes):
                if given:
                    i = 4 * (tx * lanes + v)
                    hi[v], lo[v], scale[v], shift[v] = shared[i], shared[i + 1], shared[i + 2], shared[i + 3]
                else:
                    hi[v] = coefs[HI * C + c + v]
                    lo[v] = coefs[LO * C + c + v]
                    scale[v] = coefs[SCALE_T * C + c + v]
                    shift[v] = coefs[SHIFT * C + c + v]
            t = k * chunk
            while row < end:
                count = valid_rows(row, end, high, per_tile)
                word = uint32(0)
                for bit in range(0, TILE, PART):
                    at, left = row + bit // lanes * high, count - bit // lanes
                    load_rows(x, tile, at, left, high, C, c)
                    if residual:
                        load_rows(residual_x, added, at, left, high, C, c)
                    for u in range(per_part):
                        if u < left:
                            for v in range(lanes):
                                i = u * lanes + v
                                word = normalise(tile, i, added, i, hi[v], lo[v], scale[v], shift[v], word, bit + i)
                            store(y, (at + u * high) * C + c, tile, u * lanes)
                if relu and mask.size > 0:
                    mask[(t * column_tiles + column_tile) * threads + int64(cuda.threadIdx.x)] = word
                t += 1
                row += rows_a_tile

    return normalise_columns
