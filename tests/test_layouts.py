"""Every memory layout gives the right values, in the order of memory of x, and writes to no input."""

import checks
import inputs
import numpy as np
import pytest

import fastbn
from fastbn.cpu import layout

DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
LAYOUTS = pytest.mark.parametrize("layout", inputs.LAYOUTS)
# Broadcast axes have no order in memory; NumPy's own answer for them is arbitrary.
ORDERED = [name for name in inputs.LAYOUTS if name != "zero strides"]


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", inputs.SMALL_SHAPES.values(), ids=inputs.SMALL_SHAPES)
def test_forward_and_backward(shape, layout, dtype):
    x, axis = inputs.arrange(layout, inputs.normal(shape, dtype))
    dy, _ = inputs.arrange(layout, inputs.normal(shape, dtype, seed=1))
    gamma, beta, *_ = inputs.parameters(shape[1], dtype)
    before = checks.snapshot(x, dy, gamma, beta)
    checks.check_both(x, gamma, beta, axis=axis, dy=dy)
    checks.assert_unchanged(before)


@LAYOUTS
@pytest.mark.parametrize("shape", inputs.SMALL_SHAPES.values(), ids=inputs.SMALL_SHAPES)
def test_frozen(shape, layout):
    x, axis = inputs.arrange(layout, inputs.normal(shape))
    gamma, beta, mean, var = inputs.parameters(shape[1])
    checks.check_both(x, gamma, beta, axis=axis, frozen=(mean, var))


@pytest.mark.parametrize("layout", ORDERED)
@pytest.mark.parametrize("shape", inputs.SMALL_SHAPES.values(), ids=inputs.SMALL_SHAPES)
def test_order_of_memory(shape, layout):
    x, axis = inputs.arrange(layout, inputs.normal(shape))
    y, _ = fastbn.batch_norm_forward(x, axis=axis)
    checks.assert_same_order(y, x)
    assert y.flags.writeable
    assert y.flags.aligned
    assert not np.shares_memory(x, y)


@pytest.mark.parametrize(
    ("N", "C", "shortest"),  # planes of this many values are read as planes, shorter ones as columns
    [(7, 5, 32), (8, 5, 64), (31, 5, 64), (32, 5, 128), (7, 3000, 128), (8, 3000, 192), (15, 3000, 192), (16, 3000, 256)],
)
def test_families(N, C, shortest):
    for S, family in ((shortest - 1, "columns"), (shortest, "planes")):
        assert layout.layout_of((N, C, S), (4 * C * S, 4 * S, 4), 1, 4).family == family


def test_families_of_inference():
    for shape, family in (((32, 1024, 196), "planes"), ((32, 1024, 127), "columns"), ((9, 5, 127), "columns"), ((7, 5, 32), "planes")):
        _, C, S = shape
        assert layout.layout_of(shape, (4 * C * S, 4 * S, 4), 1, 4, inference=True).family == family


def test_channels_last_stays_channels_last():
    # Said once without NumPy's help: the strides of an NCHW view on NHWC memory.
    x, _ = inputs.arrange("channels last view", inputs.normal((4, 6, 5, 7)))
    y, ctx = fastbn.batch_norm_forward(x)
    assert y.strides == (4 * 5 * 7 * 6, 4, 4 * 7 * 6, 4 * 6)
    dx, *_ = fastbn.batch_norm_backward(x, ctx)
    assert dx.strides == y.strides


def test_a_memory_map_gives_an_ordinary_array(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, mode="w+", shape=(4, 3, 5))
    x[...] = inputs.normal((4, 3, 5))
    y, _ = checks.check_forward(x)
    assert type(y) is np.ndarray


@DTYPES
@LAYOUTS
def test_layouts_agree_with_the_contiguous_twin(layout, dtype):
    # "NCHW and its channels-last twin agree to the bound": each is within one bound of the exact value.
    x, axis = inputs.arrange(layout, inputs.normal((4, 6, 5, 7), dtype))
    twin = np.ascontiguousarray(np.moveaxis(x, axis, 1), checks.native(x.dtype))
    y, _ = fastbn.batch_norm_forward(x, axis=axis)
    expected, _ = fastbn.batch_norm_forward(twin)
    bound = 2 * checks.BOUND[np.dtype(dtype)]
    np.testing.assert_allclose(np.moveaxis(y, axis, 1), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("start", range(17))
def test_every_start_relative_to_a_vector(start):
    # 16 float32 are the widest vector: every alignment of x, of y, and of both against each other.
    buffer = inputs.normal((1, 3 * 5 * 33 + 17)).ravel()
    x = buffer[start : start + 3 * 5 * 33].reshape(3, 5, 33)
    whole = np.zeros(3 * 5 * 33 + 17, np.float32)
    for shift in (0, 1, start):
        out = whole[shift : shift + x.size].reshape(x.shape)
        checks.check_forward(x, out=out)
        checks.check_forward(x.reshape(-1, 5), axis=1, out=out.reshape(-1, 5))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 129])
def test_every_tail(length):
    # Loops over vectors have tails: planes and rows around every multiple of a vector's length.
    checks.check_both(inputs.normal((3, 4, length)), *inputs.parameters(4)[:2])
    checks.check_both(inputs.normal((5, length)), *inputs.parameters(length)[:2])
    checks.check_both(inputs.normal((length + 1, 3)), *inputs.parameters(3)[:2])


@LAYOUTS
def test_context_keeps_no_copy(layout):
    # Also where the kernels need a contiguous copy: it is made, used and dropped in each call.
    x, axis = inputs.arrange(layout, inputs.normal((16, 4, 24, 24)))
    _, ctx = fastbn.batch_norm_forward(x, axis=axis)
    own, keeps_x = checks.held_bytes(ctx, x)
    assert keeps_x
    assert own < x.nbytes / 50, f"the context keeps {own} bytes beside x of {x.nbytes}"
