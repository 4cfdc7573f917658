"""hypothesis: any shape, layout, offset, stride, dtype, alias and kind of value (profile in conftest.py: 100 fixed examples)."""

import checks
import inputs
import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

import fastbn

# The longest axis for 2 to 6 axes: some thousand values at most, across the widths of vectors.
LONGEST = {2: 70, 3: 19, 4: 9, 5: 5, 6: 4}
FIVE = np.float64([-1.5, 0.25, 0, 1, 3])


@st.composite
def shapes(draw, smallest=1):
    ndim = draw(st.integers(2, 6))
    return tuple(draw(st.lists(st.integers(smallest, LONGEST[ndim]), min_size=ndim, max_size=ndim)))


dtypes = st.sampled_from(inputs.FLOATS)
layouts = st.sampled_from(list(inputs.LAYOUTS))
kinds = st.sampled_from(list(inputs.VALUES))


@st.composite
def arrays(draw, shape, dtype, kind=None):
    """`(x, axis)` in any layout."""
    seed = draw(st.integers(0, 10))
    kind = draw(kinds) if kind is None else kind
    layout = draw(layouts)
    note(f"{np.dtype(dtype).name} {shape} {kind!r}, seed {seed}, {layout}")
    return inputs.arrange(layout, inputs.values(kind, shape, dtype, seed))


