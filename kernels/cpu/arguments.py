"""The arguments of kernels, in groups: what travels together is one tuple.

Behind (thread, first, last), all kernels of a forward take

    data, channels, shape, options, numbers, table, partial, scratch

and all kernels of a backward

    gradients, channels, shape, options, numbers, table, grads, partial, scratch

So the kernels of an operation make one program, in which one call of machine code runs them all (team.py). The host passes flat tuples,
which are made and read faster: arrays, options, numbers, and one array of the integers that are the same in all calls of a plan.
groups.py makes the groups of them.

- A tensor is (pointer, stride of n or of a row, stride of c), in elements, or None where it is absent. Weights of whole rows or planes are
  (pointer, stride).
- A vector, of one value a channel, is (pointer, bytes of a value). 4 bytes are float32, 8 float64, 0 absent.
- `table` and `grads` have a row for each name in kernels/rows.py; `partial` is (blocks, 4, channels), the sums or moments of blocks.

This file imports no Numba: the host reads it too.
"""

from collections import namedtuple

# Tensors of a forward; the sums of the weights of each block of a channel; the ReLU's mask.
Data = namedtuple("Data", "x y residual weight block_weights mask")
# Vectors of a forward. In training mean and var are the running statistics, else what x is normalised with; low is what rounding the mean
# has lost.
Channels = namedtuple("Channels", "gamma beta mean var low")
# Tensors and vectors of a backward.
Gradients = namedtuple("Gradients", "x dy dx dresidual weight mask")
ChannelGradients = namedtuple("ChannelGradients", "dgamma dbeta")
# N, C, S: planes of S values, or rows of C * S columns. `folded` rows are read as one; there are `rows` such rows, and `tail_columns`
# columns of one that is incomplete. A group has `group` channels, a channel `blocks` of `block` planes or rows, a part of a strip `part`
# rows, a segment `segment` values of a plane. A thread's workspace has `scratch_rows` of `scratch_columns`.
Shape = namedtuple("Shape", "N C S rows tail_columns folded group blocks block part segment scratch_rows scratch_columns")
# None or True, known when a kernel is compiled. lanes64: y in float64 lanes. leftovers: only the channels that float32 lanes cannot do.
ForwardOptions = namedtuple("ForwardOptions", "relu lanes64 leftovers")
# frozen: statistics are constants and x is not needed. lanes32: sums and dx in float32 lanes, where these do.
BackwardOptions = namedtuple("BackwardOptions", "frozen lanes32")
# `correction` is n / (n - 1) or 1; `limit` the largest number that running statistics hold; `force` moves them although some are left out;
# `streamed`: output goes around the cache; `shift_places`: offsets in a channel of the three values whose median is its shift.
ForwardNumbers = namedtuple("ForwardNumbers", "eps momentum correction limit force streamed shift_places")
# `count` values a channel; `constant`: the statistics do not depend on x.
BackwardNumbers = namedtuple("BackwardNumbers", "count constant streamed")

# What the host passes: arrays, of which the kernels get the addresses. The workspace holds a backward's grads, then partial, then scratch.
ForwardArrays = namedtuple("ForwardArrays", (*Data._fields, *Channels._fields, "table", "workspace"))
BackwardArrays = namedtuple("BackwardArrays", (*Gradients._fields, *ChannelGradients._fields, "table", "workspace"))
# And the array of integers: the shape, two strides of each tensor, the size of each vector, and the three places of a forward.
FORWARD_TENSORS = tuple(name for name in Data._fields if name != "block_weights")
PLACES = len(Shape._fields) + 2 * len(FORWARD_TENSORS) + len(Channels._fields)


def whole_lines(n: int) -> int:
    """n rounded up to whole cache lines of float64: parts of the workspace begin at one."""
    return (n + 7) // 8 * 8
