"""One generator of nasty inputs for every test: shapes, values, memory layouts. All deterministic.

`SHAPES`, `VALUES` and `LAYOUTS` are dictionaries whose keys read well as pytest ids. A value maker returns a
C-contiguous array with the channels on axis 1; a layout takes such an array and returns `(x, axis)`, where x holds
the values in some other arrangement of memory, with the channels on `axis`.
"""

import tempfile
import zlib

import numpy as np

FLOATS = [np.float32, np.float64]

# oneDNN's regression shapes (mb: batch, c: channels, h x w), PyTorch's, the planes of ResNet-50, and sizes around the
# widths of vectors. The last oneDNN shape (mb3072 c64 h112) is scaled down to 0.6 million elements.
SHAPES = {
    "nc 64x128": (64, 128),
    "nc 3x1": (3, 1),
    "nc 2x1": (2, 1),
    "nc 1000x3": (1000, 3),
    "nc 33x257": (33, 257),
    "nc 18x9001": (18, 9001),
    "ncl 5x5x5": (5, 5, 5),
    "ncl 9x128x1": (9, 128, 1),
    "ncl 4x3x100": (4, 3, 100),
    "mb1 c257 h28": (1, 257, 28, 28),
    "mb9 c128 w1": (9, 128, 1, 1),
    "mb5 c33 w27": (5, 33, 1, 27),
    "mb2 c128 h2": (2, 128, 2, 2),
    "mb3072 c64 h112 scaled": (192, 4, 28, 28),
    "planes 7x7": (6, 40, 7, 7),
    "planes 7x7, many": (40, 12, 7, 7),
    "planes 5x5, few channels": (70, 3, 5, 5),
    "planes 11x13, wide rows": (12, 70, 11, 13),
    "planes 14x14": (4, 20, 14, 14),
    "planes 14x14, many": (9, 7, 14, 14),
    "planes 10x10, many": (65, 7, 10, 10),
    "planes 27x33": (3, 5, 27, 33),
    "planes 56x56": (2, 6, 56, 56),
    "one channel of 301467": (3, 1, 317, 317),
    "one sample": (1, 8, 9, 11),
    "ncdhw": (2, 5, 3, 4, 5),
    "six axes": (2, 3, 2, 3, 2, 3),
}
SHAPES.update({f"sizes of {n}": (n, n, n) for n in (15, 16, 17, 31, 32, 33)})

SMALL_SHAPES = {
    "nc": (12, 7),
    "ncl": (6, 5, 9),
    "nchw": (4, 6, 5, 7),
    "ncdhw": (3, 4, 2, 3, 5),
    "six axes": (2, 3, 2, 3, 2, 3),
}


def seed_of(*parts):
    """A seed that depends on the arguments alone (hash() differs from run to run)."""
    return zlib.crc32(repr(parts).encode())


# ----------------------------------------------------------------------------------------------------------- values
def _normal(rng, shape):
    return rng.standard_normal(shape)


def _around(mean, std):
    return lambda rng, shape: mean + std * rng.standard_normal(shape)


def _scaled(factor):
    return lambda rng, shape: factor * rng.standard_normal(shape)


def _outlier_first(rng, shape):
    x = rng.standard_normal(shape)
    x[0] = np.where(np.arange(x[0].size).reshape(x[0].shape) % max(1, x[0][0].size) == 0, 1e5, x[0])
    return x


def _padded(rng, shape):
    """Images whose corners are black: what lies at the first and the last place of a channel is 100 standard deviations off."""
    x = 100 + rng.standard_normal(shape)
    planes = x.reshape(*shape[:2], -1)
    if planes.shape[2] > 2:
        planes[:, :, (0, -1)] = 0
    else:
        planes[(0, -1), :] = 0
    return x


def _constant(value):
    def make(rng, shape):
        x = rng.standard_normal(shape)
        x[:, 0] = value
        return x

    return make


