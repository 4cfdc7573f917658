"""What the GPU tests need, said once where it is missing; and what importing costs a machine without a GPU."""

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
    result = run("import sys, fastbn.cuda_backend; print([m for m in ('numba', 'cupy') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_without_cupy_or_numba_cuda_the_error_names_the_extra():
    # Whatever is missing here: the bundled target is refused, numba-cuda alone lacks CuPy.
    code = """
import importlib.util, fastbn.cuda_backend as backend
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "cupy" else find(name, *rest)
try:
    backend.kernels()
except ImportError as error:
    print(error)
"""
    result = run(code)
    assert "fastbn[cuda13]" in result.stdout, result.stdout + result.stderr
