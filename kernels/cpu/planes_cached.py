"""The backward for planes of a tensor that the caches hold: a channel's sums, then its dx out of the L2 cache.

Formulas, helpers and arguments are those of planes_backward.py, whose fused sweep is for tensors in memory. What it does once a plane, of
which a cached tensor has short ones, is done once a channel here: 128x16x12x12 in 0.7 of its time in float32 lanes, 32x64x28x28 in 0.8,
32x6x28x28 in 1.0. Float32 lanes make that 0.62, 0.7 and 0.7 of the fused sweep in float64 lanes (one thread, both in turn, minima).
A forward written so was slower: 28x28 in 1.25 of the fused sweep's time, and as fast with sums in float32.
"""

from fastbn.kernels.cpu.channels import finish_channels_backward
from fastbn.kernels.cpu.helpers import inline
from fastbn.kernels.cpu.planes_backward import apply_plane, coefficient_vectors, reduce_again, reduce_channel, set_sums
from fastbn.kernels.cpu.simd import lanes64_unless, plane


@inline
def apply_channel(gradients, table, grads, c, shape, lanes32):
    """dx of a channel."""
    x, dy, dx, dresidual, weight, mask = gradients
    coefficients = coefficient_vectors(x[0], table, grads, c, lanes32)
    for n in range(shape.N):
        xp, dyp, dxp, drp = plane(x, n, c), plane(dy, n, c), plane(dx, n, c), plane(dresidual, n, c)
        apply_plane(xp, dyp, dxp, drp, plane(mask, n, c), plane(weight, n, 0), None, 0, shape.S, coefficients, False)


def backward_cached(thread, first, last, gradients, channels, shape, options, numbers, table, grads, partial, scratch):
    """Training backward of the channels first..last: dx, dresidual, and the rows of grads.

    A channel that float32 does not suit is reduced again, and written, in float64 lanes.
    """
    x, dy, _, _, weight, mask = gradients
    lanes32, count, group = options.lanes32, numbers.count, shape.group
    for start in range(first, last, group):
        stop = min(start + group, last)
        for c in range(start, stop):
            set_sums(partial, 0, c, reduce_channel(x, dy, weight, mask, table, c, 0, shape.N, 0, shape.S, lanes64_unless(lanes32)))
        left_out = finish_channels_backward(table, grads, channels, partial, start, stop, 1, count, False, lanes32)
        for c in range(start, stop):
            if left_out > 0 and reduce_again(gradients, channels, table, grads, c, shape.N, shape.S, count, partial, lanes32):
                apply_channel(gradients, table, grads, c, shape, None)
            else:
                apply_channel(gradients, table, grads, c, shape, lanes32)
    return 0
