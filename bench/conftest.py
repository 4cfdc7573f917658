"""What the pytest-benchmark suites share: the --quick option, the cases, and a field of checked contenders for each."""

from __future__ import annotations

import os

import contenders
import machine
import pytest
from limit import Limit
from shapes import Case, cases

THREADS = int(os.environ.get("FASTBN_BENCH_THREADS", min(2, machine.usable_cores())))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a small subset of shapes, few rounds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark a case and contender, the contenders of a case in a row."""
    if "contender_name" in metafunc.fixturenames:
        todo = cases(metafunc.module.OP, quick=metafunc.config.getoption("--quick"))
        names = [(case, name) for case in todo for name in contenders.NAMES]
        ids = [f"{case.label}-{case.layout}-{name}" for case, name in names]
        metafunc.parametrize(("case", "contender_name"), names, ids=ids)


class Fields:
    """The problem of the case at hand and its reference; the one before is dropped, since it may hold hundreds of MB."""

    def __init__(self) -> None:
        machine.keep_freed_memory()
        self.limit = Limit(THREADS)
        self._case: Case | None = None

    def contender(self, case: Case, name: str) -> contenders.Contender | None:
        """Built and checked against the float64 reference; None where it is not installed."""
        if case != self._case:
            self._case, self._problem = case, contenders.Problem(case, THREADS)
            self._reference = self._problem.reference()
        contenders.fastbn.set_num_threads(THREADS)
        found = contenders.BUILDERS[name](self._problem, self.limit)
        if found is not None:
            contenders.check(found, self._problem, self._reference)
        return found


@pytest.fixture(scope="session")
def fields():
    shared = Fields()
    yield shared
    shared.limit.close()


@pytest.fixture
def timed(benchmark, fields, request):
    """Time one contender on one case; its rate in GB/s of the floor's bytes goes into the result file."""

    def run(case: Case, name: str) -> None:
        contender = fields.contender(case, name)
        if contender is None:
            pytest.skip(f"{contenders.TITLES[name]} is not installed")
        benchmark.group = case.group
        quick = request.config.getoption("--quick")
        small = case.nbytes < 1_000_000
        benchmark.pedantic(contender.run, rounds=3 if quick else 7, iterations=50 if small else 1, warmup_rounds=1)
        if benchmark.stats is not None:  # None under --benchmark-disable
            benchmark.extra_info["GB/s"] = round(case.floor_bytes / benchmark.stats.stats.min / 1e9, 2)
            benchmark.extra_info["threads"] = THREADS

    return run
