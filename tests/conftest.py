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
