"""The host side on the simulator: arguments, errors before anything is written, launchers."""

import numpy as np
import pytest
from cupy_standin import on_device

import fastbn
from fastbn.common.facts import Seen
from fastbn.cuda import layout, memory, streams
from fastbn.kernels.cuda import launch, target, variants

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_what_is_refused(backend):
    module = backend(False)
    x = np.ones((3, 2, 60), np.float32)
    y = np.full_like(x, 7)
    with pytest.raises(TypeError, match=r"int32.*astype"):
        module.forward(x.astype(np.int32), y, x.shape)
    with pytest.raises(TypeError, match=r"cupy\.asarray"):
        memory.flat([1.0, 2.0])
    with pytest.raises(ValueError, match=r"out has shape \(3, 2, 60\) and x has shape \(2, 2, 60\)"):
        fastbn.batch_norm_forward(on_device(x[:2]), out=on_device(y))
    with pytest.raises(ValueError, match=r"running_mean and running_var"):
        module.forward(x, y, x.shape, training=False)
    with pytest.raises(TypeError, match="gamma has dtype float16; allowed are float32 and float64"):
        module.forward(x, y, x.shape, gamma=np.ones(2, np.float16))
    assert (y == 7).all()  # nothing was written
    state = module.forward(x, y, x.shape)
    dx = np.full_like(x, 7)
    with pytest.raises(TypeError, match="dy has"):
        module.backward(x.astype(float), dx, state)
    assert (dx == 7).all()


def test_more_values_than_kernels_count_are_refused():
    x = Seen((2**31, 2), (8, 4), np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"shape \(N, C, S\) is \(2147483648, 2, 1\).*Split the batch"):
        layout.Layout(x, 1, "float32")


def test_the_workspace_is_kept_and_grows(backend, monkeypatch):
    module = backend(False)
    monkeypatch.setattr(streams, "_workspaces", {})
    for shape in [(4, 2, 300), (130, 4, 1), (4, 2, 300)]:
        x = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        module.forward(x, np.empty_like(x), shape)
    (space,) = streams._workspaces.values()
    assert space.partials.size >= 4 * 4
    assert not space.counters.any()


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 1), (7,), (0, 3), ()], ids=str)
def test_gaps_in_memory_are_seen(shape):
    x = np.zeros(shape, np.float32)
    for array in (x, x.T, np.moveaxis(x, 0, -1) if x.ndim else x):
        assert memory.is_compact(array.shape, array.strides, 4) or x.size == 0
    if x.ndim > 1 and x.size:
        wide = np.zeros((*shape[:-1], shape[-1] + 1), np.float32)[..., : shape[-1]]
        assert not memory.is_compact(wide.shape, wide.strides, 4)
        assert not memory.is_compact(shape, tuple(-s for s in x.strides), 4)
    assert memory.is_compact(shape, None, 4)


def test_arrays_become_the_words_of_a_launch():
    array = launch.DeviceArray(0x7F0000000010, 12, 4, "<f4")
    assert launch.flat([array, 3, 0.5]) == [0, 0, 12, 4, 0x7F0000000010, 12, 4, 3, 0.5]
    interface = array.__cuda_array_interface__
    assert interface["data"] == (0x7F0000000010, False)
    assert interface["shape"] == (12,)
    assert "stream" not in interface  # Numba would wait for it


@pytest.mark.parametrize(("version", "supported"), [("0.30.4", True), ("0.31.0", False), ("1.0", False), ("dev", False)])
def test_the_flat_launcher_knows_its_versions(version, supported):
    assert launch.flat_supported(version) is supported


def test_a_broken_flat_launcher_falls_back_for_good(monkeypatch):
    calls = []

    def broken(*arguments):
        calls.append("flat")
        raise AttributeError("_codelibrary")

    class Kernel:
        def __getitem__(self, configuration):
            return lambda *arguments: calls.append(("numba", configuration, arguments))

    monkeypatch.setattr(launch, "_flat_works", True)
    monkeypatch.setattr(launch, "_flat_launch", broken)
    monkeypatch.setattr(launch, "compiled", lambda variant: Kernel())
    launch.launch("variant", 3, 32, 0, 0, (1, 2))
    launch.launch("variant", 3, 32, 0, 0, (1, 2))
    assert calls == ["flat", ("numba", (3, 32), (1, 2)), ("numba", (3, 32), (1, 2))]


def test_the_bundled_target_is_refused(monkeypatch):
    monkeypatch.setattr(target, "BUNDLED", True)
    with pytest.raises(ImportError, match=r"fastbn\[cuda13\].*fastbn\[cuda12\]"):
        target.require_target()


def test_every_variant_has_its_own_label_and_a_signature():
    every = list(variants.all_variants())
    assert len({v.label for v in every}) == len(every)
    for variant in every[::7]:
        assert len(variant.signature()) == variant.function().__code__.co_argcount
