"""Interleaved timing and the arithmetic of its results."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

TURN = 0.002  # seconds one turn lasts at least: shorter calls are repeated within it
SLOW = 0.030  # a call longer than this gets no call to warm up, and takes part in every third round only
# OpenMP's workers spin on after a call, PyTorch's for 7.5 ms here (/proc/self/task/*/schedstat), and would disturb the next contender.
PAUSE = 0.010


def interleave(runs: dict[str, Callable[[], object]], rounds: int, seed: int = 0) -> dict[str, list[float | None]]:
    """Time every contender once a round, in an order that changes from round to round.

    On a shared machine absolute times drift by tens of per cent within minutes. What one round holds was measured within a
    fraction of a second, so ratios within a round, and of minima over the rounds, can be trusted further. Each turn
    begins with a pause and an untimed turn, so that nobody pays for the caches its predecessor left, nor for threads that sleep.

    Parameters
    ----------
    runs : dict of str to callable
        The contenders; each has run at least once before (nothing compiles here).
    rounds : int
        How many rounds.
    seed : int
        Of the order.

    Returns
    -------
    dict of str to list
        Seconds a call, one entry a round; None where a slow contender sat the round out.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed")
    shuffle = random.Random(seed).shuffle
    once = {name: _roughly(run) for name, run in runs.items()}
    times: dict[str, list[float | None]] = {name: [] for name in runs}
    order = list(runs)
    with no_collection():
        for r in range(rounds):
            shuffle(order)
            for name in order:
                slow = once[name] > SLOW
                if slow and r % 3:
                    times[name].append(None)
                    continue
                time.sleep(PAUSE)
                number = max(1, math.ceil(TURN / max(once[name], 1e-7)))
                if not slow:
                    _time(runs[name], number)
                times[name].append(_time(runs[name], number))
    return times


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's cycle collector at rest, so that it is nobody's time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _roughly(run: Callable[[], object]) -> float:
    """About what one call takes: the best of up to 20 within some 20 ms, since a single one may have been disturbed."""
    best, end = math.inf, time.perf_counter() + 0.02
    for _ in range(20):
        best = min(best, _time(run, 1))
        if time.perf_counter() > end:
            break
    return best


def _time(run: Callable[[], object], number: int) -> float:
    """Seconds a call over `number` calls in a row."""
    begin = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - begin) / number


def summarise(times: dict[str, list[float | None]], ours: str = "fastbn") -> dict[str, dict[str, float]]:
    """Minimum and median seconds of each contender, and how `ours` compares with it.

    Returns
    -------
    dict of str to dict
        `min`, `median`; `ratio` = our minimum / its minimum (below 1: ours is faster); `paired` = the median of the
        same ratio taken round by round.
    """
    summary = {}
    for name, row in times.items():
        seen = [t for t in row if t is not None]
        summary[name] = {"min": min(seen), "median": statistics.median(seen)}
        if ours in times:
            pairs = [a / b for a, b in zip(times[ours], row, strict=True) if a is not None and b is not None]
            mine = min(t for t in times[ours] if t is not None)
            summary[name] |= {"ratio": mine / min(seen), "paired": statistics.median(pairs)}
    return summary


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that ratios need: a factor of 2 and one of 1/2 give 1.

    Examples
    --------
    >>> round(geometric_mean([2.0, 0.5]), 12)
    1.0
    """
    logs = [math.log(v) for v in values]
    if not logs:
        raise ValueError("no values to take the mean of")
    return math.exp(sum(logs) / len(logs))


def readable_time(seconds: float) -> str:
    """Three digits and a unit.

    Examples
    --------
    >>> readable_time(0.00123), readable_time(7.1e-6), readable_time(0.25), readable_time(3.4)
    ('1.23 ms', '7.10 us', '250 ms', '3.40 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size or unit == "us":
            value = seconds / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    raise AssertionError("the loop returns for every number")