def _poisoned(value):
    def make(rng, shape):
        x = rng.standard_normal(shape)
        x[(shape[0] // 2, shape[1] // 2) + (0,) * (len(shape) - 2)] = value
        return x

    return make


def _subnormal(rng, shape):
    return rng.standard_normal(shape)  # scaled in values(), where the dtype is known


VALUES = {
    "normal": _normal,
    "1e4 +- 1e-2": _around(1e4, 1e-2),
    "1e6 +- 1": _around(1e6, 1.0),
    "-1e6 +- 1": _around(-1e6, 1.0),
    "first value 1e5": _outlier_first,
    "padded": _padded,
    "1e25": _scaled(1e25),
    "1e-30": _scaled(1e-30),
    "constant 0.1": _constant(0.1),
    "constant 1e8": _constant(1e8),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "subnormal": _subnormal,
    "one nan": _poisoned(np.nan),
    "one inf": _poisoned(np.inf),
    "one -inf": _poisoned(-np.inf),
}
POISON = ("one nan", "one inf", "one -inf")
FINITE = tuple(name for name in VALUES if name not in POISON)


def values(kind, shape, dtype=np.float32, seed=0):
    """C-contiguous array of `shape` (channels on axis 1) holding values of the given kind."""
    rng = np.random.default_rng(seed_of(kind, shape, np.dtype(dtype).name, seed))
    x = VALUES[kind](rng, shape)
    if kind == "subnormal":
        x *= 1e-40 if np.dtype(dtype) == np.float32 else 1e-310
    return np.ascontiguousarray(x.astype(dtype))


def normal(shape, dtype=np.float32, seed=0):
    """Standard normal values; the usual input where nothing nasty is wanted."""
    return values("normal", shape, dtype, seed)


def parameters(channels, dtype=np.float32, seed=0):
    """gamma (negative ones among them), beta, running_mean and running_var (positive), each of shape (C,)."""
    rng = np.random.default_rng(seed_of("parameters", channels, seed))
    gamma = rng.uniform(0.5, 1.5, channels) * np.where(np.arange(channels) % 3 == 1, -1, 1)
    beta = rng.uniform(-1, 1, channels)
    return tuple(a.astype(dtype) for a in (gamma, beta, rng.uniform(-1, 1, channels), rng.uniform(0.5, 2, channels)))


# ---------------------------------------------------------------------------------------------------------- layouts
def _inside(values, index, shape):
    """Write `values` into a view of a larger array, and return the view."""
    whole = np.full(shape, 777, values.dtype)  # a value that would show if a kernel ran past the view
    view = whole[index]
    view[...] = values
    return view


def _axis_last(v):
    return np.ascontiguousarray(np.moveaxis(v, 1, -1))


def _channel_slice_last(v):
    v = _axis_last(v)
    return _inside(v, np.s_[..., 1:-2], (*v.shape[:-1], v.shape[-1] + 3))


def _spatial_slice(v):
    if v.ndim == 2:  # no spatial axis: a slice of the columns
        return _inside(v, np.s_[:, 2:-1], (v.shape[0], v.shape[1] + 3))
    return _inside(v, np.s_[..., 2:-1], (*v.shape[:-1], v.shape[-1] + 3))


def _broadcast(v):
    return np.broadcast_to(v[:1] if v.ndim == 2 else v[..., :1], v.shape)


def _unaligned(v):
    buffer = np.zeros(v.nbytes + 1, np.uint8)
    view = buffer[1:].view(v.dtype).reshape(v.shape)
    view[...] = v
    return view


def _read_only(v):
    v = v.copy()
    v.flags.writeable = False
    return v


def _memory_mapped(v):
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, v.dtype, mode="w+", shape=v.shape)
        mapped[...] = v
        return mapped


# name -> (rearrange, channel axis of the result)
LAYOUTS = {
    "contiguous": (lambda v: v, 1),
    "channels last view": (lambda v: np.moveaxis(_axis_last(v), -1, 1), 1),
    "axis -1": (_axis_last, -1),
    "axis 0": (lambda v: np.ascontiguousarray(np.moveaxis(v, 1, 0)), 0),
    "fortran": (np.asfortranarray, 1),
    "batch slice": (lambda v: _inside(v, np.s_[2:-1], (v.shape[0] + 3, *v.shape[1:])), 1),
    "every second sample": (lambda v: _inside(v, np.s_[::2], (2 * v.shape[0], *v.shape[1:])), 1),
    "channel slice": (lambda v: _inside(v, np.s_[:, 1:-2], (v.shape[0], v.shape[1] + 3, *v.shape[2:])), 1),
    "channel slice, axis -1": (_channel_slice_last, -1),
    "spatial slice": (_spatial_slice, 1),
    "negative strides": (lambda v: _inside(v, np.s_[::-1, ..., ::-1], v.shape), 1),
    "negative channel stride": (lambda v: _inside(v, np.s_[:, ::-1], v.shape), 1),
    "zero strides": (_broadcast, 1),
    "unaligned": (_unaligned, 1),
    "big-endian": (lambda v: v.astype(v.dtype.newbyteorder(">")), 1),
    "read-only": (_read_only, 1),
    "memory-mapped": (_memory_mapped, 1),
}


def arrange(layout, v):
    """`(x, axis)`: the values of `v` (channels on axis 1) in the given layout."""
    rearrange, axis = LAYOUTS[layout]
    return rearrange(v), axis


def guarded(shape, dtype, margin=64):
    """An array inside a larger buffer whose margins hold a known value, and a function that checks the margins."""
    size = int(np.prod(shape))
    buffer = np.full(size + 2 * margin, 555, dtype)
    inner = buffer[margin : margin + size].reshape(shape)

    def untouched():
        return bool((buffer[:margin] == 555).all() and (buffer[margin + size :] == 555).all())

    return inner, untouched
