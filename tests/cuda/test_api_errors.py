"""What the public functions refuse of GPU arrays, on the simulator with a stand-in for CuPy; nothing is written before an error."""

import sys
from types import SimpleNamespace

import inputs
import numpy as np
import pytest
from cupy_standin import ndarray
from cupy_standin import on_device as gpu

import fastbn

SHAPE = (3, 4, 5, 6)


def arguments():
    return {
        "x": gpu(inputs.normal(SHAPE)),
        "gamma": gpu(np.ones(4, np.float32)),
        "beta": gpu(np.zeros(4, np.float32)),
        "running_mean": gpu(np.zeros(4, np.float32)),
        "running_var": gpu(np.ones(4, np.float32)),
        "out": gpu(np.full(SHAPE, 7, np.float32)),
    }


def test_the_unchanged_call_works(cupy):
    a = arguments()
    assert fastbn.batch_norm_forward(**a)[0] is a["out"]
    assert a["running_mean"].any()


def read_only(a):
    a.flags.writeable = False
    return a


X, FOUR = np.zeros(SHAPE, np.float32), np.zeros(4, np.float32)
CASES = {
    "NumPy gamma": ({"gamma": FOUR}, TypeError, r"gamma is a numpy.ndarray and x is a cupy.ndarray on a GPU.*cupy.asarray\(gamma\)"),
    "NumPy out": ({"out": X}, TypeError, "out is a numpy.ndarray and x is a cupy.ndarray"),
    "NumPy weights": ({"sample_weight": np.ones(3)}, TypeError, "sample_weight is a numpy.ndarray"),
    "a list": ({"beta": [0.0] * 4}, TypeError, r"beta is a list and x is a cupy.ndarray.*cupy.asarray\(beta\)"),
    "two devices": ({"beta": gpu(FOUR, 1)}, TypeError, r"beta is on device 1 and x on device 0.*cupy.cuda.Device\(0\)"),
    "integers": ({"x": gpu(X.astype(int))}, TypeError, r"int64.*astype\(np.float32\)"),
    "complex": ({"x": gpu(X.astype(complex))}, TypeError, "complex128"),
    "1-D": ({"x": gpu(FOUR)}, ValueError, r"\(4,\)"),
    "axis": ({"axis": 4}, ValueError, "axis 4 is out of range"),
    "gamma's length": ({"gamma": gpu(np.ones(5, np.float32))}, ValueError, r"\(5,\).*\(3, 4, 5, 6\)"),
    "gamma's dtype": ({"gamma": gpu(np.ones(4, np.float16))}, TypeError, "gamma has dtype float16"),
    "one running statistic": ({"running_var": None}, ValueError, "running_mean was given without running_var"),
    "read-only running": ({"running_mean": read_only(gpu(np.zeros(4)))}, ValueError, "running_mean is read-only"),
    "spread running": ({"running_var": gpu(np.broadcast_to(np.ones(1), 4))}, ValueError, "running_var is read-only|stride 0"),
    "residual's shape": ({"residual": gpu(X[:2])}, ValueError, r"residual has shape \(2, 4, 5, 6\)"),
    "residual's dtype": ({"residual": gpu(X.astype(float))}, TypeError, "residual has dtype float64 and x has float32"),
    "out's shape": ({"out": gpu(X[:2])}, ValueError, "out has shape"),
    "out's dtype": ({"out": gpu(X.astype(float))}, TypeError, "out has dtype float64"),
    "read-only out": ({"out": read_only(gpu(X.copy()))}, ValueError, "out is read-only"),
    "weights' shape": ({"sample_weight": gpu(np.ones((3, 5)))}, ValueError, r"sample_weight has shape \(3, 5\).*\(3, 5, 6\)"),
    "weights' dtype": ({"sample_weight": gpu(np.ones(3, complex))}, TypeError, "sample_weight has dtype complex128"),
    "eps": ({"eps": 0.0}, ValueError, "eps is 0.0"),
    "momentum": ({"momentum": 2}, ValueError, "momentum is 2.0"),
    "activation": ({"activation": "gelu"}, ValueError, "gelu"),
    "no statistics": ({"running_mean": None, "running_var": None, "training": False}, ValueError, "training=False"),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(cupy, name):
    changes, error, words = CASES[name]
    good = arguments()
    with pytest.raises(error, match=words):
        fastbn.batch_norm_forward(**{**good, **changes})
    assert (good["out"] == 7).all()
    assert not good["running_mean"].any()
    assert (good["running_var"] == 1).all()


def test_one_value_per_channel(cupy):
    x = gpu(np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"\(1, 4\) with one value per channel on axis 1"):
        fastbn.batch_norm_forward(x)
    assert fastbn.batch_norm_forward(x, running_mean=gpu(FOUR), running_var=gpu(FOUR), training=False)[0].shape == (1, 4)
    assert fastbn.moments(x).mean.tolist() == [1.0] * 4


def test_memory_that_arrays_share(cupy):
    room = np.zeros((2, *SHAPE), np.float32)
    x, shifted = gpu(room[0]), gpu(room.reshape(-1)[60:420].reshape(SHAPE))
    with pytest.raises(ValueError, match="out overlaps x; they must not share memory"):
        fastbn.batch_norm_forward(x, out=x)
    with pytest.raises(ValueError, match="out overlaps x; out may be that array itself"):
        fastbn.batch_norm_inference(x, None, None, gpu(FOUR), gpu(FOUR), out=shifted)
    _, ctx = fastbn.batch_norm_forward(x)
    with pytest.raises(ValueError, match="out overlaps x, which ctx holds; they must not"):
        fastbn.batch_norm_backward(gpu(inputs.normal(SHAPE)), ctx, out=x)
    stats = gpu(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="running_mean and running_var share memory"):
        fastbn.batch_norm_forward(x, running_mean=stats[:4], running_var=stats[3:])
    pairs = gpu(np.zeros((4, 2), np.float32))  # interleaved, but no element is shared
    fastbn.batch_norm_forward(gpu(inputs.normal(SHAPE)), running_mean=pairs[:, 0], running_var=pairs[:, 1])
    assert pairs.all()


def test_backward(cupy):
    _, ctx = fastbn.batch_norm_forward(gpu(inputs.normal(SHAPE)))
    out = gpu(np.full(SHAPE, 7, np.float32))
    for dy, error, words in [
        (X, TypeError, "dy is a numpy.ndarray and x is a cupy.ndarray"),
        (gpu(X, 1), TypeError, "dy is on device 1"),
        (gpu(X[:2]), ValueError, "dy has shape"),
        (gpu(X.astype(float)), TypeError, "dy has dtype float64"),
        (None, TypeError, "dy is None"),
    ]:
        with pytest.raises(error, match=words):
            fastbn.batch_norm_backward(dy, ctx, out=out)
    assert (out == 7).all()


class Tensor:
    """What PyTorch's tensors on a GPU are here: not CuPy's arrays, but of the same memory."""

    __module__ = "torch"

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("requires grad")


@pytest.fixture
def torch(cupy, monkeypatch):
    """A module named torch and CuPy's exchange with it."""

    def from_dlpack(tensor):
        Tensor.exchanges.append("to cupy")
        if tensor.dtype == np.float16:
            raise BufferError("cannot be exported")
        return tensor.array

    def back(array):
        Tensor.exchanges.append(array)
        return Tensor(array)

    cupy.from_dlpack = from_dlpack
    monkeypatch.setattr(Tensor, "exchanges", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(from_dlpack=back))


def test_arrays_of_others_are_given_back_in_kind(torch):
    x, gamma, out = Tensor(gpu(inputs.normal(SHAPE))), Tensor(gpu(np.ones(4, np.float32))), Tensor(gpu(np.zeros(SHAPE, np.float32)))
    y, ctx = fastbn.batch_norm_forward(x, gamma)
    assert isinstance(y, Tensor)
    assert fastbn.batch_norm_forward(x, gamma, out=out)[0] is out
    np.testing.assert_array_equal(out.array, y.array)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, ctx)
    assert [type(g) for g in (dx, dgamma, dbeta)] == [Tensor, Tensor, type(None)]
    assert isinstance(ctx.mean, ndarray)
    with pytest.raises(TypeError, match=r"gamma is a cupy\.ndarray and x is a torch\.Tensor on a GPU.*of one kind"):
        fastbn.batch_norm_forward(x, gamma.array)
    with pytest.raises(TypeError, match=r"x, a torch\.Tensor.*cannot be exported.*cupy\.from_dlpack\(x\)"):
        fastbn.batch_norm_forward(Tensor(gpu(X.astype(np.float16))))


