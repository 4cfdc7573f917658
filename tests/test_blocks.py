"""The building blocks of a distributed loop: parts of a batch, taken in steps, give what the whole batch gives."""

from itertools import pairwise

import checks
import inputs
import numpy as np
import pytest
import reference

import fastbn

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
# Each family and road: long planes, few long planes, short planes in strips, folded short planes, rows of channels, channels last.
SHAPES = {
    "nc": (33, 20),
    "planes 27x33": (9, 10, 27, 33),
    "few planes": (9, 3, 17, 19),
    "planes 7x7": (12, 40, 7, 7),
    "planes 5x5": (90, 3, 5, 5),
    "ncdhw": (7, 5, 3, 4, 5),
}
LAYOUTS = {"axis 1": 1, "axis -1": -1}


def split(a):
    """Three unequal parts along the batch axis."""
    n = len(a)
    return [a[i:j] for i, j in pairwise((0, n // 5, n // 2, n))]


def in_parts(x, dy, gamma, beta, running, axis, weights=None, residual=None, activation=None, **options):
    """(y, dx, dgamma, dbeta, dresidual) of three workers that exchange nothing but Moments and two sums."""
    xs, dys = split(x), split(dy)
    ws = [None] * 3 if weights is None else split(weights)
    rs = [None] * 3 if residual is None else split(residual)
    total = sum(fastbn.moments(p, axis=axis, sample_weight=w) for p, w in zip(xs, ws, strict=True))
    ys, contexts = [], []
    for p, w, r, own in zip(xs, ws, rs, running, strict=True):
        y, ctx = fastbn.batch_norm_forward_apply(
            p, total, gamma, beta, *own, axis=axis, sample_weight=w, residual=r, activation=activation, **options
        )
        ys.append(y)
        contexts.append(ctx)
    sums = [fastbn.batch_norm_backward_reduce(d, c) for d, c in zip(dys, contexts, strict=True)]
    sum_dy, sum_dy_xmu = sum(s[0] for s in sums), sum(s[1] for s in sums)
    assert sum_dy.dtype == sum_dy_xmu.dtype == np.float64
    gradients = [fastbn.batch_norm_backward_apply(d, c, sum_dy, sum_dy_xmu) for d, c in zip(dys, contexts, strict=True)]
    if residual is None:
        dx, dresidual = np.concatenate(gradients), None
    else:
        dx, dresidual = (np.concatenate(part) for part in zip(*gradients, strict=True))
    return np.concatenate(ys), dx, sum_dy_xmu * contexts[0].invstd, sum_dy, dresidual


def assert_like_whole(x, dy, axis, dtype, **features):
    """Both the parts and the exact result of the whole batch, to the contract's bounds."""
    channels = x.shape[axis]
    gamma, beta, *_ = inputs.parameters(channels, dtype)
    *_, mean, var = inputs.parameters(channels, np.float64)  # float32 could not hold the variances of 1e25
    running = [(mean.copy(), var.copy()) for _ in range(3)]
    weights, options = features.pop("sample_weight", None), {}
    if weights is not None and weights.dtype != bool:
        w = np.broadcast_to(weights.reshape(weights.shape + (1,) * (x.ndim - 1 - weights.ndim)), _positions(x, axis))
        options["effective_count"] = float(w.sum() ** 2 / np.square(w).sum())
    y, dx, dgamma, dbeta, dresidual = in_parts(x, dy, gamma, beta, running, axis, weights, **features, **options)
    exact = reference.forward(x, gamma, beta, axis=axis, sample_weight=weights, **features)
    # A value whose y rounds to 0 may be on either side of the ReLU: the gradient must fit the y that was returned.
    passed = y > 0 if features.get("activation") else None
    grads = reference.backward(dy, x, gamma, axis=axis, sample_weight=weights, mask=passed)
    bound = checks.bound_of(x)
    checks.assert_forward_close(y, exact.y, x, axis)
    checks.assert_within(dx, grads.dx, bound * reference.per_channel(grads.dx_scale, x.ndim, axis), "dx", x, axis)
    checks.assert_within(dgamma, grads.dgamma, bound * grads.dgamma_scale, "dgamma", x, axis)
    checks.assert_within(dbeta, grads.dbeta, bound * grads.dbeta_scale, "dbeta", x, axis)
    if dresidual is not None:
        np.testing.assert_array_equal(dresidual, grads.dresidual.astype(dtype))  # dy or 0: nothing to round
    # Running statistics: the same as those of a single call, and as each other.
    fastbn.batch_norm_forward(x, gamma, beta, mean, var, axis=axis, sample_weight=weights)
    for own_mean, own_var in running:
        # Two ways to merge the same blocks: the statistics' own bound, and for the mean also in standard deviations.
        bound = checks.STATISTICS[np.dtype(np.float64)]
        np.testing.assert_allclose(own_mean, mean, rtol=bound, atol=bound * float(np.sqrt(exact.var.max())))
        np.testing.assert_allclose(own_var, var, rtol=bound)


def _positions(x, axis):
    return tuple(n for a, n in enumerate(x.shape) if a != axis % x.ndim)


def problem(shape, axis, dtype):
    return (np.ascontiguousarray(np.moveaxis(inputs.normal(shape, dtype, seed=s), 1, axis)) for s in (0, 1))


@DTYPES
@pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_parts_are_the_whole(shape, axis, dtype):
    assert_like_whole(*problem(shape, axis, dtype), axis, dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["1e4 +- 1e-2", "1e6 +- 1", "1e25", "1e-30", "first value 1e5"])
def test_values(kind, dtype):
    x, dy = inputs.values(kind, (9, 10, 9, 11), dtype), inputs.normal((9, 10, 9, 11), dtype)
    assert_like_whole(x, dy, 1, dtype)


@DTYPES
@pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_relu_and_residual(shape, axis, dtype):
    x, dy = problem(shape, axis, dtype)
    residual = np.ascontiguousarray(np.moveaxis(inputs.normal(shape, dtype, seed=2), 1, axis))
    assert_like_whole(x, dy, axis, dtype, activation="relu", residual=residual)


@DTYPES
@pytest.mark.parametrize("axis", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_weights(kind, shape, axis, dtype):
    x, dy = problem(shape, axis, dtype)
    rng = np.random.default_rng(inputs.seed_of(kind, shape))
    w = rng.random(_positions(x, axis))
    w = w < 0.7 if kind == "mask" else w
    assert_like_whole(x, dy, axis, dtype, sample_weight=w)


def test_weights_per_sample():
    x, dy = problem((9, 10, 5, 7), 1, np.float32)
    assert_like_whole(x, dy, 1, np.float32, sample_weight=np.random.default_rng(0).random(9))


def test_a_part_without_any_weight_still_gets_its_gradient():
    x, dy = problem((9, 4, 5, 7), 1, np.float64)
    mask = np.ones(9, bool)
    mask[:1] = False  # the whole first part
    assert_like_whole(x, dy, 1, np.float64, sample_weight=mask)


def test_an_empty_part():
    x, dy = problem((8, 5, 3, 3), 1, np.float64)
    gamma, beta, mean, var = inputs.parameters(5, np.float64)
    running = [(mean.copy(), var.copy()) for _ in range(2)]
    total = fastbn.moments(x) + fastbn.moments(x[:0])
    y, ctx = fastbn.batch_norm_forward_apply(x, total, gamma, beta, *running[0])
    nothing, empty_ctx = fastbn.batch_norm_forward_apply(x[:0], total, gamma, beta, *running[1])
    assert nothing.shape == (0, 5, 3, 3)
    np.testing.assert_array_equal(running[0], running[1])  # both have seen the same moments
    np.testing.assert_array_equal(empty_ctx.invstd, ctx.invstd)
    for total_of_part in fastbn.batch_norm_backward_reduce(dy[:0], empty_ctx):
        np.testing.assert_array_equal(total_of_part, np.zeros(5))
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    assert fastbn.batch_norm_backward_apply(dy[:0], empty_ctx, *sums).shape == (0, 5, 3, 3)
    # The other part is the whole batch: the same sweeps as in one call, so the difference is at most the order of merging.
    np.testing.assert_allclose(
        fastbn.batch_norm_backward_apply(dy, ctx, *sums), fastbn.batch_norm_backward(dy, ctx)[0], rtol=0, atol=1e-13
    )
    assert y.shape == x.shape


def test_nothing_anywhere():
    x = np.empty((0, 3, 2), np.float32)
    mean, var = np.full(3, 5, np.float32), np.full(3, 7, np.float32)
    y, ctx = fastbn.batch_norm_forward_apply(x, fastbn.moments(x), None, None, mean, var)
    assert y.shape == x.shape
    assert ctx.count == 0
    assert mean.tolist() == [5, 5, 5]
    assert var.tolist() == [7, 7, 7]
    sums = fastbn.batch_norm_backward_reduce(x, ctx)
    assert fastbn.batch_norm_backward_apply(x, ctx, *sums).shape == x.shape


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts(layout):
    x, axis = inputs.arrange(layout, inputs.normal((6, 5, 4, 7)))
    dy, _ = inputs.arrange(layout, inputs.normal((6, 5, 4, 7), seed=1))
    before = checks.snapshot(x, dy)
    y, ctx = fastbn.batch_norm_forward_apply(x, fastbn.moments(x, axis=axis), axis=axis, activation="relu")
    exact = reference.forward(x, axis=axis, activation="relu")
    checks.assert_forward_close(y, exact.y, x, axis)
    checks.assert_same_order(y, x)
    dx = fastbn.batch_norm_backward_apply(dy, ctx, *fastbn.batch_norm_backward_reduce(dy, ctx))
    grads = reference.backward(dy, x, axis=axis, mask=y > 0)
    checks.assert_within(dx, grads.dx, 1e-6 * reference.per_channel(grads.dx_scale, x.ndim, axis), "dx", x, axis)
    checks.assert_unchanged(before)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_data(name):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    x, dy = inputs.normal((9, 10, 5, 7)).astype(dtype), inputs.normal((9, 10, 5, 7), seed=1).astype(dtype)
    gamma, beta, *_ = inputs.parameters(10)
    y, dx, dgamma, dbeta, _ = in_parts(x, dy, gamma, beta, [(None, None)] * 3, 1)
    whole, ctx = fastbn.batch_norm_forward(x, gamma, beta)
    assert y.dtype == whole.dtype
    # A value between two neighbours of the half type may go either way: one unit in the last place of values up to 8.
    unit = 2.0**-7 if name == "float16" else 2.0**-4
    np.testing.assert_allclose(y.astype(np.float64), whole.astype(np.float64), rtol=0, atol=unit)
    expected = fastbn.batch_norm_backward(dy, ctx)
    np.testing.assert_allclose(dx.astype(np.float64), expected[0].astype(np.float64), rtol=0, atol=unit)
    np.testing.assert_allclose(dgamma, expected[1], rtol=1e-6, atol=1e-5)  # float32 results of sums of 315 terms
    np.testing.assert_allclose(dbeta, expected[2], rtol=1e-6, atol=1e-5)


def test_out():
    x, dy = problem((8, 5, 3, 3), 1, np.float32)
    m = fastbn.moments(x)
    expected, ctx = fastbn.batch_norm_forward_apply(x, m)
    out = np.empty_like(x)
    assert fastbn.batch_norm_forward_apply(x, m, out=out)[0] is out
    np.testing.assert_array_equal(out, expected)
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    dx = fastbn.batch_norm_backward_apply(dy, ctx, *sums)
    assert fastbn.batch_norm_backward_apply(dy, ctx, *sums, out=dy) is dy
    np.testing.assert_array_equal(dy, dx)


def test_count_is_the_contexts_by_default():
    x, dy = problem((8, 5, 3, 3), 1, np.float32)
    _, ctx = fastbn.batch_norm_forward_apply(x, fastbn.moments(x) + fastbn.moments(dy))
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    assert ctx.count == 144
    by_default = fastbn.batch_norm_backward_apply(dy, ctx, *sums)
    np.testing.assert_array_equal(by_default, fastbn.batch_norm_backward_apply(dy, ctx, *sums, 144))
    assert (by_default != fastbn.batch_norm_backward_apply(dy, ctx, *sums, 72.0)).any()


def test_a_channel_that_is_not_finite_stays_alone():
    x = inputs.values("one nan", (8, 5, 3, 3))
    mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
    with pytest.warns(RuntimeWarning, match="1 of 5 channels"):
        y, _ = fastbn.batch_norm_forward_apply(x, fastbn.moments(x), None, None, mean, var)
    assert np.isnan(y).any(axis=(0, 2, 3)).tolist() == [False, False, True, False, False]
    assert mean[2] == 0
    assert var[2] == 1
    assert (mean[[0, 1, 3, 4]] != 0).all()


# ------------------------------------------------------------------------------------------------------------- errors
X = inputs.normal((4, 3, 5))
M = fastbn.moments(X)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, (60.0, 0.0, 1.0)), TypeError, "moments is a tuple"),
        ((X, fastbn.Moments.empty(4)), ValueError, r"moments are of 4 channels, but x has shape \(4, 3, 5\) with 3 channels on axis 1"),
        ((X, fastbn.Moments.empty(3)), ValueError, r"moments have count 0, but x of shape \(4, 3, 5\) alone has 20"),
        ((X, fastbn.moments(X[:2])), ValueError, r"moments have count 10, but x of shape \(4, 3, 5\) alone has 20"),
        ((X[:1, :, :1], fastbn.moments(X[:1, :, :1])), ValueError, "count 1: the variance of one value"),
        ((X[0, 0], M), ValueError, "at least 2 dimensions"),
        ((X.astype(int), M), TypeError, "dtype int64"),
        ((X, M, np.ones(2, np.float32)), ValueError, "gamma has shape"),
        ((X, M, None, None, np.ones(3, np.float32)), ValueError, "running_mean was given without running_var"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_forward_apply_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbn.batch_norm_forward_apply(*arguments)


def test_real_weights_need_an_effective_count():
    w = np.array([0.5, 1, 2, 1])
    m = fastbn.moments(X, sample_weight=w)
    running = np.zeros(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(ValueError, match="effective_count=sum"):
        fastbn.batch_norm_forward_apply(X, m, None, None, *running, sample_weight=w)
    with pytest.raises(ValueError, match="effective_count is 1"):
        fastbn.batch_norm_forward_apply(X, m, None, None, *running, sample_weight=w, effective_count=1)
    with pytest.raises(ValueError, match="effective_count is inf"):
        fastbn.batch_norm_forward_apply(X, m, None, None, *running, sample_weight=w, effective_count=np.inf)
    assert running[0].tolist() == [0, 0, 0]
    fastbn.batch_norm_forward_apply(X, m, None, None, *running, sample_weight=w, unbiased=False)
    assert running[0].any()


def test_backward_errors():
    y, ctx = fastbn.batch_norm_forward_apply(X, M)
    sums = fastbn.batch_norm_backward_reduce(y, ctx)
    with pytest.raises(TypeError, match="ctx is a ndarray"):
        fastbn.batch_norm_backward_reduce(y, X)
    with pytest.raises(ValueError, match="dy has shape"):
        fastbn.batch_norm_backward_reduce(y[:2], ctx)
    with pytest.raises(ValueError, match=r"sum_dy_xmu has shape \(2,\)"):
        fastbn.batch_norm_backward_apply(y, ctx, sums[0], sums[1][:2])
    with pytest.raises(TypeError, match="sum_dy and sum_dy_xmu must be arrays"):
        fastbn.batch_norm_backward_apply(y, ctx, None, sums[1])
    with pytest.raises(ValueError, match=r"count is 0\.0"):
        fastbn.batch_norm_backward_apply(y, ctx, *sums, 0)
    with pytest.raises(ValueError, match="out overlaps x"):
        fastbn.batch_norm_backward_apply(y, ctx, *sums, out=X)
    _, frozen = fastbn.batch_norm_forward(X, None, None, np.zeros(3), np.ones(3), training=False)
    with pytest.raises(ValueError, match="use batch_norm_backward"):
        fastbn.batch_norm_backward_apply(y, frozen, *sums)
