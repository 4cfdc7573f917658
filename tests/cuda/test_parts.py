"""The building blocks of a distributed loop on GPU arrays: parts of a batch, taken in steps, give what the whole batch gives.

On the simulator with a stand-in for CuPy, against the reference and the bounds of tests/test_blocks.py.
"""

from itertools import pairwise

import inputs
import numpy as np
import pytest
import reference
from cupy_standin import ndarray
from cupy_standin import on_device as gpu

import fastbn
from fastbn.kernels.cuda import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Long planes and short ones, single values and vectors; rows of channels.
SHAPES = {"nc": (21, 8), "planes 8x9": (5, 2, 8, 9), "planes 7x7": (4, 3, 7, 7)}
EVERYWHERE = pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES.values() for a in (1, -1) if len(s) > 2 or a == 1], ids=str)
# y within bound * max(1, |y|), dx within bound * max |gamma * invstd * dy|, sums within bound * the sizes of their terms: the contract's.
BOUNDS = {"float32": 1e-6, "float64": 1e-13}
# Half types round y and dx themselves: half a unit in the last place, dx's of up to 4 times dy.
HALF = {"float16": 2.0**-11}


def plain(a):
    assert isinstance(a, ndarray)
    return a.view(np.ndarray)


def split(a, n):
    """Three unequal parts of n samples, the second one empty."""
    return [None] * 3 if a is None else [gpu(a[i:j].copy()) for i, j in pairwise((0, n // 4, n // 4, n))]


def problem(shape, axis, dtype, seed=0):
    return np.ascontiguousarray(np.moveaxis(inputs.normal(shape, np.float64, seed=seed), 1, axis)).astype(dtype)


def within(got, exact, bound):
    difference = np.abs(reference.widen(plain(got)) - exact)
    assert (difference <= bound).all(), difference.max()


def check(x, dy, axis=1, *, residual=None, weight=None, activation=None, effective_count=None):
    """Three parts that exchange nothing but Moments and two sums, against the exact result of the whole batch."""
    name, C, n = x.dtype.name, x.shape[axis], len(x)
    bound, rounding = BOUNDS.get(name, 1e-6), HALF.get(name, 0.0)
    wide = np.float64 if name == "float64" else np.float32
    gamma, beta = (np.random.default_rng(3).normal(m, 0.5, C).astype(wide) for m in (1, 0))
    running = [(gpu(np.full(C, 0.5, wide)), gpu(np.full(C, 2.0))) for _ in range(3)]
    xs, dys, ws, rs = (split(a, n) for a in (x, dy, weight, residual))
    total = sum(fastbn.moments(p, axis=axis, sample_weight=w) for p, w in zip(xs, ws, strict=True))
    options = {"axis": axis, "activation": activation, "momentum": 0.25, "effective_count": effective_count}
    done = [
        fastbn.batch_norm_forward_apply(p, total, gpu(gamma), gpu(beta), *own, residual=r, sample_weight=w, **options)
        for p, own, r, w in zip(xs, running, rs, ws, strict=True)
    ]
    y, contexts = np.concatenate([plain(y) for y, _ in done]), [ctx for _, ctx in done]
    exact = reference.forward(x, gamma, beta, axis=axis, sample_weight=weight, residual=residual, activation=activation)
    size = 1 if residual is None else np.abs(exact.y).max()
    within(gpu(y), exact.y, (bound + rounding) * np.maximum(size, np.abs(exact.y)))
    assert y.dtype == x.dtype
    assert all(ctx.count == total.count for ctx in contexts)
    # Running statistics: every part's copy is the same; float32 data have float32's accuracy on a GPU.
    factor = 1.0 if total.count < 2 else (effective_count or total.count) / ((effective_count or total.count) - 1)
    for mean, var in running:
        np.testing.assert_array_equal(plain(mean), plain(running[0][0]))
        np.testing.assert_array_equal(plain(var), plain(running[0][1]))
    near = max(bound, 1e-6 if wide == np.float32 else bound)
    np.testing.assert_allclose(plain(running[0][0]), (0.375 + 0.25 * exact.mean).astype(float), rtol=near, atol=near)
    np.testing.assert_allclose(plain(running[0][1]), (1.5 + 0.25 * factor * exact.var).astype(float), rtol=near)

    sums = [fastbn.batch_norm_backward_reduce(d, ctx) for d, ctx in zip(dys, contexts, strict=True)]
    sum_dy, sum_dy_xmu = sum(s[0] for s in sums), sum(s[1] for s in sums)
    assert sum_dy.dtype == sum_dy_xmu.dtype == np.float64
    found = [fastbn.batch_norm_backward_apply(d, ctx, sum_dy, sum_dy_xmu) for d, ctx in zip(dys, contexts, strict=True)]
    # A value whose y rounds to 0 may be on either side of the ReLU: the gradient must fit the y that was returned.
    mask = None if activation is None else y > 0
    wanted = reference.backward(dy, x, gamma, axis=axis, sample_weight=weight, mask=mask)
    if residual is not None:
        found, dresidual = zip(*found, strict=True)
        np.testing.assert_array_equal(np.concatenate([plain(a) for a in dresidual]), wanted.dresidual.astype(x.dtype))
    dx = np.concatenate([plain(a) for a in found])
    within(gpu(dx), wanted.dx, (bound + 4 * rounding) * reference.per_channel(wanted.dx_scale, x.ndim, axis))
    within(sum_dy, wanted.dbeta, bound * wanted.dbeta_scale)
    within(sum_dy_xmu * contexts[0].invstd, wanted.dgamma, bound * wanted.dgamma_scale)


@pytest.mark.parametrize("dtype", [*BOUNDS, *HALF])
@EVERYWHERE
def test_three_parts_are_the_whole(cupy, shape, axis, dtype):
    check(problem(shape, axis, dtype), problem(shape, axis, dtype, 1), axis)


@EVERYWHERE
def test_relu_and_residual(cupy, shape, axis):
    x, dy, residual = (problem(shape, axis, np.float32, seed) for seed in range(3))
    check(x, dy, axis, activation="relu")
    check(x, dy, axis, residual=residual)
    check(x, dy, axis, residual=residual, activation="relu")


@pytest.mark.parametrize("kind", ["mask", "samples", "real"])
@EVERYWHERE
def test_weights(cupy, shape, axis, kind):
    x, dy, rng = problem(shape, axis, np.float32), problem(shape, axis, np.float32, 1), np.random.default_rng(2)
    positions = tuple(n for a, n in enumerate(x.shape) if a != axis % x.ndim)
    if kind == "mask":
        weight = rng.random(positions) < 0.7
        check(x, dy, axis, weight=weight)
        check(x, dy, axis, weight=weight.astype(np.float32))
        return
    weight = rng.uniform(0.5, 2, positions[:1] if kind == "samples" else positions).astype(np.float32)
    each = np.prod(positions) / weight.size
    effective = each * weight.sum(dtype=float) ** 2 / np.square(weight, dtype=float).sum()
    check(x, dy, axis, weight=weight, effective_count=float(effective))


def test_bfloat16(cupy):
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, dy = (problem((6, 4, 7, 7), 1, np.float32, seed).astype(dtype) for seed in range(2))
    y, ctx = fastbn.batch_norm_forward_apply(gpu(x), fastbn.moments(gpu(x)))
    exact, wanted = reference.forward(x), reference.backward(dy, x)
    within(y, exact.y, (1e-6 + 2.0**-8) * np.maximum(1, np.abs(exact.y)))
    dx = fastbn.batch_norm_backward_apply(gpu(dy), ctx, *fastbn.batch_norm_backward_reduce(gpu(dy), ctx))
    within(dx, wanted.dx, (1e-6 + 4 * 2.0**-8) * wanted.dx_scale.max())


@pytest.mark.parametrize("shape", [(3, 2, 8, 9), (21, 8)], ids=str)
def test_a_mean_a_million_times_the_deviation(cupy, shape):
    """The mean is two words in Moments, and both reach the kernels."""
    x, dy = 1e6 + problem(shape, 1, np.float64), problem(shape, 1, np.float64, 1)
    check(x, dy)
    check(x.astype(np.float32), dy.astype(np.float32))


def test_values_whose_squares_leave_float32(cupy):
    x, dy = 1e25 * problem((7, 3, 8, 9), 1, np.float64), problem((7, 3, 8, 9), 1, np.float32, 1)
    x = x.astype(np.float32)
    y, ctx = fastbn.batch_norm_forward_apply(gpu(x), fastbn.moments(gpu(x)))
    exact, wanted = reference.forward(x), reference.backward(dy, x)
    within(y, exact.y, 1e-6 * np.maximum(1, np.abs(exact.y)))
    dx = fastbn.batch_norm_backward_apply(gpu(dy), ctx, *fastbn.batch_norm_backward_reduce(gpu(dy), ctx))
    within(dx, wanted.dx, 1e-6 * wanted.dx_scale.max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(3, 2, 8, 9), (21, 8)], ids=str)
def test_one_part_is_what_one_call_gives(cupy, shape, activation, dtype):
    x, dy = gpu(problem(shape, 1, dtype)), gpu(problem(shape, 1, dtype, 1))
    gamma = gpu(np.linspace(0.5, 2, shape[1]).astype(dtype))
    whole, ctx = fastbn.batch_norm_forward(x, gamma, activation=activation)
    y, part = fastbn.batch_norm_forward_apply(x, fastbn.moments(x), gamma, activation=activation)
    bound = 2 * BOUNDS[np.dtype(dtype).name]  # of the two
    np.testing.assert_allclose(plain(y), plain(whole), rtol=bound, atol=bound)
    expected = fastbn.batch_norm_backward(dy, ctx)
    # Either context serves either backward.
    for context in (ctx, part):
        sums = fastbn.batch_norm_backward_reduce(dy, context)
        dx = fastbn.batch_norm_backward_apply(dy, context, *sums)
        np.testing.assert_allclose(plain(dx), plain(expected[0]), rtol=0, atol=bound * np.abs(plain(gamma)).max() * 10)
        np.testing.assert_array_equal(plain(fastbn.batch_norm_backward_apply(dy, context, *sums, x.size / shape[1])), plain(dx))
        halved = fastbn.batch_norm_backward_apply(dy, context, *sums, x.size / shape[1] / 2)
        assert (plain(halved) != plain(dx)).any()
        np.testing.assert_allclose(plain(sums[1] * context.invstd), plain(expected[1]), rtol=1e-5)
        again = fastbn.batch_norm_backward(dy, context)
        np.testing.assert_allclose(plain(again[0]), plain(expected[0]), rtol=0, atol=bound * 10)


def test_a_context_with_weights_serves_the_parts_without_waiting(cupy, monkeypatch):
    x, dy, w = problem((7, 3, 8, 9), 1, np.float32), problem((7, 3, 8, 9), 1, np.float32, 1), np.linspace(0.5, 2, 7)
    _, ctx = fastbn.batch_norm_forward(gpu(x), sample_weight=gpu(w))
    expected = fastbn.batch_norm_backward(gpu(dy), ctx)[0]
    with monkeypatch.context() as patch:
        for name in ("__float__", "__bool__", "__int__", "item"):
            patch.setattr(ndarray, name, lambda *rest: pytest.fail("a value was asked for"), raising=False)
        dx = fastbn.batch_norm_backward_apply(gpu(dy), ctx, *fastbn.batch_norm_backward_reduce(gpu(dy), ctx))
    np.testing.assert_allclose(plain(dx), plain(expected), rtol=0, atol=1e-5)


def test_an_empty_part_and_nothing_anywhere(cupy):
    x, dy = gpu(problem((8, 5, 3, 3), 1, np.float64)), gpu(problem((8, 5, 3, 3), 1, np.float64, 1))
    running = [(gpu(np.zeros(5)), gpu(np.ones(5))) for _ in range(2)]
    total = fastbn.moments(x) + fastbn.moments(x[:0])
    _, ctx = fastbn.batch_norm_forward_apply(x, total, None, None, *running[0])
    nothing, empty = fastbn.batch_norm_forward_apply(x[:0], total, None, None, *running[1], residual=x[:0])
    assert nothing.shape == (0, 5, 3, 3)
    np.testing.assert_array_equal(running[0], running[1])  # both have seen the same moments
    assert running[0][0].all()
    np.testing.assert_array_equal(empty.invstd, ctx.invstd)
    assert [plain(s).tolist() for s in fastbn.batch_norm_backward_reduce(dy[:0], empty)] == [[0.0] * 5] * 2
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    dx, dresidual = fastbn.batch_norm_backward_apply(dy[:0], empty, *sums)
    assert dx.shape == dresidual.shape == (0, 5, 3, 3)
    mean = gpu(np.full(5, 3.0))
    _, ctx = fastbn.batch_norm_forward_apply(x[:0], fastbn.moments(x[:0]), None, None, mean, gpu(np.ones(5)))
    assert (ctx.count, mean.tolist()) == (0, [3.0] * 5)
    sums = fastbn.batch_norm_backward_reduce(dy[:0], ctx)
    assert fastbn.batch_norm_backward_apply(dy[:0], ctx, *sums).shape == (0, 5, 3, 3)


def test_out(cupy):
    x, dy = gpu(problem((8, 5, 3, 3), 1, np.float32)), gpu(problem((8, 5, 3, 3), 1, np.float32, 1))
    m = fastbn.moments(x)
    expected, ctx = fastbn.batch_norm_forward_apply(x, m)
    for out in (cupy.zeros((8, 5, 3, 3), "f4"), cupy.zeros((8, 5, 3, 6), "f4")[..., ::2]):
        assert fastbn.batch_norm_forward_apply(x, m, out=out)[0] is out
        np.testing.assert_array_equal(out, expected)
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    dx = fastbn.batch_norm_backward_apply(dy, ctx, *sums)
    with pytest.raises(ValueError, match="out overlaps x, which ctx holds"):
        fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=x)
    assert fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=dy) is dy
    np.testing.assert_array_equal(dy, dx)


