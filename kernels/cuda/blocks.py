"""What the threads of a block do together: sums in a fixed order, and finding out which block of a channel is the last to finish.

No float atomics: the order of every addition depends on the block's size alone, so two runs give the same bits.
"""

from numba import int64, uint32

from fastbn.kernels.cuda.target import WARP, cuda, device

ALL_LANES = 0xFFFFFFFF
# Elements of shared memory that `block_sums` needs: two for each of at most WARP warps, two for the result.
SCRATCH = 2 * WARP + 2


@device
def divide(a, b):
    """(a // b, a % b) of non-negative numbers below 2**32; an int64 division would be a call."""
    quotient = int64(uint32(a) // uint32(b))
    return quotient, int64(a) - quotient * int64(b)


@device
def block_sums(a, b, scratch):
    """The sums of a and of b over the block, in every thread: a tree over lanes, then a tree over warps.

    `scratch` is shared memory of SCRATCH elements of a's type. The block's size is a multiple of WARP.
    """
    lane = cuda.threadIdx.x % WARP
    warp = cuda.threadIdx.x // WARP
    delta = WARP // 2
    while delta > 0:
        a += cuda.shfl_down_sync(ALL_LANES, a, delta)
        b += cuda.shfl_down_sync(ALL_LANES, b, delta)
        delta //= 2
    if lane == 0:
        scratch[2 * warp] = a
        scratch[2 * warp + 1] = b
    cuda.syncthreads()
    if warp == 0:
        warps = cuda.blockDim.x // WARP
        source = min(lane, warps - 1)
        a = scratch[2 * source]
        b = scratch[2 * source + 1]
        delta = WARP // 2
        while delta > 0:
            other_a = cuda.shfl_down_sync(ALL_LANES, a, delta)
            other_b = cuda.shfl_down_sync(ALL_LANES, b, delta)
            if lane + delta < warps:
                a += other_a
                b += other_b
            delta //= 2
        if lane == 0:
            scratch[2 * WARP] = a
            scratch[2 * WARP + 1] = b
    cuda.syncthreads()
    return scratch[2 * WARP], scratch[2 * WARP + 1]


@device
def is_last_block(counters, group, blocks, ticket):
    """True in the block that finishes last of the `blocks` blocks of a group; the partial results of all others are visible to it.

    The order of arrival decides who merges, never the order of merging. counters[group] is 0 before and after; `ticket` is one
    int32 of shared memory.
    """
    cuda.threadfence()  # this thread's results before the block's ticket
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        ticket[0] = cuda.atomic.add(counters, group, 1)
        if ticket[0] == blocks - 1:
            counters[group] = 0
    cuda.syncthreads()
    cuda.threadfence()  # the others' results: nothing older from this multiprocessor's L1 cache
    return ticket[0] == blocks - 1
