"""Which numbers and words the functions accept as parameters; errors as in checks.py."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np


def whole(value: Any, name: str) -> int:
    """A whole number as int.

    Raises
    ------
    TypeError
        For anything else, bool and floats such as 1.0 included.
    """
    if type(value) is int:
        return value
    if not isinstance(value, (bool, np.bool_)):
        with suppress(TypeError):  # arrays have an __index__ that raises
            return operator.index(value)
    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; pass a whole number, such as 1")


def number(value: Any, name: str, allowed: str = "finite") -> float:
    """A real number as float; `allowed` is for the error's text.

    Raises
    ------
    TypeError
        For anything else, bool included.
    ValueError
        For a whole number or a fraction beyond float64.
    """
    if type(value) is float:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, np.floating, np.integer)):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; pass a real number")
    try:
        return float(value)
    except OverflowError:  # its digits may be too many to print
        raise ValueError(f"{name} is beyond the range of float64, 1.8e308; it must be {allowed}") from None


_EPS = "greater than 0 and finite, such as 1e-5"
_MOMENTUM = "in [0, 1], the weight of the new batch in the running statistics, such as 0.1"


def eps(value: Any) -> float:
    """eps as float: finite and > 0.

    Raises
    ------
    TypeError, ValueError
    """
    if type(value) is float and 0.0 < value < math.inf:
        return value
    e = number(value, "eps", _EPS)
    if not 0.0 < e < math.inf:
        raise ValueError(f"eps is {e}; it must be {_EPS}")
    return e


def momentum(value: Any) -> float:
    """The weight of the new batch as float: from 0 to 1.

    Raises
    ------
    TypeError, ValueError
    """
    if type(value) is float and 0.0 <= value <= 1.0:
        return value
    m = number(value, "momentum", _MOMENTUM)
    if not 0.0 <= m <= 1.0:
        raise ValueError(f"momentum is {m}; it must be {_MOMENTUM}")
    return m


def activation(value: Any) -> bool:
    """Whether to apply a ReLU.

    Raises
    ------
    ValueError
        For anything but None and "relu".
    """
    if value is None:
        return False
    if isinstance(value, str) and value == "relu":
        return True
    raise ValueError(f"activation is {value!r}; allowed are None and 'relu': apply others to y yourself")


def parameter_dtype(dtype: Any) -> np.dtype[Any]:
    """float32 or float64, whatever NumPy takes for them.

    Raises
    ------
    TypeError
        For anything else.
    """
    given = dtype
    with suppress(TypeError, ValueError):  # where it is none at all
        given = np.dtype(dtype)
        for known in (np.dtype(np.float32), np.dtype(np.float64)):
            if given == known:
                return known
    raise TypeError(f"dtype is {given!s}; parameters and running statistics are float32 or float64: pass np.float32 or np.float64")
