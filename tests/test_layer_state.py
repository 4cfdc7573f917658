"""`BatchNorm`: checkpoints, PyTorch, copies, statistics of a whole data set, folding."""

import copy
import pickle
import sys

import numpy as np
import pytest
from layer_inputs import TOLERANCE, batch, per_channel, snapshot, trained
from sklearn.datasets import load_digits

from fastbn.conventions import CONVENTIONS
from fastbn.layers import BatchNorm


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_state_dict_round_trip(convention):
    bn, fresh = trained(), BatchNorm(3)
    fresh.num_batches_tracked = 5
    state = bn.state_dict(convention)
    arrays = {id(a) for a in (fresh.gamma, fresh.beta, fresh.running_mean, fresh.running_var)}
    assert fresh.load_state_dict(state) == convention
    assert {id(a) for a in (fresh.gamma, fresh.beta, fresh.running_mean, fresh.running_var)} == arrays  # in place
    counted = convention in ("torch", "chainer")
    assert fresh.num_batches_tracked == (1 if counted else 5)
    assert snapshot(fresh)[0] == snapshot(bn)[0]
    assert fresh.eval()(batch(2)).tobytes() == bn.eval()(batch(2)).tobytes()
    state[next(iter(state))][...] = 99  # a copy
    assert snapshot(bn)[0] == snapshot(fresh)[0]


def test_checkpoints_of_another_precision_are_cast():
    bn, double = trained(), BatchNorm(3, dtype=np.float64)
    double.load_state_dict(bn.state_dict())
    np.testing.assert_array_equal(double.running_var, bn.running_var.astype(np.float64))
    assert double.running_var.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_batches_tracked": np.array(-3)}, "num_batches_tracked is -3"),
        ({"running_var": np.ones(4)}, r"running_var has shape \(4,\), but the layer needs \(3,\)"),
        ({"running_var": None}, r"missing \['running_var'\]"),
        ({"weigth": np.ones(3)}, "known are|Known are"),
        ({"weight": None}, r"missing \['weight'\]"),
        ({"bias": np.array([0.0, 1e39, 0.0])}, r"bias has values as large as 1e\+39, which float32 cannot hold: use a layer"),
        pytest.param(
            {"bias": np.full(3, np.longdouble("1e4000"))},
            r"bias has values as large as 1e\+4000, which float64 cannot hold$",
            marks=pytest.mark.skipif(np.finfo(np.longdouble).max == np.finfo(float).max, reason="longdouble is float64 here"),
        ),
        ({"running_var": np.array([1.0, -1e-9, 1.0])}, r"running_var has negative values \(smallest: -1e-09\)"),
        ({"num_batches_tracked": 2**63}, "num_batches_tracked is 9223372036854775808; .* 9223372036854775807 at most"),
        ({"num_batches_tracked": np.array(np.inf)}, "num_batches_tracked is inf"),
    ],
)
def test_a_refused_checkpoint_leaves_the_layer_as_it_was(change, message):
    bn = trained()
    before = snapshot(bn)
    state = {k: v for k, v in {**BatchNorm(3).state_dict(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        bn.load_state_dict(state)
    assert snapshot(bn) == before
    with pytest.raises(ValueError, match="'caffe'"):
        bn.state_dict("caffe")


def test_keras_names_in_the_errors():
    with pytest.raises(ValueError, match="moving_variance has negative values"):
        BatchNorm(1).load_state_dict({"gamma": [1.0], "beta": [0.0], "moving_mean": [0.0], "moving_variance": [-1.0]})


def test_infinities_and_nan_of_a_checkpoint_are_loaded():
    bn, state = BatchNorm(3), trained().state_dict()
    state["running_var"][...] = np.inf, np.nan, 1.0
    bn.load_state_dict(state)
    np.testing.assert_array_equal(bn.running_var, state["running_var"])


@pytest.mark.parametrize("kind", [int, np.uint64, np.array, lambda n: [n]], ids=["int", "uint64", "0-d array", "list"])
def test_the_counter_is_exact(kind):
    bn, state = BatchNorm(3), BatchNorm(3).state_dict()
    bn.load_state_dict({**state, "num_batches_tracked": kind(2**53 + 1)})
    assert bn.num_batches_tracked == bn.state_dict()["num_batches_tracked"] == 2**53 + 1
    assert type(bn.num_batches_tracked) is int


class Interrupted(np.ndarray):
    """An array that Ctrl-C strikes as soon as it has been written, once."""

    struck = False

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        if not self.struck:
            self.struck = True
            raise KeyboardInterrupt


WRITERS = {
    "load_state_dict": lambda bn: bn.load_state_dict(BatchNorm(3).state_dict()),
    "recalibrate": lambda bn: bn.recalibrate([batch(7)]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("field", ["gamma", "beta", "running_mean", "running_var"])
def test_a_layer_is_written_whole_or_not_at_all(writer, field):
    bn = trained()
    before, array = snapshot(bn), getattr(bn, field)
    if writer == "recalibrate" and field in ("gamma", "beta"):
        pytest.skip("recalibrate writes running statistics alone")
    array.flags.writeable = False
    with pytest.raises(ValueError, match=rf"the layer's {field} is read-only.* set bn\.{field} = bn\.{field}\.copy\(\)"):
        WRITERS[writer](bn)
    assert snapshot(bn) == before
    array.flags.writeable = True
    setattr(bn, field, array.view(Interrupted))
    with pytest.raises(KeyboardInterrupt):
        WRITERS[writer](bn)
    assert snapshot(bn) == before
    WRITERS[writer](bn)
    assert snapshot(bn) != before


def test_pytorch_agrees_and_exchanges_checkpoints():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module, bn = torch.nn.BatchNorm2d(3), BatchNorm(3)
    with torch.no_grad():
        module.weight += torch.tensor([0.5, -2.0, 1.0])
        module.bias += torch.tensor([0.0, 1.0, -1.0])
    for seed in range(3):
        module(torch.from_numpy(batch(seed)))
    model = {"conv.weight": torch.ones(1), **module.state_dict(prefix="bn1.")}
    assert bn.load_state_dict({k: v for k, v in model.items() if k.startswith("bn1.")}) == "torch"
    assert bn.num_batches_tracked == 3
    x, dy = batch(4), batch(5)
    for mode in (True, False):
        bn.train(mode)
        module.train(mode).zero_grad()
        theirs = torch.from_numpy(x.copy()).requires_grad_()
        y = module(theirs)
        y.backward(torch.from_numpy(dy))
        # float32 on both sides, so twice the usual; sums of 120 terms of size about 4 for the parameters' gradients
        np.testing.assert_allclose(bn(x), y.detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bn.backward(dy), theirs.grad.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bn.dgamma, module.weight.grad.numpy(), rtol=0, atol=1e-6 * 120 * 4)
        np.testing.assert_allclose(bn.dbeta, module.bias.grad.numpy(), rtol=0, atol=1e-6 * 120 * 4)
        for key, value in module.state_dict().items():
            np.testing.assert_allclose(bn.state_dict()[key], value.numpy(), rtol=1e-6)
    ours = {k: torch.from_numpy(v) for k, v in bn.state_dict().items()}
    assert str(torch.nn.BatchNorm2d(3).load_state_dict(ours)) == "<All keys matched successfully>"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))], ids=["copy", "pickle"])
def test_copies_hold_everything_but_the_last_batch(clone):
    bn, x = trained(axis=1, momentum=None, activation="relu"), batch(2)
    bn(x)
    twin = clone(bn)
    assert bn.ctx is not None
    assert twin.ctx is None
    assert snapshot(twin) == snapshot(bn)
    assert twin(x).tobytes() == bn(x).tobytes()
    assert snapshot(twin) == snapshot(bn)
    twin.gamma += 1
    twin.running_mean += 1
    assert snapshot(twin)[0][0] != snapshot(bn)[0][0]
    assert snapshot(twin)[0][4] != snapshot(bn)[0][4]


@pytest.mark.parametrize("convention", ["torch", "onnx"])
def test_recalibrate_is_the_statistics_of_all_values(convention):
    images = load_digits().images[:300].reshape(100, 3, 8, 8)  # real pixels, three at a time as channels
    bn = BatchNorm.like(convention, 3, dtype=np.float64)
    bn(batch(dtype=np.float64))
    result = bn.recalibrate(images[a:b] for a, b in ((0, 1), (1, 64), (64, 64), (64, 100)))  # a generator; one empty
    assert result is bn
    rows = per_channel(images)
    # float64 sums of 6400 small integers: exact in NumPy, a rounding a merge here
    np.testing.assert_allclose(bn.running_mean, rows.mean(1), rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, rows.var(1, ddof=int(convention == "torch")), rtol=1e-13)
    assert bn.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "0 values per channel"),
        ([np.empty((0, 3))], "0 values per channel"),
        ([np.ones((1, 3))], "1 values per channel; statistics need at least 2"),
        ([np.ones((5, 3)), np.ones((5, 4))], "num_features=3, but x of shape"),
    ],
)
def test_refused_batches_leave_the_layer_as_it_was(batches, message):
    bn = trained()
    before = snapshot(bn)
    with pytest.raises(ValueError, match=message):
        bn.recalibrate(batches)
    assert snapshot(bn) == before


