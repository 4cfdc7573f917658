"""What is written may share memory with nothing else, but `out` with one input: the check that depends on addresses.

Each backend tells quickly, in most calls, that no memory is shared (`separate`); what follows here says what is, or that nothing is.
"""

from __future__ import annotations

from typing import Any

from fastbn.common.plan import Plan

Array = Any
Named = tuple[tuple[str, Array], ...]


def check_out(backend: Any, out: Array, may_be: str, others: Named) -> None:
    """`out` overlaps none of the others; it may be the array called `may_be`, element for element.

    Raises
    ------
    ValueError
    """
    for name, a in others:
        if a is None or not backend.overlap(out, a) or (name == may_be and backend.same_place(out, a)):
            continue
        allowed = "out may be that array itself, element for element" if name == may_be else "they must not share memory"
        raise ValueError(f"out overlaps {name}; {allowed}: pass {backend.LIBRARY}.empty_like(x)")


def check_running(backend: Any, mean: Array, var: Array, others: Named) -> None:
    """The running statistics, which are updated in place, overlap neither each other nor what is only read.

    Raises
    ------
    ValueError
    """
    if backend.overlap(mean, var):
        raise ValueError("running_mean and running_var share memory, but each is updated in place; pass two arrays")
    for name, a in others:
        for ours, statistic in (("running_mean", mean), ("running_var", var)):
            if a is not None and backend.overlap(statistic, a):
                raise ValueError(f"{ours} shares memory with {name}, but training updates it in place; pass {ours}.copy()")


def check_forward(
    plan: Plan, x: Array, gamma: Array, beta: Array, mean: Array, var: Array, residual: Array, weight: Array, out: Array
) -> None:
    """The arrays of a forward."""
    backend = plan.backend
    read = (("x", x), ("residual", residual), ("gamma", gamma), ("beta", beta))
    if out is not None:
        check_out(backend, out, "", (*read, ("running_mean", mean), ("running_var", var), ("sample_weight", weight)))
    if plan.moves:
        check_running(backend, mean, var, (*read, ("sample_weight", weight)))
