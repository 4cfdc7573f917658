"""A bounded slice of the fuzzer: fixed cases, and cases that hypothesis makes, and shrinks where one fails."""

import random
import time

import fuzz
import fuzz_oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SECONDS = 6.0  # of fixed cases; kernels that are compiled for the first time make it longer


def test_fixed_cases():
    start = time.perf_counter()
    outcomes = set()
    for number in range(1500):
        case = fuzz.make_case(random.Random(f"suite-{number}"))
        try:
            outcomes.add(fuzz_oracle.run(case))
        except Exception as error:
            raise AssertionError(f"case suite-{number}: {case.describe()}") from error
        if number >= 300 and time.perf_counter() - start > SECONDS:
            break
    assert {"works", "ValueError", "TypeError"} <= outcomes, "a generator that makes good or bad calls only tests nothing"


@settings(max_examples=150)
@given(st.randoms(use_true_random=False))
def test_cases_that_shrink(r):
    case = fuzz.make_case(r)
    try:
        fuzz_oracle.run(case)
    except AssertionError as error:
        raise AssertionError(case.describe()) from error


@pytest.mark.parametrize("wrong", ["y", "an input", "beside out", "silence"])
def test_the_judge_sees(wrong, monkeypatch):
    """A wrong value, a write to an input, a write beside the output, and a bad call that returns."""
    import fastbn

    original = fastbn.batch_norm_inference
    case = fuzz.valid_case(random.Random(1))
    while case.function != "inference" or not case.arguments["x"].size or "out" not in case.arguments:
        case = fuzz.valid_case(random.Random(random.Random(str(case.arguments["x"].shape)).random()))
    if wrong == "silence":
        case.change("eps", "-1", "raises")

    def faulty(x, *args, out=None, **kwargs):
        y = original(x, *args, out=out, **kwargs)
        if wrong == "y":
            y.flat[0] += y.dtype.type(0.5)
        if wrong == "an input":
            x.flat[0] += x.dtype.type(1)
        if wrong == "beside out":
            whole = out
            while whole.base is not None and hasattr(whole.base, "dtype"):
                whole = whole.base
            whole[-1] = 0
        return y

    monkeypatch.setattr(fastbn, "batch_norm_inference", faulty)
    with pytest.raises(AssertionError):
        fuzz_oracle.run(case)
