"""`BatchNorm`: modes, statistics, parameters and gradients, errors. Expected values are written out in float64 NumPy."""

import sys

import numpy as np
import pytest
from layer_inputs import TOLERANCE, batch, per_channel, snapshot, trained

from fastbn.conventions import CONVENTIONS
from fastbn.layers import BatchNorm


def expected_y(x, mean, var, gamma, beta, eps=1e-5, axis=1):
    shape = [1] * x.ndim
    shape[axis] = -1
    gamma, beta, mean, var = (np.asarray(v, float).reshape(shape) for v in (gamma, beta, mean, var))
    return gamma * (x.astype(float) - mean) / np.sqrt(var + eps) + beta


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), [((7, 3), 1), ((6, 3, 4, 5), 1), ((6, 4, 5, 3), -1), ((5, 2, 3, 4), 2)])
def test_training_forward_and_running_statistics(shape, axis, dtype):
    bn = BatchNorm(3, axis=axis, dtype=dtype, momentum=0.3)
    bn.gamma[...], bn.beta[...] = [1.5, -2.0, 0.5], [0.0, 1.0, -1.0]
    x = batch(shape=shape, dtype=dtype)
    y = bn(x)
    rows = per_channel(x, axis)
    expected = expected_y(x, rows.mean(1), rows.var(1), bn.gamma, bn.beta, axis=axis)
    np.testing.assert_allclose(y, expected, **TOLERANCE)
    np.testing.assert_allclose(bn.running_mean, 0.3 * rows.mean(1), **TOLERANCE)
    np.testing.assert_allclose(bn.running_var, 0.7 + 0.3 * rows.var(1, ddof=1), **TOLERANCE)
    assert y.dtype == bn.running_mean.dtype == bn.running_var.dtype == dtype
    assert bn.num_batches_tracked == 1


def test_training_backward():
    bn, x, dy = trained(), batch(2), batch(3)
    dx = None
    for _ in range(2):  # a second backward starts from zero: gradients do not add up
        bn(x)
        dx = bn.backward(dy)
    rows, drows = per_channel(x), per_channel(dy)
    invstd = 1 / np.sqrt(rows.var(1) + 1e-5)
    normalised = (rows - rows.mean(1)[:, None]) * invstd[:, None]
    dgamma, dbeta = (drows * normalised).sum(1), drows.sum(1)
    n = rows.shape[1]
    scale = (bn.gamma * invstd)[:, None]
    expected = scale * (drows - (dbeta[:, None] + normalised * dgamma[:, None]) / n)
    np.testing.assert_allclose(bn.dgamma, dgamma, rtol=0, atol=1e-6 * np.abs(drows * normalised).sum(1).max())
    np.testing.assert_allclose(bn.dbeta, dbeta, rtol=0, atol=1e-6 * np.abs(drows).sum(1).max())
    np.testing.assert_allclose(per_channel(dx), expected, rtol=0, atol=1e-6 * np.abs(scale * drows).max())


