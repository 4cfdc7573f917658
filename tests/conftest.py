"""Set-up shared by all tests: helper modules become importable, hypothesis becomes deterministic."""

import sys
from pathlib import Path

import hypothesis

# pytest runs with --import-mode=importlib, which leaves sys.path alone; the helper modules of this folder (reference.py,
# inputs.py, checks.py) are plain modules, so that `import reference` works from every test module and from bench/.
TESTS = str(Path(__file__).resolve().parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

# Assertions inside the helper module print their operands, as those of test modules do.
import pytest  # noqa: E402  (must follow the path above, so that `checks` can be found)

pytest.register_assert_rewrite("checks")

# The same examples on every run and machine; no example database is written into the checkout.
hypothesis.settings.register_profile("fastbn", deadline=None, derandomize=True, max_examples=100, database=None)
hypothesis.settings.load_profile("fastbn")


@pytest.fixture
def constants(monkeypatch):
    """Set constants of the CPU's layout and schedule; what was planned with others is forgotten, before and after."""
    from fastbn.arguments import plans
    from fastbn.cpu import dispatch, layout

    def forget():
        plans._plans.clear()
        dispatch.schedule.cache_clear()
        layout.layout_of.cache_clear()

    def set_constants(**values):
        for name, value in values.items():
            for module in (dispatch, layout):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        forget()

    yield set_constants
    monkeypatch.undo()
    forget()
