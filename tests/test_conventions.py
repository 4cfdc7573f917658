"""The table of conventions, and reading and writing state dicts by it."""

import math

import ml_dtypes
import numpy as np
import pytest

from fastbn.conventions import CONVENTIONS, FIELDS, VECTORS, get_convention, read_state, recognise, write_state

NAMES = ["torch", "keras", "flax", "chainer", "onnx"]
STATE = {
    "gamma": np.array([1.0, 2.0], np.float32),
    "beta": np.array([3.0, 4.0], np.float32),
    "running_mean": np.array([5.0, 6.0], np.float32),
    "running_var": np.array([7.0, 8.0], np.float32),
    "num_batches_tracked": 9,
}


def test_the_table_says_what_the_frameworks_do():
    # eps, weight of the new batch (1 - momentum in Keras, Flax, ONNX; 1 - decay in Chainer), n/(n-1) in running_var
    assert {c.name: (c.eps, c.momentum, c.unbiased) for c in CONVENTIONS.values()} == {
        "torch": (1e-5, 0.1, True),
        "keras": (1e-3, 0.01, False),
        "flax": (1e-5, 0.01, False),
        "chainer": (2e-5, 0.1, True),
        "onnx": (1e-5, 0.1, False),
    }
    assert {c.name: " ".join(c.keys) for c in CONVENTIONS.values()} == {
        "torch": "weight bias running_mean running_var num_batches_tracked",
        "keras": "gamma beta moving_mean moving_variance",
        "flax": "scale bias mean var",
        "chainer": "gamma beta avg_mean avg_var N",
        "onnx": "scale B input_mean input_var",
    }


@pytest.mark.parametrize("name", NAMES)
def test_write_then_read_gives_the_state_back(name):
    written = write_state(name, STATE)
    assert tuple(written) == get_convention(name).keys
    convention, state = read_state(written, STATE, 2)
    assert convention.name == name
    assert state.pop("num_batches_tracked", 9) == 9
    assert {k: v.tolist() for k, v in state.items()} == {k: STATE[k].tolist() for k in VECTORS}


def test_written_arrays_are_copies_of_the_same_dtype():
    written = write_state("keras", STATE)
    for field, value in zip(FIELDS, written.values(), strict=False):
        assert value.dtype == np.float32
        assert not np.shares_memory(value, STATE[field])
    counter = write_state("torch", STATE)["num_batches_tracked"]
    assert (counter.dtype, counter.shape, counter.item()) == (np.int64, (), 9)


@pytest.mark.parametrize("prefix", ["", "bn1.", "layer1.0.bn2.", "batch_normalization/", "conv/bn/", "a\nb."])
@pytest.mark.parametrize("name", NAMES)
def test_a_common_prefix_is_ignored(name, prefix):
    convention, state = recognise({prefix + k: v for k, v in write_state(name, STATE).items()})
    assert convention.name == name
    assert set(VECTORS) <= set(state)


def test_keras_variable_names():
    keys = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
    convention, state = recognise({f"batch_normalization/{k}": v for k, v in zip(keys, "abcd", strict=True)})
    assert (convention.name, state) == ("keras", dict(zip(VECTORS, "abcd", strict=True)))


@pytest.mark.parametrize("path", [(), ("BatchNorm_0",), ("block", "bn")])
def test_flax_variables_are_nested_in_collections(path):
    def nest(leaves):
        for name in reversed(path):
            leaves = {name: leaves}
        return leaves

    variables = {"params": nest({"scale": "a", "bias": "b"}), "batch_stats": nest({"mean": "c", "var": "d"})}
    convention, state = recognise(variables)
    assert (convention.name, state) == ("flax", dict(zip(VECTORS, "abcd", strict=True)))


