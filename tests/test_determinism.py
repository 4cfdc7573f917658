"""The bits of a set of results do not depend on the number of threads, the run, the process or where the arrays lie."""

import checks
import inputs
import numpy as np
import pytest
import subprocesses

import fastbn


@pytest.fixture
def threads():
    before = fastbn.get_num_threads()
    yield fastbn.set_num_threads
    fastbn.set_num_threads(before)


def test_threads_and_runs(threads):
    """1, 2, 3 and 7 threads, twice each: shares end inside groups, strips and blocks."""
    found = set()
    for n in (1, 2, 3, 7, 1, 2, 3, 7):
        threads(n)
        found.add(subprocesses.digest())
    assert len(found) == 1


def test_processes(threads):
    """Another process, with another number of threads, another hash seed, and other addresses."""
    threads(1)
    code = "import fastbn, subprocesses; fastbn.set_num_threads({}); print(subprocesses.digest())"
    out = {subprocesses.run(code.format(n), env={"PYTHONHASHSEED": str(n)}).strip() for n in (1, 3)}
    assert out == {subprocesses.digest()}


def at_offset(a, offset):
    """A copy of `a` that begins `offset` bytes after a cache line."""
    raw = np.empty(a.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    copy = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


@pytest.mark.parametrize("name", subprocesses.WORK)
def test_addresses(name, threads):
    """Loops that start at another offset in a vector give the same bits; 9 MB are streamed around the cache, 1 MB is not."""
    threads(2)
    shape, axis = subprocesses.WORK[name]
    large = (8 * shape[0], *shape[1:]) if name != "small" else shape
    x, dy, p = inputs.normal(large), inputs.normal(large, seed=1), inputs.parameters(shape[axis])
    found = []
    for offset in (0, 4, 20, 60):
        y, ctx = fastbn.batch_norm_forward(at_offset(x, offset), *p[:2], axis=axis, out=at_offset(np.empty_like(x), 64 - offset))
        found.append((y, *fastbn.batch_norm_backward(at_offset(dy, offset), ctx, out=at_offset(np.empty_like(x), offset))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert checks.same_bits(a, b)