def test_a_channel_that_its_statistics_cannot_hold_leaves_them(cupy):
    x = inputs.values("one nan", (8, 5, 3, 3)).astype(np.float64)
    x[:, 4] *= 1e25  # its variance is beyond float32
    mean, var = gpu(np.zeros(5, np.float32)), gpu(np.ones(5))
    y, _ = fastbn.batch_norm_forward_apply(gpu(x), fastbn.moments(gpu(x)), None, None, mean, var)
    assert np.isnan(plain(y)).any(axis=(0, 2, 3)).tolist() == [False, False, True, False, False]
    assert (plain(mean) != 0).tolist() == (plain(var) != 1).tolist() == [True, True, False, True, False]


def test_weights_other_than_a_mask_need_an_effective_count(cupy):
    x, w = gpu(problem((4, 3, 5), 1, np.float32)), gpu(np.array([0.5, 1, 2, 1]))
    running, m = (gpu(np.zeros(3)), gpu(np.ones(3))), fastbn.moments(x, sample_weight=w)
    with pytest.raises(ValueError, match="effective_count=sum"):
        fastbn.batch_norm_forward_apply(x, m, None, None, *running, sample_weight=w)
    assert not running[0].any()
    fastbn.batch_norm_forward_apply(x, m, None, None, *running, sample_weight=w, unbiased=False)
    assert running[0].all()


