"""The order in which an array's axes lie in memory, and what follows: three axes (N, C, S), strides, the way back.

Sort the axes by stride, and memory reads: some outer axes, the channel axis, some inner axes. The outer ones collapse to N rows, the inner
ones to S contiguous values. NCHW, NCDHW, channels-last views, ``axis=-1``, Fortran order and batch slices all become (N, C, S) so.
"""

from __future__ import annotations

from math import prod
from typing import Any


def rows_channels_values(order: tuple[int, ...], axis: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(N, C, S) of an array whose axes lie in memory in `order`."""
    at = order.index(axis)
    return prod(shape[a] for a in order[:at]), shape[axis], prod(shape[a] for a in order[at + 1 :])


def axis_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Axes from the largest stride to the smallest; axes of length 1 keep their place, as their stride means nothing."""
    order = list(range(len(shape)))
    long = [a for a in order if shape[a] != 1]
    by_stride = sorted(long, key=lambda a: -abs(strides[a]))
    for place, a in zip(long, by_stride, strict=True):
        order[place] = a
    return tuple(order)


def _collapse(axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """(length, stride in bytes) of several axes read as one, or None where they are not evenly spaced."""
    length, stride = 1, 0
    for a in reversed(axes):
        if shape[a] == 1:
            continue
        if length == 1:
            stride = strides[a]
        elif strides[a] != length * stride:
            return None
        length *= shape[a]
    return length, stride


def strides_in(
    order: tuple[int, ...], axis: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, int] | None:
    """Strides of rows and channels, in elements, of an array read in `order`; None if it cannot be read so without a copy."""
    at = order.index(axis)
    rows = _collapse(order[:at], shape, strides)
    inner = _collapse(order[at + 1 :], shape, strides)
    if rows is None or inner is None:
        return None
    (N, row_stride), (S, inner_stride), C = rows, inner, shape[axis]
    channel_stride = strides[axis] if C > 1 else S * itemsize
    if N == 1:
        row_stride = channel_stride * C
    if S > 1 and inner_stride != itemsize:
        return None
    # One value after another: S values of a channel, channels apart by S or more, rows apart by all their channels or more.
    if channel_stride < S * itemsize or channel_stride % itemsize or row_stride % itemsize:
        return None
    if row_stride < channel_stride * (C - 1) + S * itemsize or (S == 1 and C > 1 and channel_stride != itemsize):
        return None
    return row_stride // itemsize, channel_stride // itemsize


def dense_strides(order: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a contiguous array whose axes lie in memory in `order`."""
    strides = [0] * len(shape)
    step = itemsize
    for a in reversed(order):
        strides[a] = step
        step *= max(shape[a], 1)
    return tuple(strides)


def inverse(order: tuple[int, ...]) -> tuple[int, ...] | None:
    """How an array whose axes lie in this order is transposed to their own; None if it need not be."""
    straight = tuple(range(len(order)))
    return None if order == straight else tuple(order.index(a) for a in straight)


def weights_in_order(xp: Any, weight: Any, shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> Any:
    """Weights for data of a shape, (N,) or that shape without the channel axis, one for each position, axes as they lie in memory.

    `xp` is the arrays' module, NumPy or CuPy.
    """
    positions = shape[:axis] + shape[axis + 1 :]
    if weight.shape != positions:
        weight = xp.broadcast_to(weight.reshape(weight.shape + (1,) * (len(positions) - 1)), positions)
    return weight.transpose(tuple(a - (a > axis) for a in order if a != axis))
