"""Where the GPU tests run: on a GPU, on Numba's simulator, or, where neither is asked for, only those that need no kernel."""

import importlib


def chosen(environ):
    """"gpu", "simulator" or "none".

    NUMBA_ENABLE_CUDASIM=1 asks for the simulator. FASTBN_TEST_GPU=1, as in `make test`, asks for the GPU where CuPy is installed and sees
    one, else for the simulator.
    """
    if environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "simulator"
    if environ.get("FASTBN_TEST_GPU") != "1":
        return "none"
    try:
        devices = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
    except Exception:  # not installed, no driver, no library, no device: CuPy raises various things
        devices = 0
    return "gpu" if devices else "simulator"