@pytest.mark.parametrize(
    "keys", [("gamma", "gama"), ("weight", "beta"), ("scale", "bias", "input_mean"), ("kernel",), ("Weight",), ("",)]
)
def test_unknown_keys_are_answered_with_the_known_ones(keys):
    with pytest.raises(ValueError, match="belong to no known convention") as caught:
        recognise(dict.fromkeys(keys))
    for convention in CONVENTIONS.values():
        assert f"{convention.name}: {' '.join(convention.keys)}" in str(caught.value)


def test_keys_of_several_layers_are_refused():
    with pytest.raises(ValueError, match=r"2 layers \('bn1.', 'bn2.'\)"):
        recognise({"bn1.weight": 1, "bn2.bias": 2})


@pytest.mark.parametrize("not_a_state_dict", [None, [("weight", 1)], "weight", {1: 2}])
def test_not_a_mapping_of_strings(not_a_state_dict):
    with pytest.raises(TypeError, match=r"mapping|strings"):
        recognise(not_a_state_dict)


def test_unknown_convention():
    with pytest.raises(ValueError, match=r"'caffe'; known are 'torch', 'keras', 'flax', 'chainer', 'onnx'"):
        write_state("caffe", STATE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, r"missing \['weight'\]"),
        ({"running_var": None, "bias": None}, ValueError, r"missing \['bias', 'running_var'\]"),
        ({"weight": np.ones(3)}, ValueError, r"weight has shape \(3,\), but the layer needs \(2,\)"),
        ({"running_mean": np.ones((2, 1))}, ValueError, r"running_mean has shape \(2, 1\)"),
        ({"bias": 1.0}, ValueError, r"bias has shape \(\)"),
        ({"bias": np.array([1j, 2j])}, TypeError, "bias has dtype complex128"),
        ({"bias": np.array(["a", "b"])}, TypeError, "bias has dtype"),
        ({"bias": np.array([None, 1.0])}, TypeError, "bias has dtype object"),
        ({"bias": np.array([True, False])}, TypeError, "bias has dtype bool"),
        ({"bias": np.zeros(2, [("a", "f4")])}, TypeError, "bias has dtype"),
        ({"num_batches_tracked": np.array(-1)}, ValueError, "num_batches_tracked is -1.0"),
        ({"num_batches_tracked": np.array(0.5)}, ValueError, "whole number"),
        ({"num_batches_tracked": np.array(math.nan)}, ValueError, "whole number"),
        ({"num_batches_tracked": np.array([1, 2])}, ValueError, "whole number"),
    ],
)
def test_read_state_refuses(change, error, message):
    changed = {**write_state("torch", STATE), **change}
    with pytest.raises(error, match=message):
        read_state({k: v for k, v in changed.items() if v is not None}, STATE, 2)


def test_surplus_keys_are_refused():
    with pytest.raises(ValueError, match=r"missing \[\], surplus \['weight'\]"):
        read_state(write_state("torch", STATE), [f for f in FIELDS if f != "gamma"], 2)


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "i4", "u1", ml_dtypes.bfloat16])
def test_numbers_of_any_real_dtype_are_read(dtype):
    given = {k: np.array([1, 2], dtype) for k in ("scale", "bias", "mean", "var")}
    _, state = read_state(given, VECTORS, 2)
    assert all(v.dtype == np.float64 and v.tolist() == [1.0, 2.0] for v in state.values())


def test_sequences_are_read():
    _, state = read_state({"gamma": [1, 2], "beta": (0.5, 1)}, ["gamma", "beta"], 2)
    assert state["beta"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_tensors_are_read(dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.BatchNorm1d(2, dtype=getattr(torch, dtype))
    module.weight.data += 0.25
    for state_dict in (module.state_dict(), module.state_dict(prefix="bn1."), dict(module.state_dict(keep_vars=True))):
        convention, state = read_state(state_dict, FIELDS, 2)
        assert convention.name == "torch"
        assert state["gamma"].tolist() == [1.25, 1.25]
        assert state["num_batches_tracked"] == 0
