"""Weighted statistics and gradients on the CUDA simulator against longdouble."""

import numpy as np
import pytest
from cupy_standin import on_device

import fastbn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 2, 49), (4, 2, 300), (70, 8, 1), (33, 3, 1)]


def reference(x, dy, w, gamma, beta, eps=1e-5):
    """y, mean, var, dx, dgamma, dbeta of weights w of shape (N, S), from the formulas."""
    weight = w.astype(np.longdouble)[:, None, :]
    held = np.where(weight > 0, x, 0)
    total = weight.sum()
    mean = (weight * held).sum(axis=(0, 2)) / total
    var = (weight * (held - mean[:, None]) ** 2).sum(axis=(0, 2)) / total
    invstd = (1 / np.sqrt(var + np.longdouble(eps)))[:, None]
    xhat = (x - mean[:, None]) * invstd
    dgamma, dbeta = (dy * xhat).sum(axis=(0, 2)), dy.sum(axis=(0, 2))
    through = weight * (dbeta[:, None] + xhat * dgamma[:, None]) / total
    g = gamma.astype(np.longdouble)[:, None]
    return xhat * g + beta[:, None], mean, var, g * invstd * (dy - through), dgamma, dbeta


def weights_of(kind, shape):
    rng = np.random.default_rng(1)
    N, _, S = shape
    if kind == "mask":
        return rng.random((N, S)) < 0.7
    if kind == "a weight a sample":
        return np.repeat(rng.uniform(0, 2, (N, 1)), S, axis=1)
    if kind == "mostly zero":  # whole threads and blocks weigh nothing, those that come first among them
        w = np.zeros((N, S))
        w.reshape(-1)[-5:] = [1, 2, 0.5, 3, 1]
        return w
    return rng.uniform(0, 2, (N, S)).astype(np.float32)


@pytest.mark.parametrize("kind", ["mask", "a weight a sample", "mostly zero", "real"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(backend, shape, kind):
    rng = np.random.default_rng(2)
    C = shape[1]
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    gamma, beta = rng.normal(1, 0.5, (2, C)).astype(np.float32)
    w = weights_of(kind, shape)
    given = w[:, :1] if kind == "a weight a sample" else w
    y, mean, var, dx, dgamma, dbeta = reference(x.astype(np.longdouble), dy.astype(np.longdouble), w, gamma, beta)
    module = backend(True)  # weights leave the persistent road by themselves
    got, running_mean, running_var = np.empty_like(x), np.zeros(C), np.zeros(C)
    state = module.forward(
        x, got, shape, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var, momentum=1.0, sample_weight=given
    )
    assert (np.abs(got - y) <= 1e-6 * np.maximum(1, np.abs(y))).all()  # the contract, as without weights
    np.testing.assert_allclose(float(state.count), float(w.astype(np.float32).sum(dtype=float)), rtol=1e-6)  # weights are float32
    effective = w.sum(dtype=float) ** 2 / (w.astype(float) ** 2).sum()
    np.testing.assert_allclose(running_mean, mean.astype(float), atol=3e-6)  # 1e-6 of sizes of about 3
    np.testing.assert_allclose(running_var, (var * effective / (effective - 1)).astype(float), rtol=2e-6)
    got_dx, got_dgamma, got_dbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(beta)
    module.backward(dy, got_dx, state, dgamma=got_dgamma, dbeta=got_dbeta)
    scale = np.abs(gamma[:, None] / np.sqrt(var[:, None]) * dy)
    # 1e-6 of the largest term, of which the one through the statistics may exceed dy's where few values carry all weight
    assert np.abs(got_dx - dx).max() <= 1e-6 * max(scale.max(), np.abs(dx).max())
    sizes = np.abs(dy * (x - mean[:, None]) / np.sqrt(var[:, None])).sum(axis=(0, 2))
    assert (np.abs(got_dgamma - dgamma) <= 1e-6 * sizes).all()
    assert (np.abs(got_dbeta - dbeta) <= 1e-6 * np.abs(dy).sum(axis=(0, 2))).all()


@pytest.mark.parametrize("shape", [(3, 2, 60), (33, 3, 1)], ids=str)
def test_what_weighs_nothing_may_be_nan(backend, shape):
    rng = np.random.default_rng(3)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(np.float32)
    w = weights_of("mask", shape)
    w[0, 0] = False  # also the first value of all
    hidden = np.broadcast_to(~w[:, None, :], shape)
    dy[hidden] = 0
    clean = np.where(hidden, 0, x).astype(np.longdouble)
    y, _, _, dx, _, _ = reference(clean, dy.astype(np.longdouble), w, np.ones(shape[1]), np.zeros(shape[1]))
    x[hidden] = np.nan
    module, got, got_dx = backend(False), np.empty_like(x), np.empty_like(x)
    state = module.forward(x, got, shape, sample_weight=w)
    assert np.abs(got - y)[~hidden].max() <= 1e-6 * np.abs(y).max()  # the contract; |y| reaches above 1
    assert np.isnan(got[hidden]).all()
    module.backward(dy, got_dx, state)
    assert np.abs(got_dx - dx)[~hidden].max() <= 1e-6 * np.abs(dx).max()
    assert (got_dx[hidden] == 0).all()


def test_weights_of_one_are_no_weights(backend):
    x = 1e6 + np.random.default_rng(4).normal(0, 1, (4, 2, 300)).astype(np.float32)
    module, plain, weighted = backend(False), np.empty_like(x), np.empty_like(x)
    module.forward(x, plain, x.shape)
    module.forward(x, weighted, x.shape, sample_weight=np.ones(4, bool))
    np.testing.assert_allclose(weighted, plain, atol=2e-6)  # twice the contract's bound: another order of additions
    count, mean, *_ = module.moments(x, x.shape, sample_weight=np.ones((4, 300)))
    assert count == 1200
    np.testing.assert_allclose(mean, x.mean(axis=(0, 2), dtype=float), rtol=1e-12)


def test_a_first_block_that_weighs_nothing_costs_no_accuracy(backend):
    # 1e6 +- 1: were the empty block's shift of 0 taken for the merge, squares of 1e6 would cancel.
    for shape in [(4, 2, 300), (400, 4, 1)]:
        x = 1e6 + np.random.default_rng(6).normal(0, 1, shape).astype(np.float32)
        w = np.zeros((shape[0], shape[2]))
        w.reshape(-1)[-w.size // 4 :] = 1
        y, *_ = reference(x.astype(np.longdouble), x, w, np.ones(shape[1]), np.zeros(shape[1]))
        got = np.empty_like(x)
        state = backend(False).forward(x, got, shape, sample_weight=w)
        assert state.plan.splits > 2
        assert (np.abs(got - y) <= 1e-6 * np.maximum(1, np.abs(y))).all()  # the contract


def test_rows_share_a_weight_and_wrong_sizes_are_refused(backend):
    backend(False)
    x = on_device(np.random.default_rng(5).normal(0, 1, (3, 10, 4)).astype(np.float32))  # 30 rows of 4 channels
    w = np.float32([1, 0, 2])
    few, ctx = fastbn.batch_norm_forward(x, sample_weight=on_device(w), axis=-1)
    assert ctx.plan.layout.shape == (30, 4, 1)
    all_, _ = fastbn.batch_norm_forward(x, sample_weight=on_device(np.repeat(w, 10).reshape(3, 10)), axis=-1)
    np.testing.assert_array_equal(few, all_)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(7,\).*it must be \(3,\) or \(3, 10\)"):
        fastbn.batch_norm_forward(x, sample_weight=on_device(np.ones(7)), axis=-1)
