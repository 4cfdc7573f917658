"""What the GPU tests need, said once where it is missing; and what importing costs a machine without a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest


def test_the_simulator_is_on():
    if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        pytest.skip("GPU kernels are tested on Numba's simulator: NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/cuda")
    from fastbn.kernels.cuda import target

    assert target.SIMULATED


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment}, check=False)


def test_importing_the_backend_imports_neither_numba_nor_cupy():
    result = run("import sys, fastbn.cuda.backend; print([m for m in ('numba', 'cupy') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_without_cupy_or_numba_cuda_the_error_names_the_extra():
    # Whatever is missing here: the bundled target is refused, numba-cuda alone lacks CuPy.
    code = """
import importlib.util, fastbn.cuda.loading as loading
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "cupy" else find(name, *rest)
try:
    loading.kernels()
except ImportError as error:
    print(error)
"""
    result = run(code)
    assert "fastbn[cuda13]" in result.stdout, result.stdout + result.stderr


# What numba-cuda and CuPy are missing here, the public functions say too: of arrays of CuPy an ImportError, of others what to pass.
FAKE = """
import numpy as np, fastbn
class Array(np.ndarray):
    __module__ = {module!r}
    __cuda_array_interface__ = {{"shape": (4, 2), "typestr": "<f4", "data": (0, False), "version": 3}}
x = np.zeros((4, 2), np.float32).view(Array)
for function in (fastbn.batch_norm_forward, fastbn.moments):
    try:
        function(x)
    except (ImportError, TypeError) as error:
        print(type(error).__name__, error)
"""


def test_the_public_functions_name_the_extra_too():
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed: an array that only claims to be CuPy's cannot show what happens without it")
    result = run(FAKE.format(module="cupy"))
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    assert all(line.startswith("ImportError") and "fastbn[cuda12]" in line and "fastbn[cuda13]" in line for line in lines)
    lines = run(FAKE.format(module="other")).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("TypeError x is a other.Array on a GPU") and "cupy.asarray(x)" in line for line in lines)