@st.composite
def sliced(draw, shape, dtype):
    """Normal values behind arbitrary offsets and steps (forwards and backwards), the axes in any order of memory."""
    order = draw(st.permutations(range(len(shape))))
    offsets = [draw(st.integers(0, 3)) for _ in shape]
    steps = [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in shape]
    whole = np.full([offset + n * abs(step) for n, offset, step in zip(shape, offsets, steps, strict=True)], 777, dtype)
    whole = np.transpose(np.ascontiguousarray(np.transpose(whole, order)), np.argsort(order))
    view = whole[tuple(slice(o, None, abs(s)) for o, s in zip(offsets, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    view[...] = inputs.normal(shape, dtype)
    assert view.shape == shape
    note(f"strides {view.strides} of {view.shape}")
    return view


def count(x, axis):
    return x.size // x.shape[axis]


def raises_for_one_value(x, axis):
    """The one ValueError that valid arrays can meet; True where it is due (and was seen)."""
    if count(x, axis) > 1:
        return False
    before = checks.snapshot(x)
    with pytest.raises(ValueError, match="value"):
        fastbn.batch_norm_forward(x, axis=axis)
    checks.assert_unchanged(before)
    return True


@given(st.data())
def test_training(data):
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    x, axis = data.draw(arrays(shape, dtype))
    if raises_for_one_value(x, axis):
        return
    dy, _ = data.draw(arrays(shape, dtype, "normal"))
    if dy.shape != x.shape:
        dy = inputs.normal(x.shape, dtype, seed=1)
    gamma, beta, *_ = inputs.parameters(shape[1], data.draw(dtypes))
    gamma, beta = (data.draw(st.sampled_from([p, None])) for p in (gamma, beta))
    before = checks.snapshot(x, dy, gamma, beta)
    checks.check_both(x, gamma, beta, axis=axis, dy=dy, eps=data.draw(st.sampled_from([1e-5, 1e-3, 0.6, 10.0])))
    checks.assert_unchanged(before)


@given(st.data())
def test_any_strides(data):
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    x, dy, out = (data.draw(sliced(shape, dtype)) for _ in range(3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    if raises_for_one_value(x, axis):
        return
    gamma, beta, *_ = inputs.parameters(shape[axis], dtype)
    before = checks.snapshot(x, dy, gamma, beta)
    y, ctx = checks.check_forward(x, gamma, beta, axis=axis, out=out)
    checks.check_backward(dy, ctx, y, x, gamma, beta, axis=axis)
    checks.assert_unchanged(before)
    whole = out
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    assert (whole == 777).sum() == whole.size - out.size, "something was written between the elements of out"


@given(st.data())
def test_frozen_and_inference(data):
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    x, axis = data.draw(arrays(shape, dtype))
    gamma, beta, mean, var = inputs.parameters(shape[1], data.draw(dtypes))
    checks.check_both(x, gamma, beta, axis=axis, frozen=(mean, var))
    out = np.empty_like(x, order="C", subok=False) if data.draw(st.booleans()) else None
    checks.check_inference(x, gamma, beta, mean, var, axis=axis, out=out)


@given(st.data())
def test_aliases(data):
    """Inference onto x and backward onto dy give the bits they give apart, for any strides."""
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    x, dy = data.draw(sliced(shape, dtype)), data.draw(sliced(shape, dtype))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    p = inputs.parameters(shape[axis], dtype)
    _, ctx = fastbn.batch_norm_forward(x, *p, axis=axis, training=count(x, axis) > 1)
    dx, *_ = fastbn.batch_norm_backward(dy, ctx)
    assert fastbn.batch_norm_backward(dy, ctx, out=dy)[0] is dy
    np.testing.assert_array_equal(dy, dx)
    y = fastbn.batch_norm_inference(x, *p, axis=axis)
    assert fastbn.batch_norm_inference(x, *p, axis=axis, out=x) is x
    np.testing.assert_array_equal(x, y)


@given(st.data())
def test_fused(data):
    shape, dtype = data.draw(shapes()), data.draw(dtypes)
    x, axis = data.draw(arrays(shape, dtype, data.draw(st.sampled_from(inputs.FINITE))))
    if raises_for_one_value(x, axis):
        return
    options = {"activation": data.draw(st.sampled_from([None, "relu"]))}
    if data.draw(st.booleans()):
        options["residual"] = inputs.normal(x.shape, dtype, seed=2)
    checks.check_both(x, *inputs.parameters(shape[1], dtype)[:2], axis=axis, **options)


@given(st.data())
def test_weighted(data):
    shape, dtype = data.draw(shapes(smallest=2)), data.draw(dtypes)
    x, axis = data.draw(arrays(shape, dtype, data.draw(st.sampled_from(inputs.FINITE))))
    samples = x.shape[0 if axis % x.ndim else 1]
    rest = x.shape[: axis % x.ndim] + x.shape[axis % x.ndim + 1 :]
    size = rest if data.draw(st.booleans()) or axis % x.ndim == 0 else (samples,)
    rng = np.random.default_rng(data.draw(st.integers(0, 10)))
    w = rng.random(size) < 0.7 if data.draw(st.booleans()) else rng.uniform(0, 2, size)
    w.flat[:2] = 1
    checks.check_both(x, axis=axis, sample_weight=w, activation=data.draw(st.sampled_from([None, "relu"])))


@given(st.data())
def test_shift_and_scale_of_the_input_leave_y_alone(data):
    # y(a * x + b) = sign(a) * y(x) without eps; powers of two and small integers keep the arithmetic of x exact.
    shape = data.draw(shapes(smallest=2))
    x = np.round(inputs.normal(shape, np.float64, data.draw(st.integers(0, 10))) * 64) / 64
    a, b = data.draw(st.sampled_from([-4.0, 0.5, 1024.0])), data.draw(st.integers(-(2**20), 2**20))
    y, _ = fastbn.batch_norm_forward(x, eps=1e-30)
    moved, _ = fastbn.batch_norm_forward(a * x + b, eps=1e-30)
    np.testing.assert_allclose(moved, np.sign(a) * y, rtol=2e-13, atol=2e-13)  # two bounds of float64


@given(st.data())
def test_values_of_five_kinds_in_any_order(data):
    # Few distinct values, many constant channels: variance 0, ties, exact zeros.
    shape = data.draw(shapes(smallest=2))
    picks = np.random.default_rng(data.draw(st.integers(0, 1000))).integers(0, 5, shape)
    keep = data.draw(st.integers(1, 5))
    x = FIVE[picks % keep].astype(data.draw(dtypes))
    checks.check_both(x, *inputs.parameters(shape[1], x.dtype)[:2])