def test_what_others_are_given_in_place_makes_them_wait_too(torch, monkeypatch):
    """PyTorch's stream waits for CuPy's in the exchange, so `out` and the running statistics are exchanged after they were written."""
    x, out, mean, var = (Tensor(gpu(a)) for a in (inputs.normal(SHAPE), X.copy(), FOUR.copy(), np.ones(4, np.float32)))
    fastbn.batch_norm_forward(x, running_mean=mean, running_var=var, out=out)
    *_, first, second, third = Tensor.exchanges
    assert [first is out.array, second is mean.array, third is var.array] == [True] * 3
    _, ctx = fastbn.batch_norm_forward(x)
    dx = Tensor(gpu(X.copy()))
    fastbn.batch_norm_backward(x, ctx, out=dx)
    assert Tensor.exchanges[-1] is dx.array


def test_arrays_of_unknown_others_are_refused(cupy):
    class Other:
        @property
        def __cuda_array_interface__(self):
            return {"shape": SHAPE, "typestr": "<f4", "data": (0, False), "version": 3}

    with pytest.raises(TypeError, match=r"x is a .*Other on a GPU.*cupy\.asarray\(x\), or cupy\.from_dlpack\(x\)"):
        fastbn.moments(Other())


def test_what_takes_numpy_arrays_only_says_so(cupy):
    with pytest.raises(TypeError, match=r"x is a cupy.ndarray on a GPU, but explain takes NumPy arrays only: .*plan\.plan"):
        fastbn.explain(gpu(inputs.normal(SHAPE)))


