"""How five frameworks name, count and average the state of batch normalisation: one table, one reader, one writer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # a NumPy or CuPy array; CuPy is optional and ships no types

VECTORS = ("gamma", "beta", "running_mean", "running_var")  # fastbn's names of the state, (C,) each, in saving order
FIELDS = (*VECTORS, "num_batches_tracked")


@dataclass(frozen=True)
class Convention:
    """Defaults and state-dict names of one framework.

    `momentum` is the weight of the new batch, whatever the framework itself calls momentum. `unbiased` says whether
    running_var takes the factor n/(n-1). `keys` are the framework's names in the order of `FIELDS`; a convention
    without a batch counter has four.
    """

    name: str
    eps: float
    momentum: float
    unbiased: bool
    keys: tuple[str, ...]


# fmt: off
CONVENTIONS = {c.name: c for c in (
    #          name      eps   new batch unbiased  gamma     beta    running_mean   running_var   counter
    Convention("torch",   1e-5, 0.1,  True,  ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    Convention("keras",   1e-3, 0.01, False, ("gamma",  "beta", "moving_mean",  "moving_variance")),
    Convention("flax",    1e-5, 0.01, False, ("scale",  "bias", "mean",         "var")),
    Convention("chainer", 2e-5, 0.1,  True,  ("gamma",  "beta", "avg_mean",     "avg_var",     "N")),
    Convention("onnx",    1e-5, 0.1,  False, ("scale",  "B",    "input_mean",   "input_var")),
)}
# fmt: on


def get_convention(name: str) -> Convention:
    """The row of `CONVENTIONS` called `name`.

    Raises
    ------
    TypeError, ValueError
        For what is no name; for any other name. The message lists the known ones.

    Examples
    --------
    >>> from fastbn.conventions import get_convention
    >>> get_convention("keras").eps
    0.001
    """
    if not isinstance(name, str):
        raise TypeError(f"convention is {name!r} of type {type(name).__name__}; pass a name: {', '.join(map(repr, CONVENTIONS))}")
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}; known are {', '.join(map(repr, CONVENTIONS))}")
    return CONVENTIONS[name]


def write_state(convention: str, state: Mapping[str, Array | int]) -> dict[str, Array]:
    """Copy fastbn's state into a dict with the names of `convention`.

    Parameters
    ----------
    convention : str
        A name in `CONVENTIONS`.
    state : mapping
        Some or all of `FIELDS`. The counter is an int and becomes a 0-d int64 array; conventions without a counter
        leave it out.

    Returns
    -------
    dict
        Copies; nothing in it shares memory with `state`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.conventions import write_state
    >>> list(write_state("flax", {"gamma": np.ones(2), "running_var": np.ones(2)}))
    ['scale', 'var']
    """
    named = zip(FIELDS, get_convention(convention).keys, strict=False)  # a convention may stop before the counter
    saved = ((key, state[field]) for field, key in named if field in state)
    return {key: np.array(value, np.int64) if isinstance(value, int) else value.copy() for key, value in saved}


def recognise(state_dict: Mapping[str, Any]) -> tuple[Convention, dict[str, Any]]:
    """Find out which framework wrote `state_dict`, and give its entries fastbn's names.

    Understood besides the bare names: one prefix before every key (``"bn1.weight"``, ``"conv/bn/scale"``), TensorFlow's
    suffix (``"batch_normalization/gamma:0"``), and Flax's nesting in ``"params"`` and ``"batch_stats"``.

    Returns
    -------
    convention : Convention
        The first row of the table that has every key. Some subsets, such as ``{"gamma", "beta"}``, occur in two; both
        rows then read them alike.
    state : dict
        The values, untouched, by the names in `FIELDS`.

    Raises
    ------
    TypeError
        If `state_dict` is not a mapping with string keys.
    ValueError
        If the keys belong to several layers or to no convention; the message lists what is known.

    Examples
    --------
    >>> from fastbn.conventions import recognise
    >>> convention, state = recognise({"bn1.weight": [1.0], "bn1.running_var": [2.0]})
    >>> convention.name, sorted(state)
    ('torch', ['gamma', 'running_var'])
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict must be a mapping from names to arrays; got {type(state_dict).__name__}")
    values: dict[str, Any] = {}
    prefixes = set()
    for key, value in _flatten(state_dict):
        prefix, leaf = re.fullmatch(r"((?:.*[./])?)(.*)", key, re.DOTALL).groups()  # type: ignore[union-attr]
        prefixes.add(prefix)
        values[leaf] = value
    if len(prefixes) > 1:
        shown = ", ".join(map(repr, sorted(prefixes)[:8]))
        raise ValueError(f"the keys belong to {len(prefixes)} layers ({shown}); pass the entries of one layer")
    for convention in CONVENTIONS.values():
        if values.keys() <= set(convention.keys):
            return convention, {f: values[k] for f, k in zip(FIELDS, convention.keys, strict=False) if k in values}
    known = "; ".join(f"{c.name}: {' '.join(c.keys)}" for c in CONVENTIONS.values())
    raise ValueError(f"the keys {sorted(values)} belong to no known convention. Known are {known}")


