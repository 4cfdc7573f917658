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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", subprocesses.WORK)
def test_addresses(name, dtype, threads):
    """Loops that start at another offset in a vector give the same bits; 9 MB are streamed around the cache, 1 MB is not."""
    threads(2)
    shape, axis = subprocesses.WORK[name]
    large = (8 * shape[0], *shape[1:]) if name != "small" else shape
    x, dy = (inputs.normal(large, seed=seed).astype(dtype) for seed in (0, 1))
    p = inputs.parameters(shape[axis])
    found = []
    for offset in (0, 4, 20, 60):
        y, ctx = fastbn.batch_norm_forward(at_offset(x, offset), *p[:2], axis=axis, out=at_offset(np.empty_like(x), 64 - offset))
        found.append((y, *fastbn.batch_norm_backward(at_offset(dy, offset), ctx, out=at_offset(np.empty_like(x), offset))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert checks.same_bits(a, b)


@pytest.mark.parametrize("features", [{}, {"activation": "relu"}, {"weights": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    ("shape", "strips", "sweeps"),
    [
        ((67, 24), {}, {"PARALLEL_FROM": 1}),  # four rows folded to one, three are left
        ((40, 300), {}, {"PARALLEL_FROM": 1, "STRIP": 0}),
        ((1300, 528), {"STRIP": 1300 * 16 * 64, "PARALLEL_FROM": 1}, {"STRIP": 0}),  # strips of 64 and 128 channels, blocks
    ],
    ids=str,
)
def test_strips_and_sweeps(shape, strips, sweeps, dtype, features, constants):
    """Channels last strip by strip, or all of it twice: the same bits."""
    x, dy = (inputs.normal(shape, seed=seed).astype(dtype) for seed in (0, 1))
    p = inputs.parameters(shape[1])
    options = {"activation": features.get("activation")}
    if "weights" in features:
        options["sample_weight"] = np.random.default_rng(2).uniform(0, 2, shape[0])
    found = []
    for road, values in (("strips", strips), ("sweeps", strips | sweeps)):
        constants(**values)
        assert fastbn.explain(x, sample_weight="weights" in features).road == road
        y, ctx = fastbn.batch_norm_forward(x, *p[:2], **options)
        found.append((y, ctx.mean, ctx.var, *fastbn.batch_norm_backward(dy, ctx)))
    for a, b in zip(*found, strict=True):
        assert checks.same_bits(a, b)
