"""Memory that kernels cannot read as it is, and memory of others, on the simulator with a stand-in for CuPy.

An element off its boundary ends a real GPU's context, and bytes in the other order are read as other numbers; NumPy forgives both. So these
tests look at what reaches the kernels, and not at results alone.
"""

import inputs
import numpy as np
import pytest
import reference
from cupy_standin import on_device as gpu

import fastbn
from fastbn.kernels.cuda import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPE = (3, 4, 5, 6)


def off(a, gaps=1):
    """a's values one byte off a 16-byte boundary; of the last axis only every `gaps`-th place is used."""
    a = np.asarray(a)
    raw = np.zeros(gaps * a.nbytes + 32, np.uint8)
    view = np.ndarray((*a.shape[:-1], gaps * a.shape[-1]), a.dtype, raw, -raw.ctypes.data % 16 + 1)[..., ::gaps]
    view[...] = a
    return view


def swapped(a):
    """a's values in the other byte order."""
    a = np.asarray(a)
    return a.astype(a.dtype.newbyteorder(">"))


CHANGES = {"off": off, "off with gaps": lambda a: off(a, 2), "swapped": swapped}


@pytest.fixture
def seen(cupy, monkeypatch):
    """The arrays that kernels are launched with."""
    arrays, real = [], launch.launch

    def watching(variant, blocks, threads, device, stream, arguments):
        arrays.extend(a for a in arguments if isinstance(a, np.ndarray))
        real(variant, blocks, threads, device, stream, arguments)

    monkeypatch.setattr(launch, "launch", watching)
    return arrays


def fit(arrays):
    assert arrays
    return all(a.ctypes.data % a.itemsize == 0 and a.dtype.isnative and a.flags.c_contiguous for a in arrays)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_everything_off_its_boundary_or_in_the_other_byte_order(seen, change):
    rng = np.random.default_rng(0)
    x, dy, residual = (inputs.normal(SHAPE, seed=k) for k in (1, 2, 3))
    gamma, beta = rng.normal(1, 0.5, (2, 4)).astype(np.float32)
    weight = rng.uniform(0.5, 2, (3, 5, 6)).astype(np.float32)
    running = gpu(change(np.zeros(4, np.float32))), gpu(change(np.ones(4, np.float32)))
    out, dx_out = (gpu(change(np.zeros(SHAPE, np.float32))) for _ in range(2))
    given = {"residual": gpu(change(residual)), "sample_weight": gpu(change(weight)), "momentum": 1.0}
    y, ctx = fastbn.batch_norm_forward(gpu(change(x)), gpu(change(gamma)), gpu(change(beta)), *running, out=out, **given)
    exact = reference.forward(x, gamma, beta, residual=residual, sample_weight=weight)
    assert y is out
    np.testing.assert_allclose(np.asarray(y).astype(float), exact.y.astype(float), atol=1e-6 * np.abs(exact.y).max())
    np.testing.assert_allclose(np.asarray(running[0]).astype(float), exact.mean.astype(float), atol=3e-6)
    dx, _, dbeta, _ = fastbn.batch_norm_backward(gpu(change(dy)), ctx, out=dx_out)
    wanted = reference.backward(dy, x, gamma, sample_weight=weight)
    np.testing.assert_allclose(np.asarray(dx).astype(float), wanted.dx.astype(float), atol=float(1e-6 * wanted.dx_scale.max()))
    np.testing.assert_allclose(np.asarray(dbeta).astype(float), wanted.dbeta.astype(float), atol=float(1e-6 * wanted.dbeta_scale.max()))
    z = fastbn.batch_norm_inference(gpu(change(x)), gpu(change(gamma)), None, gpu(change(np.zeros(4))), gpu(change(np.ones(4))))
    assert z.dtype == change(x).dtype
    np.testing.assert_allclose(np.asarray(z).astype(float), x * gamma[:, None, None] / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert fit(seen)


def test_running_statistics_may_not_be_what_is_read(cupy):
    x, four = gpu(inputs.normal(SHAPE)), gpu(np.ones(4, np.float32))
    for given in ({"gamma": four}, {"beta": four}, {"gamma": gpu(np.ones(4, np.float32)), "beta": four[::-1]}):
        name = next(name for name, a in given.items() if np.shares_memory(a, four))
        with pytest.raises(ValueError, match=rf"running_mean shares memory with {name}, but training updates it in place"):
            fastbn.batch_norm_forward(x, running_mean=four, running_var=gpu(np.ones(4, np.float32)), **given)
    assert (four == 1).all()
    fastbn.batch_norm_forward(x, four, None, four, gpu(np.ones(4, np.float32)), training=False)  # nothing is updated


@pytest.mark.parametrize("types", [(np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float32)], ids=str)
def test_statistics_that_the_running_ones_cannot_hold_leave_them(cupy, types):
    x = np.random.default_rng(0).normal(0, 1, (50, 3))
    x[:, 1] *= 1e25  # its variance is beyond float32
    mean, var = gpu(np.full(3, 0.5, types[0])), gpu(np.full(3, 2.0, types[1]))
    # A small momentum would bring even the variance of 1e50 into float32's range, were it taken.
    fastbn.batch_norm_forward(gpu(x), running_mean=mean, running_var=var, momentum=1e-20)
    assert var.tolist() == [2, 2, 2]
    fastbn.batch_norm_forward(gpu(x), running_mean=mean, running_var=var, momentum=0.5)
    assert (mean[1], var[1]) == (0.5, 2)
    np.testing.assert_allclose(np.asarray(var)[[0, 2]], 1 + 0.5 * x[:, [0, 2]].var(axis=0, ddof=1), rtol=1e-6)


def test_calls_that_are_alike_are_checked_anew_where_they_differ(cupy):
    """Plans are kept by shapes, strides, dtypes, alignment: whatever else decides must not be taken from an earlier call."""
    x, out = gpu(inputs.normal(SHAPE)), gpu(np.zeros(SHAPE, np.float32))
    gamma = gpu(np.ones(4, np.float32))
    fastbn.batch_norm_forward(x, gamma, out=out)
    with pytest.raises(ValueError, match="out overlaps x"):
        fastbn.batch_norm_forward(x, gamma, out=x)
    with pytest.raises(TypeError, match="axis is True"):
        fastbn.batch_norm_forward(x, gamma, out=out, axis=True)
    with pytest.raises(TypeError, match=r"axis is \[1\]"):
        fastbn.batch_norm_forward(x, gamma, out=out, axis=[1])
    with pytest.raises(ValueError, match="eps is -1"):
        fastbn.batch_norm_forward(x, gamma, out=out, eps=-1.0)
    with pytest.raises(TypeError, match="gamma is on device 1"):
        fastbn.batch_norm_forward(x, gpu(np.ones(4, np.float32), 1), out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        fastbn.batch_norm_forward(x, gamma, out=out)
    one, two = gpu(np.zeros((4, 4), np.float32)), gpu(np.ones((4, 4), np.float32))
    assert fastbn.batch_norm_forward(one)[1].mean.tolist() == [0] * 4
    assert fastbn.batch_norm_forward(two)[1].mean.tolist() == [1] * 4


def test_no_cache_keeps_an_array_alive(cupy):
    import gc
    import weakref

    x = gpu(inputs.normal(SHAPE))
    y, ctx = fastbn.batch_norm_forward(x, gpu(np.ones(4, np.float32)), activation="relu")
    fastbn.batch_norm_backward(y, ctx)
    kept = [weakref.ref(a) for a in (x, y, ctx.table)]
    del x, y, ctx
    gc.collect()
    assert [r() for r in kept] == [None] * 3
