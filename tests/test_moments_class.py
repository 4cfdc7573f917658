"""`Moments`: merging, variance, value semantics, and what its constructor refuses."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from fastbn.statistics import Moments, namespace_on


def moments_of(x):
    """Moments of the rows of x, (n, C), in two passes over longdouble, shifted by the first row: the definition."""
    if not len(x):
        return Moments.empty(x.shape[1])
    shifted = x.astype(np.longdouble) - x[0]
    shifted_mean = shifted.mean(axis=0)
    hi = (x[0] + shifted_mean).astype(np.float64)
    lo = ((x[0] - hi) + shifted_mean).astype(np.float64)
    return Moments(len(x), hi, ((shifted - shifted_mean) ** 2).sum(axis=0).astype(np.float64), lo)


def test_merge_equals_the_whole():
    x = np.random.default_rng(0).normal([0.0, 5.0, -3.0], [1.0, 0.1, 20.0], (1000, 3))
    parts = [x[:1], x[1:1], x[1:337], x[337:340], x[340:]]  # a single row, an empty part, unequal sizes
    merged = sum(moments_of(p) for p in parts)
    assert merged.count == 1000.0
    # A handful of float64 roundings, each relative to a standard deviation or a variance.
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=0, atol=1e-14 * 20)
    np.testing.assert_allclose(merged.var(), x.var(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.var(ddof=1), x.var(axis=0, ddof=1), rtol=1e-14)


def test_merge_by_hand():
    # 0, 2 and 4: mean 2, squares 4 + 0 + 4. Every number is exact in binary, so the result must be.
    merged = Moments(2, [1.0], [2.0]) + Moments(1, [4.0], [0.0])
    assert (merged.count, merged.mean.tolist(), merged.m2.tolist()) == (3.0, [2.0], [8.0])


def test_merge_of_weights_below_one():
    # Values 0 and 8 with weights 1/4 and 3/4: mean 6, m2 = 1/4 * 36 + 3/4 * 4 = 12.
    merged = Moments(0.25, [0.0], [0.0]) + Moments(0.75, [8.0], [0.0])
    assert (merged.count, merged.mean.tolist(), merged.m2.tolist()) == (1.0, [6.0], [12.0])


def test_low_word_of_the_mean_survives_many_merges():
    # A mean of 1e6 standard deviations: one word of float64 holds it to 1e6 * 1e-16 = 1e-10 deviations, while
    # normalised float64 values may err by 1e-13.
    x = np.random.default_rng(1).normal(1e6, 1.0, (4096, 2))
    merged = sum(moments_of(part) for part in np.array_split(x, 113))
    deviations = x - 1e6  # exact: the values are within a factor of two of 1e6
    exact = [math.fsum(column) / len(x) for column in deviations.T]
    error = (merged.mean - 1e6) - exact + merged.mean_lo
    assert np.abs(error).max() < 1e-15
    assert np.abs(merged.mean_lo).max() > 1e-12  # what one word would have lost
    np.testing.assert_allclose(merged.var(), deviations.var(axis=0), rtol=1e-13)


def test_order_does_not_matter_beyond_rounding():
    a, b = moments_of(np.array([[1.0], [2.5]])), moments_of(np.array([[1e8], [3.0], [7.0]]))
    np.testing.assert_allclose((a + b).mean, (b + a).mean, rtol=1e-15)
    np.testing.assert_allclose((a + b).m2, (b + a).m2, rtol=1e-15)


def test_an_outlier_first_does_not_cost_accuracy():
    # Moving from the single value to the mean of the many would round a step of 1e5 deviations.
    value, mean, n = 1e5 + 1 / 3, 0.1, 999_999
    exact = (Fraction(value) + n * Fraction(mean)) / (n + 1)
    for merged in (Moments(1, [value], [0]) + Moments(n, [mean], [n]), Moments(n, [mean], [n]) + Moments(1, [value], [0])):
        error = Fraction(merged.mean[0]) + Fraction(merged.mean_lo[0]) - exact
        assert abs(error) < 1e-16  # the step is 0.1, rounded a few times; the other way round it is 1e5


def test_empty_is_neutral():
    m = moments_of(np.array([[1.0, -2.0], [4.0, 0.5]]))
    empty = Moments.empty(2)
    assert m + empty == empty + m == 0 + m == m
    assert empty + empty == empty == sum([empty, empty])
    assert empty.count == 0
    assert empty.mean.tolist() == empty.m2.tolist() == [0.0, 0.0]
    assert Moments.empty(0).mean.shape == (0,)


def test_a_sum_is_a_new_object():
    m, empty = Moments(2, [1.0], [2.0], [1e-20]), Moments.empty(1)
    for total in (empty + m, m + empty, 0 + m, sum([m])):
        assert total == m
        assert total is not m
        assert not any(np.shares_memory(getattr(total, name), getattr(m, name)) for name in ("mean", "m2", "mean_lo"))
    assert empty + empty is not empty


@pytest.mark.parametrize("count", [3, 3.0, np.float32(3), np.int8(3), Fraction(3), np.array(3.0), np.array(3)])
def test_any_real_number_is_a_count(count):
    assert type(Moments(count, [0.0], [0.0]).count) is float


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (-1, ValueError, "num_features is -1; .* must be >= 0"),
        (2.0, TypeError, "num_features is 2.0 of type float; pass a whole number"),
        (True, TypeError, "num_features is True of type bool"),
        ((2, 3), TypeError, r"num_features is \(2, 3\) of type tuple"),
    ],
)
def test_empty_refuses(channels, error, message):
    with pytest.raises(error, match=message):
        Moments.empty(channels)


def test_too_few_values_have_no_variance_and_no_warning():
    one = Moments(1, [3.0], [0.0])
    assert one.var().tolist() == [0.0]
    assert np.isnan(one.var(ddof=1)).all()
    assert np.isnan(Moments.empty(3).var()).all()
    assert np.isnan(Moments(0.5, [3.0], [1.0]).var(ddof=1)).all()  # count - ddof is negative


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stay_in_their_channel_without_warning(bad):
    sick = Moments(2, [bad, 1.0], [math.nan, 2.0])
    healthy = Moments(2, [0.0, 3.0], [2.0, 2.0])
    for merged in (sick + healthy, healthy + sick, sick + sick):  # inf - inf among them
        assert not np.isfinite(merged.mean[0])
        assert not np.isfinite(merged.var()[0])
        assert np.isfinite([merged.mean[1], merged.m2[1], merged.mean_lo[1]]).all()
    assert (sick + healthy).mean[1] == 2.0
    assert (sick + healthy).m2[1] == 8.0  # 0, 2, 2, 4


def test_merging_leaves_its_operands_alone():
    a, b = Moments(2, [1.0], [2.0]), Moments(3, [4.0], [5.0])
    before = pickle.dumps((a, b))
    a + b
    assert pickle.dumps((a, b)) == before


def test_constructor_copies_and_converts():
    mean, m2 = np.array([1.0, 2.0]), np.array([3.0, 4.0], dtype=np.float32)
    m = Moments(np.int64(5), mean, m2)
    mean[0] = m2[0] = 99
    assert type(m.count) is float
    assert m.mean.dtype == m.m2.dtype == m.mean_lo.dtype == np.float64
    assert (m.mean.tolist(), m.m2.tolist(), m.mean_lo.tolist()) == ([1.0, 2.0], [3.0, 4.0], [0.0, 0.0])


def test_equality_pickle_copy_repr():
    m = Moments(3, [1.0, math.nan], [2.0, math.nan], [1e-20, 0.0])
    assert pickle.loads(pickle.dumps(m)) == m == copy.deepcopy(m)
    assert pickle.loads(pickle.dumps(m)).mean_lo[0] == 1e-20
    others = [
        Moments(4, m.mean, m.m2, m.mean_lo),
        Moments(3, m.mean + 1, m.m2, m.mean_lo),
        Moments(3, m.mean, m.m2 + 1, m.mean_lo),
        Moments(3, m.mean, m.m2),
        Moments(3, [1.0], [2.0]),
        "Moments",
    ]
    assert all(m != other for other in others)
    assert repr(Moments(3, [1.0], [2.0])) == "Moments(count=3, mean=array([1.]), m2=array([2.]))"
    assert repr(m) == "Moments(count=3, mean=array([ 1., nan]), m2=array([ 2., nan]), mean_lo=array([1.e-20, 0.e+00]))"
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)


def test_fields_are_frozen():
    with pytest.raises(AttributeError):
        Moments.empty(1).count = 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [0.0], [0.0]), ValueError, "count is -1.0"),
        ((math.nan, [0.0], [0.0]), ValueError, "count is nan"),
        ((10**400, [0.0], [0.0]), ValueError, "count is beyond the range of float64"),
        ((None, [0.0], [0.0]), TypeError, "count is None of type NoneType; pass a real number"),
        (("3", [0.0], [0.0]), TypeError, "count is '3' of type str"),
        ((True, [0.0], [0.0]), TypeError, "count is True of type bool"),
        (([3.0], [0.0], [0.0]), TypeError, "count is .* of type list"),
        ((np.array([3.0]), [0.0], [0.0]), TypeError, "count is array"),
        ((2, [0.0, 0.0], [1.0, -1e-30]), ValueError, "m2 has negative values .smallest: -1e-30"),
        ((2, np.ma.array([0.0]), [0.0]), TypeError, "mean is a masked array"),
        ((math.inf, [0.0], [0.0]), ValueError, "count is inf"),
        ((1, [[0.0]], [[0.0]]), ValueError, r"mean has shape \(1, 1\)"),
        ((1, 0.0, 0.0), ValueError, r"mean has shape \(\)"),
        ((1, [0.0, 1.0], [0.0]), ValueError, r"m2 has shape \(1,\), mean has \(2,\)"),
        ((1, [0.0], [0.0], [0.0, 0.0]), ValueError, "mean_lo has shape"),
        ((1, [1j], [0.0]), TypeError, "mean has dtype complex128"),
        ((1, [0.0], ["a"]), TypeError, "m2 has dtype"),
        ((1, [True], [0.0]), TypeError, "mean has dtype bool"),
    ],
)
def test_constructor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Moments(*arguments)


def test_merge_refuses_other_channels_and_other_types():
    m = Moments(1, [0.0, 1.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="2 channels with Moments of 3 channels"):
        m + Moments.empty(3)
    for other in (1, 1.5, np.zeros(2, int), np.float64(0), None):
        with pytest.raises(TypeError):
            m + other
        with pytest.raises(TypeError):
            other + m


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", None, 0])
def test_unknown_device(device):
    with pytest.raises(ValueError, match="'cpu', 'cuda' or 'cuda:N'"):
        namespace_on(device)
