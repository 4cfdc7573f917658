"""Python code in a process of its own, with a timeout; and a workload whose bits are compared across threads and processes."""

import hashlib
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import inputs

import fastbn

PATHS = [str(Path(fastbn.__file__).parents[1]), str(Path(__file__).parent)]
# Shape and channel axis. All but the last are large enough for several threads (test_threads.py holds that).
WORK = {
    "planes": ((48, 20, 29, 31), 1),
    "columns": ((110, 13, 17, 33), -1),
    "strips": ((330, 70, 5, 7), 1),
    "small": ((6, 5, 20), 1),
}


@lru_cache(maxsize=1)
def _warm():
    """Compile here what the processes will need, so that they find it in the cache and timeouts tell hangs from compilers."""
    digest()


def run(code, *, timeout=60, env=None, cwd=None):
    """Run `code` in a fresh interpreter; what it printed. It and its children are killed at the timeout, tracebacks shown."""
    _warm()
    changed = {k: v for k, v in (env or {}).items() if v is not None}
    environment = {k: v for k, v in os.environ.items() if k not in (env or {})}
    environment |= {"PYTHONPATH": os.pathsep.join(PATHS), **changed}
    watched = f"import faulthandler; faulthandler.dump_traceback_later({timeout - 1})\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", watched],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs: nothing within {timeout} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
    return out


def results(name):
    """Output, gradients, statistics and running statistics of one training step of the workload."""
    shape, axis = WORK[name]
    x, dy = inputs.normal(shape), inputs.normal(shape, seed=1)
    gamma, beta, mean, var = inputs.parameters(shape[axis])
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, axis=axis)
    return (y, *fastbn.batch_norm_backward(dy, ctx), ctx.mean, ctx.var, mean, var)


def digest(*names):
    """A digest of the bits of `results`."""
    found = hashlib.sha256()
    for name in names or WORK:
        for a in results(name):
            found.update(a.tobytes())
    return found.hexdigest()