def test_a_kernel_that_cannot_be_compiled_leaves_the_statistics(cupy, monkeypatch):
    x, running = gpu(problem((7, 3, 8, 9), 1, np.float32)), (gpu(np.zeros(3, np.float32)), gpu(np.ones(3, np.float32)))
    out, real = cupy.zeros((7, 3, 8, 9), "f4"), launch.compiled

    def compiled(variant):
        if variant.name.startswith("normalise"):
            raise MemoryError(variant.name)
        return real(variant)

    monkeypatch.setattr(launch, "compiled", compiled)
    with pytest.raises(MemoryError):
        fastbn.batch_norm_forward_apply(x, fastbn.moments(x), None, None, *running, out=out)
    assert not any(a.any() for a in (running[0], out))
    assert (running[1] == 1).all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("change", ["off its boundary", "off 16 bytes", "swapped"])
def test_memory_that_kernels_cannot_read_in_place(cupy, change, activation):
    def changed(a):
        if change == "swapped":
            return a.astype(a.dtype.newbyteorder(">"))
        raw = np.zeros(a.nbytes + 32, np.uint8)
        view = np.ndarray(a.shape, a.dtype, raw, -raw.ctypes.data % 16 + (1 if change == "off its boundary" else 4))
        view[...] = a
        return view

    x, dy = problem((7, 3, 8, 9), 1, np.float32), problem((7, 3, 8, 9), 1, np.float32, 1)
    gamma = np.linspace(0.5, 2, 3).astype(np.float32)
    plainly, ctx = fastbn.batch_norm_forward_apply(gpu(x), fastbn.moments(gpu(x)), gpu(gamma), activation=activation)
    sums = fastbn.batch_norm_backward_reduce(gpu(dy), ctx)
    dx = fastbn.batch_norm_backward_apply(gpu(dy), ctx, *sums)
    # The forward's arrays, or the backward's alone.
    y, other = fastbn.batch_norm_forward_apply(gpu(changed(x)), fastbn.moments(gpu(x)), gpu(changed(gamma)), activation=activation)
    np.testing.assert_allclose(plain(y), plain(plainly), rtol=1e-6, atol=1e-6)
    for context in (ctx, other):
        again = fastbn.batch_norm_backward_reduce(gpu(changed(dy)), context)
        for one, two in zip(sums, again, strict=True):
            np.testing.assert_allclose(plain(one), plain(two), rtol=1e-5, atol=1e-4)  # float32 sums of 500 terms in another order
        out = gpu(changed(np.zeros_like(dy))) if change != "swapped" else None
        result = fastbn.batch_norm_backward_apply(gpu(changed(dy)), context, *(gpu(changed(plain(s))) for s in sums), out=out)
        np.testing.assert_allclose(plain(result), plain(dx), rtol=0, atol=1e-5)
