"""The contract's table of errors: the type, a message that names what arrived, and no argument written to.

A case changes some arguments of a call that works (`test_the_unchanged_calls_work` holds that it does). Its words are
regular expressions that the message must contain: the shape, dtype or value that arrived.
"""

import re
import warnings
from types import SimpleNamespace

import checks
import inputs
import numpy as np
import pytest

import fastbn

SHAPE = (4, 3, 5, 6)
STRUCTURED = np.dtype([("a", np.float32), ("b", np.int32)])
EITHER = (TypeError, ValueError)  # where the contract does not say which
HAS_LONGDOUBLE = np.dtype(np.longdouble).itemsize > 8


class CudaArray:
    """Looks like an array of another device to anyone who asks by protocol; reading its memory would be a bug."""

    def __init__(self, shape):
        self.shape, self.ndim, self.dtype = shape, len(shape), np.dtype(np.float32)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (0, False), "version": 3}

    def __array__(self, *args, **kwargs):
        raise AssertionError("a device array was copied to the host silently")


def forward_arguments():
    gamma, beta, mean, var = inputs.parameters(3)
    x = inputs.normal(SHAPE)
    return {"x": x, "gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var}


def inference_arguments():
    gamma, beta, mean, var = inputs.parameters(3)
    return {"x": inputs.normal(SHAPE), "gamma": gamma, "beta": beta, "mean": mean, "var": var}


def backward_arguments():
    x, dy = inputs.normal(SHAPE), inputs.normal(SHAPE, seed=1)
    return {"dy": dy, "ctx": fastbn.batch_norm_forward(x, *inputs.parameters(3)[:2])[1], "x": x}


CALLS = {
    "forward": (lambda **k: fastbn.batch_norm_forward(**k), forward_arguments),
    "inference": (lambda **k: fastbn.batch_norm_inference(**k), inference_arguments),
    "backward": (lambda dy, ctx, x, **k: fastbn.batch_norm_backward(dy, ctx, **k), backward_arguments),
    "moments": (lambda x, **k: fastbn.moments(x, **k), lambda: {"x": inputs.normal(SHAPE)}),
}


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def zero_strides(a):
    return np.lib.stride_tricks.as_strided(np.zeros(1, a.dtype), a.shape, (0,) * a.ndim)


def overlapping_itself(a):
    strides = (*a.strides[:-2], a.itemsize, a.itemsize)
    return np.lib.stride_tricks.as_strided(np.zeros(a.size, a.dtype), a.shape, strides)


def overlapping_pair(a, by=7):
    """A copy of `a`, and an array of the same shape that shares all but `by` of its elements."""
    buffer = np.zeros(a.size + by, a.dtype)
    first, second = buffer[: a.size].reshape(a.shape), buffer[by:].reshape(a.shape)
    first[...] = a
    return first, second


def weights(*zero):
    """Ones of shape (N,), except for the samples named."""
    w = np.ones(SHAPE[0])
    w[list(zero)] = 0
    return w


def one_value():
    w = np.zeros((4, 5, 6))
    w[1, 2, 3] = 1
    return w


BAD_DTYPES = {
    "int64": lambda a: np.ones(a.shape, np.int64),
    "uint8": lambda a: np.ones(a.shape, np.uint8),
    "bool": lambda a: np.ones(a.shape, bool),
    "complex64": lambda a: a.astype(np.complex64),
    "object": lambda a: a.astype(object),
    "structured": lambda a: np.zeros(a.shape, STRUCTURED),
    "string": lambda a: np.full(a.shape, "1"),
    "datetime": lambda a: np.zeros(a.shape, "datetime64[s]"),
    "longdouble": lambda a: a.astype(np.longdouble),
    "list": lambda a: a.tolist(),
    "masked array": np.ma.masked_array,
}
DTYPE_WORDS = {
    "structured": r"'a'|void|structured",
    "string": "<U1|str",
    "datetime": "datetime64",
    "longdouble": "float128|longdouble|float96",
    "masked array": "(?i)masked",
}

ADVICE = {
    "complex64": r"{0}\.real",
    "object": r"convert it to numbers, {0}\.astype\(np\.float64\)$",
    "structured": r"{0}\['a'\]",
    "string": r"convert it to numbers, {0}\.astype\(np\.float64\)$",
    "datetime": r"convert it to numbers, {0}\.astype\(np\.float64\)$",
    "longdouble": r"cast with {0}\.astype\(np\.float64\)$",
    "list": r"np\.asarray\({0}, dtype=np\.float32\)$",
    "masked array": r"pass {0}\.data, which ignores the mask, or {0}\.filled\(value\)$",
}

# (id, call, function of the valid arguments that gives the changed ones, exception, words)
CASES = []


def case(name, call, change, error, *words):
    CASES.append(pytest.param(call, change, error, words, id=f"{call}: {name}"))


for bad, make in BAD_DTYPES.items():
    if bad == "longdouble" and not HAS_LONGDOUBLE:
        continue  # there it is float64
    word = DTYPE_WORDS.get(bad, bad)
    advice = ADVICE.get(bad, r"{0}\.astype\(np\.float32\)$").format  # the message says what to do
    masked = bad == "masked array"
    for call in ("forward", "inference", "moments"):
        cast = r"pass x\.data, and the mask as sample_weight=~mask" if masked else advice("x")
        case(f"x is {bad}", call, lambda a, make=make: {"x": make(a.x)}, TypeError, word, cast)
    case(f"dy is {bad}", "backward", lambda a, make=make: {"dy": make(a.dy)}, TypeError, word, advice("dy"))
    case(f"gamma is {bad}", "forward", lambda a, make=make: {"gamma": make(a.gamma)}, TypeError, word, advice("gamma"))
    case(f"residual is {bad}", "forward", lambda a, make=make: {"residual": make(a.x)}, TypeError, word, advice("residual"))
    if bad != "bool":  # bool masks are what sample_weight is for
        if bad not in ("int64", "uint8", "longdouble"):  # any real numbers may be weights
            cast = r"pass sample_weight\.filled\(0\)" if masked else advice("sample_weight")
            case(f"sample_weight is {bad}", "forward", lambda a, make=make: {"sample_weight": make(np.ones(4))}, TypeError, word, cast)
        cast = advice("running_mean")
        case(f"running_mean is {bad}", "forward", lambda a, make=make: {"running_mean": make(a.running_mean)}, TypeError, word, cast)
case("out is masked", "forward", lambda a: {"out": np.ma.masked_array(a.x.copy())}, TypeError, r"pass out\.data$")

for call in ("forward", "inference", "moments"):
    case("x is 1-D", call, lambda a: {"x": np.ones(7, np.float32)}, ValueError, r"\(7,\)|1-D|1 dim")
    case("x is 0-D", call, lambda a: {"x": np.array(1, np.float32)}, ValueError, r"\(\)|0-D|0 dim")
    for axis in (4, -5, 100):
        case(f"axis {axis}", call, lambda a, axis=axis: {"axis": axis}, ValueError, str(axis), r"4|\(4, 3, 5, 6\)")
    case("axis is a float", call, lambda a: {"axis": 1.5}, TypeError, "1.5 of type float; pass a whole number")
    case("axis is a bool", call, lambda a: {"axis": True}, TypeError, "True of type bool")
    case("axis is an array", call, lambda a: {"axis": np.array([1])}, TypeError, "of type ndarray; pass a whole number")
    case("x of another device", call, lambda a: {"x": CudaArray(SHAPE)}, TypeError)

for call, names in [
    ("forward", ["gamma", "beta", "running_mean", "running_var"]),
    ("inference", ["gamma", "beta", "mean", "var"]),
]:
    for name in names:
        both = (name, r"\(3,\)|\(4, 3, 5, 6\)|3 channels")
        case(f"{name} too long", call, lambda a, n=name: {n: np.ones(4, np.float32)}, ValueError, r"\(4,\)", *both)
        case(f"{name} too short", call, lambda a, n=name: {n: np.ones(2, np.float32)}, ValueError, r"\(2,\)", *both)
        case(f"{name} of one element", call, lambda a, n=name: {n: np.ones(1, np.float32)}, ValueError, r"\(1,\)", *both)
        case(f"{name} is 2-D", call, lambda a, n=name: {n: np.ones((3, 1), np.float32)}, ValueError, r"\(3, 1\)", *both)
        case(f"{name} is half", call, lambda a, n=name: {n: np.ones(3, np.float16)}, TypeError, name, "float16", "float32")
        case(f"{name} of another device", call, lambda a, n=name: {n: CudaArray((3,))}, TypeError, name)
    for eps in (0, -1e-5, float("nan"), float("-inf")):
        case(f"eps {eps}", call, lambda a, eps=eps: {"eps": eps}, ValueError, "eps", re.escape(str(eps)))
    case("eps beyond float64", call, lambda a: {"eps": 10**400}, ValueError, "eps is beyond .* float64", "greater than 0")
    case("eps too long to print", call, lambda a: {"eps": -(10**5000)}, ValueError, "eps is beyond .* float64", "greater than 0")
    case("eps is text", call, lambda a: {"eps": "small"}, EITHER, "eps")
    case("unknown activation", call, lambda a: {"activation": "gelu"}, ValueError, "gelu", "relu")
    case("activation is a function", call, lambda a: {"activation": np.tanh}, EITHER, "activation")
    case("residual of another shape", call, lambda a: {"residual": a.x[:, :, :1]}, ValueError, r"\(4, 3, 1, 6\)", r"\(4, 3, 5, 6\)")
    case("residual of another dtype", call, lambda a: {"residual": a.x.astype(np.float64)}, TypeError, "float64", "float32")
    case("residual of another device", call, lambda a: {"residual": CudaArray(SHAPE)}, TypeError, "residual")
    case("out is residual", call, lambda a: (lambda r: {"residual": r, "out": r})(a.x.copy()), ValueError, "out", "residual")
    case(
        "out is a parameter's memory", call, lambda a: (lambda b: {"gamma": b.ravel()[:3], "out": b})(a.x.copy()), ValueError, "out"
    )

for call, name in [("forward", "x"), ("inference", "x"), ("backward", "dy")]:
    case(
        "out of another shape",
        call,
        lambda a: {"out": np.zeros((4, 3, 5, 7), np.float32)},
        ValueError,
        r"\(4, 3, 5, 7\)",
        r"\(4, 3, 5, 6\)",
    )
    case("out of another dtype", call, lambda a: {"out": np.zeros(SHAPE)}, EITHER, "out", "float64", "float32")
    case("out is a list", call, lambda a: {"out": [0.0]}, TypeError, "out", "list")
    case("out is read-only", call, lambda a: {"out": read_only(a.x)}, ValueError, "out", "(?i)read-only|writ")
    case("out has zero strides", call, lambda a: {"out": zero_strides(a.x)}, ValueError, "out")
    case("out overlaps itself", call, lambda a: {"out": overlapping_itself(a.x)}, ValueError, "out")
    case("out of another device", call, lambda a: {"out": CudaArray(SHAPE)}, TypeError, "out")

    def partly(a, name=name):
        first, second = overlapping_pair(getattr(a, name))
        return {name: first, "out": second}

    case(f"out overlaps {name} in part", call, partly, ValueError, "out", "(?i)overlap|memory|alias")
    case(
        f"out is {name} transposed",
        call,
        lambda a, n=name: (
            (lambda s: {n: s, "out": s.swapaxes(2, 3)})(inputs.normal((4, 3, 5, 5))) if n == "x" else {"out": a.dy[::-1]}
        ),
        ValueError,
        "out",
        "(?i)overlap|memory|alias",
    )

case("out is x", "forward", lambda a: {"out": a.x}, ValueError, "out", "(?i)overlap|memory|alias")
case("out is the x of the context", "backward", lambda a: {"out": a.x}, ValueError, "out", "(?i)overlap|memory|alias")
case(
    "out shares running_mean",
    "forward",
    lambda a: (lambda b: {"running_mean": b.ravel()[:3], "out": b})(a.x.copy()),
    ValueError,
    "out",
)

for shape in [(1, 3), (1, 3, 1, 1)]:
    case(
        f"one value per channel, {shape}",
        "forward",
        lambda a, s=shape: {"x": np.ones(s, np.float32)},
        ValueError,
        re.escape(str(shape)),
    )
case(
    "one value per channel, axis -1",
    "forward",
    lambda a: {"x": np.ones((1, 1, 3), np.float32), "axis": -1},
    ValueError,
    r"\(1, 1, 3\)",
)
case(
    "no running statistics to freeze",
    "forward",
    lambda a: {"training": False, "running_mean": None, "running_var": None},
    ValueError,
    "running",
)
case("running_mean alone", "forward", lambda a: {"running_var": None}, ValueError, "running_var")
case("running_var alone", "forward", lambda a: {"running_mean": None}, ValueError, "running_mean")
case("running_mean is running_var", "forward", lambda a: {"running_mean": a.running_var}, ValueError, "running_mean", "running_var")
case(
    "running_mean overlaps running_var",
    "forward",
    lambda a: dict(zip(("running_mean", "running_var"), overlapping_pair(a.running_mean, 1), strict=True)),
    ValueError,
    "running_mean",
    "running_var",
)
for name in ("running_mean", "running_var"):
    case(f"{name} is read-only", "forward", lambda a, n=name: {n: read_only(getattr(a, n))}, ValueError, name, "(?i)read-only|writ")
    case(f"{name} has zero strides", "forward", lambda a, n=name: {n: zero_strides(getattr(a, n))}, ValueError, name)
for momentum in (-0.1, 1.1, float("nan"), float("inf")):
    case(f"momentum {momentum}", "forward", lambda a, m=momentum: {"momentum": m}, ValueError, "momentum", re.escape(str(momentum)))
case("momentum beyond float64", "forward", lambda a: {"momentum": 10**400}, ValueError, "momentum is beyond .* float64", r"in \[0, 1\]")
case("momentum is text", "forward", lambda a: {"momentum": "slow"}, EITHER, "momentum")

for call in ("forward", "moments"):
    case(
        "negative weight",
        call,
        lambda a: {"sample_weight": weights() - 2 * (np.arange(4) == 1)},
        ValueError,
        "sample_weight",
        "-1|negative",
    )
    case(
        "NaN weight",
        call,
        lambda a: {"sample_weight": weights() * np.array([1, np.nan, 1, 1])},
        ValueError,
        "sample_weight",
        "(?i)nan",
    )
    case("weights of another length", call, lambda a: {"sample_weight": np.ones(5)}, ValueError, r"\(5,\)", r"\(4,\)|\(4, 5, 6\)")
    case("weights of x's shape", call, lambda a: {"sample_weight": np.ones(SHAPE)}, ValueError, r"\(4, 3, 5, 6\)", r"\(4, 5, 6\)")
    case("weights of another device", call, lambda a: {"sample_weight": CudaArray((4,))}, TypeError, "sample_weight")
case("all weights zero", "forward", lambda a: {"sample_weight": weights(0, 1, 2, 3)}, ValueError, "sample_weight")
case("mask without a value", "forward", lambda a: {"sample_weight": np.zeros(4, bool)}, ValueError, "sample_weight")
case("weights leave one value", "forward", lambda a: {"sample_weight": one_value()}, ValueError, "sample_weight")
case(
    "mask leaves one value",
    "forward",
    lambda a: {"x": a.x[:, :, 0, 0], "sample_weight": weights(0, 1, 2) > 0},
    ValueError,
    "sample_weight",
)

# What only shows once statistics are about to be taken must still show before `out` is touched.
FULL, SINGLE = np.ones(SHAPE, np.float32), np.ones((1, 3), np.float32)
case("one value, with out", "forward", lambda a: {"x": SINGLE.copy(), "out": SINGLE.copy()}, ValueError, r"\(1, 3\)")
for w in (np.zeros(4, bool), one_value()):
    name = f"{w.ndim}-D weights leave too little, with out"
    case(name, "forward", lambda a, w=w: {"sample_weight": w, "out": FULL.copy()}, ValueError, "sample_weight")

case("dy of another shape", "backward", lambda a: {"dy": a.dy[:, :, :4]}, ValueError, r"\(4, 3, 4, 6\)", r"\(4, 3, 5, 6\)")
case(
    "dy of one channel, to be broadcast",
    "backward",
    lambda a: {"dy": a.dy[:, :1]},
    ValueError,
    r"\(4, 1, 5, 6\)",
    r"\(4, 3, 5, 6\)",
)
case("dy of another device", "backward", lambda a: {"dy": CudaArray(SHAPE)}, TypeError, "dy")
case("ctx is something else", "backward", lambda a: {"ctx": (a.x, 1)}, TypeError, "ctx|[Cc]ontext", "tuple")


@pytest.mark.parametrize("call", CALLS)
def test_the_unchanged_calls_work(call):
    function, arguments = CALLS[call]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(**arguments())


@pytest.mark.parametrize(("call", "change", "error", "words"), CASES)
def test_error(call, change, error, words):
    function, arguments = CALLS[call]
    arguments = arguments()
    arguments.update(change(SimpleNamespace(**arguments)))
    before = checks.snapshot(*arguments.values())
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) in (TypeError, ValueError), f"a bare {type(caught.value).__name__} from further down"
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"the message does not name {word!r}: {message}"
    checks.assert_unchanged(before)


def test_a_torch_tensor_is_not_converted_silently():
    torch = pytest.importorskip("torch", reason="needs PyTorch for an array of another library")
    gamma, *_ = inputs.parameters(3)
    with pytest.raises(TypeError, match=r"Tensor|torch"):
        fastbn.batch_norm_forward(torch.ones(SHAPE), gamma)
    with pytest.raises(TypeError, match="gamma"):
        fastbn.batch_norm_forward(inputs.normal(SHAPE), torch.ones(3))


def test_weights_of_zero_in_part_are_no_error():
    fastbn.batch_norm_forward(inputs.normal(SHAPE), sample_weight=weights(0, 1, 2))  # 30 values are left


def test_the_context_is_usable_after_a_failed_backward():
    x, dy = inputs.normal(SHAPE), inputs.normal(SHAPE, seed=1)
    _, ctx = fastbn.batch_norm_forward(x, *inputs.parameters(3)[:2])
    expected = fastbn.batch_norm_backward(dy, ctx)
    with pytest.raises(ValueError, match="shape"):
        fastbn.batch_norm_backward(dy[:2], ctx)
    assert all(checks.same_bits(a, b) for a, b in zip(expected, fastbn.batch_norm_backward(dy, ctx), strict=True))