def read_state(
    state_dict: Mapping[str, Any], fields: Collection[str], num_features: int, dtype: Any = np.float64
) -> tuple[Convention, dict[str, Any]]:
    """Recognise `state_dict`, check all of it against a layer's state, and convert it.

    Parameters
    ----------
    state_dict : mapping
        See `recognise`. Arrays, sequences or PyTorch tensors.
    fields : collection of str
        What the layer holds, out of `FIELDS`. Only the counter may be missing in `state_dict`.
    num_features : int
        C, the length of every array.
    dtype : dtype
        Of the arrays returned.

    Returns
    -------
    convention : Convention
    state : dict
        NumPy arrays (C,) by the names in `VECTORS`; the counter, if there is one, an int.

    Raises
    ------
    ValueError
        For unknown, missing or surplus keys, wrong shapes, finite values that `dtype` cannot hold, a negative variance, or a counter that
        is not a whole number >= 0.
    TypeError
        For keys that are not strings or values that are not real numbers.
    """
    convention, given = recognise(state_dict)
    key_of = dict(zip(FIELDS, convention.keys, strict=False))
    missing = [key_of.get(f, f) for f in fields if f in VECTORS and f not in given]
    surplus = [key_of[f] for f in given if f not in fields]
    if missing or surplus:
        raise ValueError(
            f"the {convention.name} state dict does not fit the layer, which holds {', '.join(fields) or 'nothing'}: "
            f"missing {missing}, surplus {surplus}. scale, center and track_running_stats decide what a layer holds"
        )
    state: dict[str, Any] = {}
    for field, value in given.items():
        key = key_of[field]
        array = _to_numpy(key, value)
        if field == "num_batches_tracked":
            state[field] = _counter(key, value, array)
            continue
        if array.shape != (num_features,):
            raise ValueError(f"{key} has shape {array.shape}, but the layer needs ({num_features},)")
        if field == "running_var" and (array < 0).any():
            raise ValueError(f"{key} has negative values (smallest: {array.min()}); a variance is >= 0: is it the right checkpoint?")
        state[field] = _cast(key, array, np.dtype(dtype))
    return convention, state


def _cast(key: str, array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Numbers in another dtype; ValueError where that cannot hold them."""
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(cast)
    if lost.any():
        advice = ": use a layer of dtype=np.float64" if dtype == np.float32 else ""
        raise ValueError(f"{key} has values as large as {abs(array[lost]).max()!s}, which {dtype} cannot hold{advice}")
    return cast


def _counter(key: str, value: Any, array: np.ndarray[Any, np.dtype[np.float64]]) -> int:
    """The batch counter, from the value itself: `array` is the same in float64, which holds whole numbers up to 2**53."""
    if array.size != 1 or array.item() < 0 or not array.item().is_integer():
        raise ValueError(f"{key} is {array.tolist()}; it must be a whole number >= 0")
    counter = int(value.item() if hasattr(value, "item") else np.asarray(value).item())
    if counter > np.iinfo(np.int64).max:
        raise ValueError(f"{key} is {counter}; a batch counter is an int64, {np.iinfo(np.int64).max} at most")
    return counter


def _to_numpy(name: str, value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`value` as a float64 NumPy array: arrays, sequences, PyTorch tensors on any device, CuPy and JAX arrays."""
    if hasattr(value, "detach"):  # a PyTorch tensor; float64 because NumPy has no bfloat16 of its own
        value = value.detach().cpu().double()
    elif hasattr(value, "__cuda_array_interface__") and hasattr(value, "get"):  # CuPy refuses silent transfers
        value = value.get()
    array = np.asarray(value)
    # kind V with a cast to float64 is bfloat16 as ml_dtypes registers it
    if array.dtype.kind not in "fiuV" or not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise TypeError(f"{name} has dtype {array.dtype}; it must be an array of real numbers")
    return _cast(name, array, np.dtype(np.float64))


def _flatten(state_dict: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of a nested mapping, without what frameworks wrap around a variable's own path."""
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"the keys of a state dict must be strings; got {key!r}")
        path = prefix + key
        if isinstance(value, Mapping):
            yield from _flatten(value, path + "/")
        else:
            yield re.sub(r"^(params|batch_stats)/", "", path).removesuffix(":0"), value


def overwrite(layer: object, values: Mapping[str, Any]) -> None:
    """Write into the layer's arrays of these names, and set its numbers: all of it, or on any exception nothing.

    Raises
    ------
    ValueError
        For an array of the layer that is read-only.
    """
    old = {field: getattr(layer, field) for field in values}
    arrays = {field: a for field, a in old.items() if getattr(a, "ndim", 0)}
    for field, a in arrays.items():
        if not getattr(a.flags, "writeable", True):  # CuPy knows no read-only arrays
            raise ValueError(f"the layer's {field} is read-only, but is written in place; set bn.{field} = bn.{field}.copy()")
    before = old | {field: a.copy() for field, a in arrays.items()}

    def write(new: Mapping[str, Any]) -> None:
        for field, value in new.items():
            if field in arrays:
                arrays[field][...] = value
            else:
                setattr(layer, field, value)

    try:
        write(values)
    except BaseException:  # Ctrl-C among them
        write(before)
        raise
