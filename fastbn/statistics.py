"""Mergeable per-channel statistics: count, mean and sum of squared deviations. Plain array code, no kernels."""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn.arguments import checks, scalars
from fastbn.arguments.kinds import plain_array

Array = Any  # a NumPy or CuPy array; CuPy is optional and ships no types


def namespace_of(array: Array) -> Any:
    """NumPy or CuPy, whichever made `array`. Never imports CuPy: its arrays exist only where it is loaded."""
    is_cupy = type(array).__module__.partition(".")[0] == "cupy"
    return sys.modules["cupy"] if is_cupy else np


def namespace_on(device: str) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """NumPy or CuPy for "cpu", "cuda" or "cuda:N", and a context in which arrays are made on that device.

    Raises
    ------
    ValueError
        For any other name.
    ImportError
        Without CuPy; the message names the extra to install.
    """
    if device == "cpu":
        return np, contextlib.nullcontext()
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f"device is {device!r}; it must be 'cpu', 'cuda' or 'cuda:N'")
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            f"device {device!r} needs CuPy: pip install 'fastbn[cuda12]' or 'fastbn[cuda13]', by your driver's version"
        ) from error
    return cupy, cupy.cuda.Device(int(match[1])) if match[1] else contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of every channel; ``a + b`` describes both data sets together.

    Treat it as a value: adding makes a new object, and the constructor copies what it is given.

    Parameters
    ----------
    count : float
        Values per channel, or the total sample weight; the same for every channel. Finite, >= 0.
    mean, m2 : array_like, (C,)
        Mean, and sum of (weighted) squared deviations from it, which is >= 0. Stored as float64. Of an empty set both are 0.
    mean_lo : array_like, (C,), optional
        What float64 cannot hold of the mean: the exact mean is nearer to ``mean + mean_lo``. It matters for float64
        data whose mean is many times its standard deviation. Zeros if left out.

    Raises
    ------
    ValueError
        For a count that is negative or not finite, a negative m2 (in NumPy arrays: a GPU would have to be waited for), arrays that
        are not 1-D, or shapes that differ.
    TypeError
        For a count that is no number, arrays that are not real numbers or are masked, or a mix of NumPy and CuPy arrays.

    Notes
    -----
    A NaN or an infinity in one channel makes that channel's mean and m2 non-finite and touches no other; NumPy's
    warnings about it are silenced. Two objects are equal if their counts and all words of their statistics are; NaN
    equals NaN there, so that a pickled copy equals its original.

    References
    ----------
    T. F. Chan, G. H. Golub and R. J. LeVeque (1983), "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37(3), eq. 2.1: the merge.
    T. J. Dekker (1971), "A floating-point technique for extending the available precision", Numer. Math. 18: the
    two-word sum.

    Examples
    --------
    >>> from fastbn import Moments
    >>> a = Moments(count=2, mean=[1.0, 10.0], m2=[2.0, 0.0])   # channel 0 saw 0 and 2, channel 1 saw 10 and 10
    >>> b = Moments(count=1, mean=[4.0, 10.0], m2=[0.0, 0.0])   # then 4, and 10
    >>> both = a + b
    >>> both.count, both.mean.tolist(), both.var(ddof=1).tolist()
    (3.0, [2.0, 10.0], [4.0, 0.0])
    >>> sum([a, b]) == both == a + Moments.empty(2) + b
    True
    """

    count: float
    mean: Array
    m2: Array
    mean_lo: Array = None

    __hash__ = None  # type: ignore[assignment]  # equal by value, and arrays can be written to
    __array_ufunc__ = None  # `ndarray + Moments` is a TypeError, not an array of objects

    def __post_init__(self) -> None:
        count = _count(self.count)
        xp = namespace_of(self.mean)
        mean = _channel_vector(xp, "mean", self.mean)
        arrays = {"count": count, "mean": mean, "m2": _channel_vector(xp, "m2", self.m2)}
        lo = xp.zeros_like(mean) if self.mean_lo is None else _channel_vector(xp, "mean_lo", self.mean_lo)
        arrays["mean_lo"] = lo
        for name in ("m2", "mean_lo"):
            if arrays[name].shape != mean.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, mean has {mean.shape}; both must be (C,)")
        if xp is np and bool((arrays["m2"] < 0).any()):
            raise ValueError(f"m2 has negative values (smallest: {arrays['m2'].min()}); a sum of squares is >= 0")
        for name, value in arrays.items():
            object.__setattr__(self, name, value)  # frozen: the one place that sets the fields

    @classmethod
    def empty(cls, num_features: int) -> Moments:
        """Moments of no data in `num_features` channels: the neutral element of ``+``."""
        channels = num_channels(num_features)
        return cls(0.0, np.zeros(channels), np.zeros(channels))

    def var(self, ddof: float = 0) -> Array:
        """Variance of every channel, ``m2 / (count - ddof)``.

        Parameters
        ----------
        ddof : float
            0 for the biased variance (normalisation), 1 for the unbiased one (running statistics). With sample weights
            ddof=1 reads them as repetition counts.

        Returns
        -------
        array, (C,), float64
            NaN, without a warning, where ``count <= ddof``: too few values to speak of a variance.
        """
        if self.count <= ddof:
            return namespace_of(self.mean).full_like(self.mean, math.nan)
        return self.m2 / (self.count - ddof)

    def __add__(self, other: object) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge Moments of {self.mean.shape[0]} channels with Moments of {other.mean.shape[0]} channels")
        # From the heavier set, so that the correction, whose rounding is all that is lost, is the smaller one.
        a, b = (self, other) if self.count >= other.count else (other, self)
        if b.count == 0:
            return Moments(a.count, a.mean, a.m2, a.mean_lo)
        if namespace_of(other.mean) is not namespace_of(self.mean):
            raise TypeError("cannot merge Moments held in NumPy arrays with Moments held in CuPy arrays; convert one")
        count = a.count + b.count
        with np.errstate(all="ignore"):  # inf - inf stays in its channel, silently
            delta = (b.mean - a.mean) + (b.mean_lo - a.mean_lo)
            m2 = a.m2 + b.m2 + delta * (delta * (a.count * (b.count / count)))
            mean, lo = _two_sum(a.mean, delta * (b.count / count))
            mean, lo = _two_sum(mean, lo + a.mean_lo)
        return Moments(count, mean, m2, lo)

    def __radd__(self, other: object) -> Moments:
        """``0 + self``, with which ``sum()`` begins."""
        return self + Moments.empty(len(self.mean)) if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        xp = namespace_of(self.mean)
        if self.count != other.count or self.mean.shape != other.mean.shape or namespace_of(other.mean) is not xp:
            return False
        pairs = ((self.mean, other.mean), (self.m2, other.m2), (self.mean_lo, other.mean_lo))
        return all(bool(xp.array_equal(p, q, equal_nan=True)) for p, q in pairs)

    def __repr__(self) -> str:
        low = f", mean_lo={self.mean_lo!r}" if bool((self.mean_lo != 0).any()) else ""
        return f"Moments(count={self.count:.17g}, mean={self.mean!r}, m2={self.m2!r}{low})"


def num_channels(num_features: Any) -> int:
    """The length of a channel axis.

    Raises
    ------
    TypeError, ValueError
        For what is not a whole number >= 0.
    """
    channels = scalars.whole(num_features, "num_features")
    if channels < 0:
        raise ValueError(f"num_features is {channels}; it is the length of the channel axis and must be >= 0")
    return channels


def _count(value: Any) -> float:
    """A finite number >= 0, or an array of no dimensions that holds one, as float."""
    if isinstance(value, np.ndarray) or namespace_of(value) is not np:
        value = value.item() if value.ndim == 0 else value
    count = scalars.number(value, "count", "finite and >= 0")
    if not 0 <= count < math.inf:
        raise ValueError(f"count is {count}; it must be finite and >= 0")
    return count


def _channel_vector(xp: Any, name: str, values: Array) -> Array:
    """`values` as a fresh float64 array (C,) of the namespace `xp`."""
    if hasattr(values, "__cuda_array_interface__") != (xp is not np):
        raise TypeError(f"{name} and mean must both be NumPy arrays or both be CuPy arrays; convert one")
    array = xp.asarray(plain_array(values, name) if xp is np and isinstance(values, np.ndarray) else values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}; it must hold real numbers: {checks.cast_advice(array.dtype, name)}")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must be 1-D, (C,)")
    with contextlib.nullcontext() if xp is np else array.device:  # CuPy copies to the current device
        return array.astype(xp.float64, copy=True)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Sum and rounding error, a + b = s + e exactly (Knuth, TAOCP vol. 2, 4.2.2, theorem B)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)
