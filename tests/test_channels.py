"""What is computed once a channel: formulas on lanes give the bits that they give of scalars, and workspace is nobody else's."""

import inspect
import itertools

import inputs
import numpy as np
import pytest
import subprocesses
from numba import njit, types

import fastbn
from fastbn.cpu import backend
from fastbn.kernels import formulas
from fastbn.kernels.cpu import channels
from fastbn.kernels.cpu.simd import LANES, Pointer, exact_lanes, how_many, put_lanes

NASTY = [0.0, -0.0, 5e-324, 2.0**-126, 0.3, 1.0, -2.5, 3.0, 1e6, 2.0**103, 1e40, 1e200, np.inf, -np.inf, np.nan]


def on_lanes(formula):
    """A formula of four numbers, whose first result is kept, compiled for lanes: f(a, b, c, d, out, n)."""

    def run(a, b, c, d, out, n):
        for i in range(0, n, LANES):
            k = min(LANES, n - i)
            put_lanes(out, i, formula(exact_lanes(a, i, k), exact_lanes(b, i, k), exact_lanes(c, i, k), exact_lanes(d, i, k)), k)

    pointer = Pointer(types.float64)
    return njit(nogil=True, error_model="numpy")(run).compile((pointer,) * 5 + (types.int64,))


def merge_mean(mean_a, m2_a, mean_b, m2_b):
    return channels.merge(3.0, mean_a, m2_a, 5.0, mean_b, m2_b)[1]


def merge_m2(mean_a, m2_a, mean_b, m2_b):
    return channels.merge(3.0, mean_a, m2_a, 5.0, mean_b, m2_b)[2]


def low_word(a, b, c, d):
    return channels.exact_sum(a * c, b - d)[1]


def slope(gamma, invstd, sum_dy, sum_dy_xmu):
    return channels.backward_coefficients(gamma, invstd, sum_dy, sum_dy_xmu, 7.0)[1]


def average(old, new, a, b):
    return channels.running_average(old, new, 0.1) + a / b


SCALAR = {name: getattr(formulas, name) for name in ("merge", "exact_sum", "backward_coefficients", "running_average", "float32_anchor")}


FORMULAS = [merge_mean, merge_m2, low_word, slope, average, channels.float32_anchor]


@pytest.mark.parametrize("formula", FORMULAS, ids=["mean", "m2", "low", "slope", "average", "anchor"])
def test_formulas_on_lanes_give_the_bits_of_scalars(formula):
    rng = np.random.default_rng(0)
    cases = np.array([*itertools.product(NASTY, repeat=4)])
    ordinary = rng.standard_normal((20005, 4)) * 10.0 ** rng.integers(-9, 9, (20005, 4))
    cases = np.concatenate([cases[rng.permutation(len(cases))[:20000]], ordinary])
    a, b, c, d = (np.ascontiguousarray(column) for column in cases.T)
    found = np.empty(len(cases))
    compiled = formula if formula is channels.float32_anchor else channels.inline(formula)
    on_lanes(compiled)(a, b, c, d, found, len(cases))
    # The same source with the plain functions, on NumPy's scalars: one operation after the other, none of them contracted.
    plain = formulas.float32_anchor if formula is channels.float32_anchor else formula
    if plain is formula:
        namespace = {"channels": type("Plain", (), {name: staticmethod(f) for name, f in SCALAR.items()})}
        exec(inspect.getsource(formula), namespace)
        plain = namespace[formula.__name__]
    with np.errstate(all="ignore"):
        expected = np.array([plain(*(np.float64(v) for v in case)) for case in cases])
    both_nan = np.isnan(found) & np.isnan(expected)
    np.testing.assert_array_equal(np.where(both_nan, 0, found.view(np.int64)), np.where(both_nan, 0, expected.view(np.int64)))


@pytest.mark.parametrize("n", [1, 3, 15, 16])
def test_how_many_counts_the_first_lanes_alone(n):
    def count(p, n):
        return how_many(exact_lanes(p, 0, n) <= 0.0, n)  # lanes behind are 0

    compiled = njit(nogil=True)(count).compile((Pointer(types.float64), types.int64))
    p = np.ones(LANES)
    assert compiled(p, n) == 0
    p[: n // 2] = -1.0
    assert compiled(p, n) == n // 2


def results(x, dy, weight):
    """All that the functions give for one input."""
    mean, var = np.zeros(x.shape[1], x.dtype), np.ones(x.shape[1], x.dtype)
    y, ctx = fastbn.batch_norm_forward(x, None, None, mean, var, sample_weight=weight)
    sums = fastbn.batch_norm_backward_reduce(dy, ctx)
    total = fastbn.moments(x, sample_weight=weight)
    gradients = fastbn.batch_norm_backward(dy, ctx)[0], *sums, fastbn.batch_norm_backward_apply(dy, ctx, *sums)
    inference = fastbn.batch_norm_inference(x, None, None, mean, var)
    return y, mean, var, ctx.mean, ctx.invstd, *gradients, total.mean, total.m2, inference


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(16, 6), (8, 40, 3), (4, 3, 200)], ids=str)
def test_a_call_within_a_call_shares_no_workspace(shape, weighted, monkeypatch):
    """A signal handler, or a finaliser, may call fastbn whenever Python code runs: after the workspace was taken, too."""
    x, dy, other = (inputs.normal(shape, np.float64, seed=seed) for seed in range(3))
    weight = np.random.default_rng(3).uniform(0.5, 1, shape[:1]) if weighted else None
    expected = results(x, dy, weight)
    own, run, inside = backend.workspace, backend.run, []

    def then(function):
        def wrapped(*args):
            result = function(*args)
            if not inside:
                inside.append(True)
                results(other * 7, dy, weight)
                inside.clear()
            return result

        return wrapped

    monkeypatch.setattr(backend, "workspace", then(own))
    monkeypatch.setattr(backend, "run", then(run))
    for a, b in zip(results(x, dy, weight), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_variants_of_one_signature_have_files_of_their_own(tmp_path):
    """Weights of rows and weights of positions are both addresses of float64: what is on the disk of one is not taken for the other."""
    code = """
import numpy as np, fastbn, sys
rng = np.random.default_rng(0)
x, weight = rng.standard_normal((16, 6, 2)), rng.uniform(0.5, 1, {})
mean = fastbn.batch_norm_forward(x, sample_weight=weight)[1].mean
w = np.broadcast_to(weight.reshape(16, 1, -1), x.shape)
print(bool(abs(mean - (w * x).sum((0, 2)) / w.sum((0, 2))).max() < 1e-12))
"""
    for shape in ((16,), (16, 2), (16,)):
        env = {"FASTBN_CACHE_DIR": str(tmp_path)}
        assert subprocesses.run(code.format(shape), env=env).strip() == "True"