def test_recalibrate_skips_channels_that_are_not_finite():
    bn, x = trained(), batch(2)
    old_mean, old_var = bn.running_mean.copy(), bn.running_var.copy()
    x[0, 1, 0, 0] = np.nan
    with pytest.warns(RuntimeWarning, match="1 of 3 channels"):
        bn.recalibrate([x[:2], x[2:]])
    assert (bn.running_mean[1], bn.running_var[1]) == (old_mean[1], old_var[1])
    rows = per_channel(x)[[0, 2]]
    np.testing.assert_allclose(bn.running_mean[[0, 2]], rows.mean(1), **TOLERANCE)
    np.testing.assert_allclose(bn.running_var[[0, 2]], rows.var(1, ddof=1), **TOLERANCE)


def test_recalibrate_progress_bar(capsys, monkeypatch):
    bn = BatchNorm(3)
    bn.recalibrate([batch(1), batch(2)], progress=True)
    assert "recalibrate" in capsys.readouterr().err
    before = snapshot(bn)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if not installed
    with pytest.raises(ImportError, match=r"fastbn\[demo\]"):
        bn.recalibrate([batch(3)], progress=True)
    assert snapshot(bn) == before


@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, False)])
def test_fold_is_the_layer_before_and_this_one_in_evaluation(scale, center):
    bn = trained(scale=scale, center=center, eps=0.01)
    rng = np.random.default_rng(8)
    x, weight, bias = rng.normal(size=(10, 5)), rng.normal(size=(3, 5)), rng.normal(size=3)
    expected = bn.eval()((x @ weight.T + bias).astype(np.float32))
    folded_weight, folded_bias = bn.fold(weight, bias)
    np.testing.assert_allclose(x @ folded_weight.T + folded_bias, expected, **TOLERANCE)
    transposed, without_bias = bn.fold(weight.T, axis=1)
    np.testing.assert_array_equal(transposed, folded_weight.T)
    np.testing.assert_array_equal(without_bias, bn.fold(weight, np.zeros(3))[1])