def test_parts_of_a_batch_are_of_one_kind_and_on_one_device(cupy):
    x, there = gpu(inputs.normal(SHAPE)), gpu(inputs.normal(SHAPE), 1)
    host = np.asarray(x).view(np.ndarray)
    _, ctx = fastbn.batch_norm_forward(x)
    sums = fastbn.batch_norm_backward_reduce(x, ctx)
    _, host_ctx = fastbn.batch_norm_forward(host)
    for call, words in (
        (lambda: fastbn.batch_norm_forward_apply(host, fastbn.moments(x)), "moments are on another device than x"),
        (lambda: fastbn.batch_norm_forward_apply(x, fastbn.moments(host)), "moments are on another device than x"),
        (lambda: fastbn.batch_norm_forward_apply(x, fastbn.moments(there)), "moments is on device 1 and x on device 0"),
        (lambda: fastbn.batch_norm_backward_reduce(host, ctx), "dy is a numpy.ndarray and x is a cupy.ndarray on a GPU"),
        (lambda: fastbn.batch_norm_backward_reduce(Tensor(x), host_ctx), "dy is a torch.Tensor; .* all of one kind"),
        (lambda: fastbn.batch_norm_backward_apply(x, ctx, np.zeros(4), sums[1]), "sum_dy is a numpy.ndarray and x is a cupy.ndarray"),
        (lambda: fastbn.batch_norm_backward_apply(x, ctx, gpu(np.zeros(4), 1), sums[1]), "sum_dy is on device 1 and x on device 0"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_nothing_asks_the_gpu_for_values(cupy, monkeypatch):
    """No array is turned into a value of the host's, which would wait; and the stand-in has no synchronize, asnumpy or get to call."""
    asked = []
    for name in ("__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
        seen = lambda self, *rest, name=name: asked.append(name) or getattr(np.ndarray, name)(self, *rest)  # noqa: E731
        monkeypatch.setattr(ndarray, name, seen, raising=False)
    a = {**arguments(), "activation": "relu", "residual": gpu(inputs.normal(SHAPE, seed=1)), "sample_weight": gpu(np.ones(3, np.float32))}
    fastbn.batch_norm_forward(**arguments())
    _, ctx = fastbn.batch_norm_forward(**a)
    fastbn.batch_norm_backward(gpu(inputs.normal(SHAPE)), ctx)
    fastbn.batch_norm_inference(a["x"], a["gamma"], a["beta"], a["running_mean"], a["running_var"])
    m = fastbn.moments(a["x"])
    del a["sample_weight"]
    _, ctx = fastbn.batch_norm_forward_apply(moments=m, **a)
    fastbn.batch_norm_backward_apply(a["residual"], ctx, *fastbn.batch_norm_backward_reduce(a["residual"], ctx))
    assert asked == []
    assert float(a["x"].sum()) != 0
    assert asked == ["__float__"]  # so it would have been seen
    assert not any(hasattr(part, name) for part in (a["x"], cupy, cupy.cuda) for name in ("synchronize", "asnumpy", "get"))


def test_arrays_of_numba_are_given_back_in_kind(cupy, monkeypatch):
    class DeviceNDArray(Tensor):
        __module__ = "numba.cuda.cudadrv.devicearray"

    real = cupy.asarray
    cupy.asarray = lambda a, *rest: a.array if isinstance(a, DeviceNDArray) else real(a, *rest)
    monkeypatch.setitem(sys.modules, "numba.cuda", SimpleNamespace(as_cuda_array=DeviceNDArray))
    x, mean, var = (DeviceNDArray(a) for a in (gpu(inputs.normal(SHAPE)), gpu(FOUR.copy()), gpu(np.ones(4, np.float32))))
    y, ctx = fastbn.batch_norm_forward(x, running_mean=mean, running_var=var)
    assert isinstance(y, DeviceNDArray)
    assert isinstance(fastbn.batch_norm_backward(y, ctx)[0], DeviceNDArray)
    assert mean.array.all()