def test_evaluation_uses_running_statistics_and_its_backward_is_the_frozen_one():
    bn, x, dy = trained(), batch(2), batch(3)
    before = snapshot(bn)[0][4:], bn.num_batches_tracked
    y, dx = bn.eval()(x), bn.backward(dy)
    assert (snapshot(bn)[0][4:], bn.num_batches_tracked) == before
    expected = expected_y(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
    np.testing.assert_allclose(y, expected, **TOLERANCE)
    scale = bn.gamma / np.sqrt(bn.running_var.astype(float) + 1e-5)
    np.testing.assert_allclose(dx, scale.reshape(1, -1, 1, 1) * dy, **TOLERANCE)
    np.testing.assert_allclose(bn.dbeta, per_channel(dy).sum(1), rtol=0, atol=1e-6 * np.abs(dy).sum())
    assert bn.train()(x).tobytes() != y.tobytes()


def test_modes_return_the_layer():
    bn = BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert not bn.train(False).training


def test_without_running_statistics_evaluation_uses_the_batch():
    bn, x = BatchNorm(3, track_running_stats=False), batch()
    y = bn(x)
    assert bn.running_mean is bn.running_var is None
    assert bn.eval()(x).tobytes() == y.tobytes()
    assert bn.num_batches_tracked == 0
    assert list(bn.state_dict()) == ["weight", "bias"]
    for refused in (lambda: bn.fold(np.ones((3, 2))), lambda: bn.recalibrate([x])):
        with pytest.raises(ValueError, match="tracks no running statistics"):
            refused()


@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_absent_scale_and_center(scale, center):
    bn, x, dy = BatchNorm(3, scale=scale, center=center), batch(), batch(3)
    y = bn(x)
    assert bn.backward(dy).shape == x.shape
    names = ["gamma"] * scale + ["beta"] * center
    assert list(bn.parameters()) == list(bn.gradients()) == names
    assert (bn.gamma is None, bn.dgamma is None) == (not scale, not scale)
    assert (bn.beta is None, bn.dbeta is None) == (not center, not center)
    assert ("weight" in bn.state_dict(), "bias" in bn.state_dict()) == (scale, center)
    full = BatchNorm(3)
    assert full(x).tobytes() == y.tobytes()  # gamma 1 and beta 0
    full.backward(dy)
    for name, gradient in bn.gradients().items():
        np.testing.assert_array_equal(gradient, full.gradients()[name])


def test_momentum_none_is_the_plain_average_of_the_batches():
    bn = BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [batch(seed, (n, 3, 2), np.float64) for seed, n in enumerate((2, 9, 4, 30))]  # sizes do not count
    for k, x in enumerate(batches, start=1):
        bn(x)
        seen = [per_channel(b) for b in batches[:k]]
        # float64; k weighted steps of one rounding each
        np.testing.assert_allclose(bn.running_mean, np.mean([s.mean(1) for s in seen], axis=0), rtol=1e-13)
        np.testing.assert_allclose(bn.running_var, np.mean([s.var(1, ddof=1) for s in seen], axis=0), rtol=1e-13)
        assert bn.num_batches_tracked == k


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_stats_false_changes_nothing_but_the_output(momentum):
    bn, x = trained(momentum=momentum), batch(2)
    before = snapshot(bn)
    y = bn(x, update_stats=False)
    assert snapshot(bn) == before
    assert bn(x).tobytes() == y.tobytes()  # batch statistics in both
    assert snapshot(bn) != before
    assert bn.num_batches_tracked == 2


def test_onnx_and_pytorch_semantics_differ_in_parameters_alone():
    x = batch(shape=(4, 3))
    biased, unbiased = BatchNorm.like("onnx", 3), BatchNorm.like("torch", 3)
    assert biased(x).tobytes() == unbiased(x).tobytes()
    rows = per_channel(x)
    # ONNX opset 15: running = running * 0.9 + current * 0.1, with the population variance
    np.testing.assert_allclose(biased.running_var, 1.0 * 0.9 + rows.var(1) * 0.1, **TOLERANCE)
    np.testing.assert_allclose(unbiased.running_var, 1.0 * 0.9 + rows.var(1) * (4 / 3) * 0.1, **TOLERANCE)
    np.testing.assert_array_equal(biased.running_mean, unbiased.running_mean)


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_like(convention):
    bn = BatchNorm.like(convention.name, 3, axis=-1)
    assert (bn.eps, bn.momentum, bn.unbiased) == (convention.eps, convention.momentum, convention.unbiased)
    assert (bn.axis, tuple(bn.state_dict())) == (-1, convention.keys)
    x = batch(shape=(5, 3))
    bn(x)
    var = x.astype(float).var(0, ddof=int(convention.unbiased))
    np.testing.assert_allclose(bn.running_var, 1 + convention.momentum * (var - 1), **TOLERANCE)
    other = BatchNorm.like(convention.name, 3, momentum=0.5, eps=0.25, unbiased=not convention.unbiased)
    assert (other.eps, other.momentum, other.unbiased) == (0.25, 0.5, not convention.unbiased)


def test_parameters_and_gradients_are_the_live_arrays():
    bn, x, dy = BatchNorm(3), batch(), batch(3)
    parameters, gradients = bn.parameters(), bn.gradients()  # taken once, before any backward
    assert parameters["gamma"] is bn.gamma
    assert parameters["beta"] is bn.beta
    y = bn(x)
    bn.backward(dy)
    assert gradients["gamma"] is bn.dgamma
    assert gradients["beta"] is bn.dbeta
    for name, p in parameters.items():
        p -= 0.1 * gradients[name]
    np.testing.assert_array_equal(bn.beta, -np.float32(0.1) * bn.dbeta)
    assert bn(x).tobytes() != y.tobytes()


def test_residual_activation_weights_and_out_are_passed_on():
    bn, x, residual, dy = trained(activation="relu"), batch(), batch(4), batch(5)
    plain = BatchNorm(3)
    plain.gamma[...], plain.beta[...] = bn.gamma, bn.beta
    out = np.empty_like(x)
    assert bn(x, residual, out=out) is out
    expected = np.maximum(plain(x).astype(float) + residual, 0)
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    dx, dresidual = bn.backward(dy)
    np.testing.assert_array_equal(dresidual, np.where(out > 0, dy, 0))
    np.testing.assert_allclose(dx, plain.backward(dresidual), **TOLERANCE)

    weights = np.array([1, 1, 0, 1, 0, 1], bool)  # one a sample
    y = plain(x, sample_weight=weights)
    rows = per_channel(x[weights])
    np.testing.assert_allclose(y, expected_y(x, rows.mean(1), rows.var(1), plain.gamma, plain.beta), **TOLERANCE)
    own = dy.copy()
    assert plain.backward(own, out=own) is own
    assert own.tobytes() == plain.backward(dy).tobytes()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_does_not_count(shape, momentum):
    bn = trained(momentum=momentum)
    before = snapshot(bn)
    assert bn(np.empty(shape, np.float32)).shape == shape
    assert snapshot(bn) == before
    assert bn.backward(np.empty(shape, np.float32)).shape == shape
    assert bn.dgamma.tolist() == bn.dbeta.tolist() == [0, 0, 0]


def test_backward_needs_a_forward():
    with pytest.raises(RuntimeError, match=r"call y = bn\(x\), then bn.backward\(dy\)"):
        BatchNorm(3).backward(batch())


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (batch(shape=(6, 4, 2)), {}, ValueError, r"num_features=3, but x of shape \(6, 4, 2\) has 4 channels"),
        (batch(shape=(3,)), {}, ValueError, None),
        (batch(shape=(1, 3)), {}, ValueError, None),  # one value per channel
        (batch().astype(int), {}, TypeError, None),
        (batch().tolist(), {}, TypeError, None),
        (batch(), {"residual": batch(shape=(6, 3, 4, 4))}, ValueError, None),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_refused_batch_leaves_the_layer_as_it_was(x, options, error, message, momentum):
    bn = trained(momentum=momentum)
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        bn(x, **options)
    assert snapshot(bn) == before


def test_a_refused_gradient_leaves_the_gradients_as_they_were():
    bn = trained()
    bn.backward(batch(3))
    before = snapshot(bn)
    with pytest.raises(ValueError, match="dy"):
        bn.backward(batch(3)[:2])
    assert snapshot(bn) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features is -1"),
        ({"num_features": 3.0}, TypeError, "num_features is 3.0 of type float; pass a whole number"),
        ({"num_features": True}, TypeError, "num_features is True of type bool; pass a whole number"),
        ({"num_features": None}, TypeError, "num_features is None of type NoneType; pass a whole number"),
        ({"axis": 1.5}, TypeError, "axis is 1.5 of type float; pass a whole number"),
        ({"axis": True}, TypeError, "axis is True of type bool; pass a whole number"),
        ({"axis": np.array([1, 2])}, TypeError, "axis is array.* of type ndarray; pass a whole number"),
        ({"eps": 10**400}, ValueError, "eps is beyond the range of float64"),
        ({"momentum": 10**400}, ValueError, "momentum is beyond the range of float64"),
        ({"eps": 0.0}, ValueError, "eps is 0.0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5"),
        ({"momentum": -0.1}, ValueError, "weight of the new batch"),
        ({"momentum": "0.1"}, TypeError, "momentum is '0.1'"),
        ({"momentum": float("nan")}, ValueError, "momentum is nan"),
        ({"activation": "gelu"}, ValueError, "'gelu'; allowed are None and 'relu'"),
        ({"dtype": np.float16}, TypeError, "dtype is float16"),
        ({"dtype": int}, TypeError, "dtype is int"),
        ({"dtype": "foo"}, TypeError, "dtype is foo; .* float32 or float64: pass np.float32"),
        ({"dtype": 3}, TypeError, "dtype is 3; .* float32 or float64: pass np.float32"),
        ({"device": "tpu"}, ValueError, "'tpu'; it must be 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**{"num_features": 3, **options})


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cupy_names_the_extra(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if not installed
    with pytest.raises(ImportError, match=r"fastbn\[cuda12\]"):
        BatchNorm(3, device=device)


def test_repr():
    assert repr(BatchNorm(64)) == (
        "BatchNorm(64, axis=1, eps=1e-05, momentum=0.1, scale=True, center=True, track_running_stats=True)"
    )
    assert repr(BatchNorm.like("onnx", 2, activation="relu", dtype=np.float64, scale=False, momentum=None)) == (
        "BatchNorm.like('onnx', 2, axis=1, eps=1e-05, momentum=None, scale=False, center=True, track_running_stats=True, "
        "activation='relu', dtype='float64')"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchNorm(3, axis=np.int64(-1), eps=np.float32(0.1), momentum=None, activation="relu", dtype="f8", center=False),
        lambda: BatchNorm.like("keras", 3, track_running_stats=False),
        lambda: BatchNorm.like("keras", 3, unbiased=True),
        lambda: BatchNorm.like("torch", 3, unbiased=False),
    ],
)
def test_repr_can_be_typed(make):
    bn = make()
    again = eval(repr(bn), {"BatchNorm": BatchNorm})
    for a, b in ((bn, again), (again, bn)):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(getattr(b, name), value, err_msg=name)


@pytest.mark.parametrize("name", [["keras"], None, 3])
def test_a_convention_is_a_name(name):
    with pytest.raises(TypeError, match=r"convention is .* pass a name: 'torch', 'keras'"):
        BatchNorm.like(name, 3)
    if name is not None:
        with pytest.raises(TypeError, match=r"convention is .* pass a name: 'torch', 'keras'"):
            BatchNorm(3).state_dict(name)
