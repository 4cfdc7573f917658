"""Which of simulator and GPU the tests choose, with fake modules named cupy."""

import sys
from types import SimpleNamespace

import pytest
from where import chosen

ASKED = {"FASTBN_TEST_GPU": "1"}


def fake(count):
    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)))


def no_driver():
    raise RuntimeError("cudaErrorInsufficientDriver")


@pytest.mark.parametrize(
    ("cupy", "environ", "wanted"),
    [
        (fake(lambda: 1), ASKED, "gpu"),
        (fake(lambda: 0), ASKED, "simulator"),
        (fake(no_driver), ASKED, "simulator"),
        (None, ASKED, "simulator"),  # not installed: None in sys.modules is an ImportError
        (fake(lambda: 1), {**ASKED, "NUMBA_ENABLE_CUDASIM": "1"}, "simulator"),
        (fake(lambda: 1), {}, "none"),
    ],
)
def test_choice(monkeypatch, cupy, environ, wanted):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert chosen(environ) == wanted
