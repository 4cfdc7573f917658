"""The SIMD vocabulary, lane by lane against NumPy; and whole results under other processors' instruction sets."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit, types

from fastbn.kernels.cpu import simd
from fastbn.kernels.cpu.simd import LANES, Pointer

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays come from ml_dtypes")

DTYPES = {
    "float32": (np.dtype(np.float32), types.float32),
    "float64": (np.dtype(np.float64), types.float64),
    "float16": (np.dtype(np.float16), types.float16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), simd.bfloat16),
}
I64, F64 = types.int64, types.float64


def compiled(function, *signature):
    return njit(nogil=True, error_model="numpy")(function).compile(signature)


def pad(values, dtype):
    """LANES values, with guards around them that no operation may touch."""
    a = np.full(3 * LANES, 77, dtype)
    a[LANES : 2 * LANES] = np.asarray(values).astype(dtype)
    return a


def special(dtype):
    """Zeros, subnormals, extremes, halfway cases, NaN and infinities."""
    info = ml_dtypes.finfo(dtype)
    tiny, least = float(info.tiny), float(info.smallest_subnormal)
    halfway = 1 + float(info.eps) / 2
    return [0.0, -0.0, 1.0, -1.5, tiny, least, -least, tiny / 2, float(info.max), float(info.min), halfway, 1 + 3 * float(info.eps) / 2]


@pytest.mark.parametrize("name", DTYPES)
def test_load_and_store_keep_every_value(name):
    dtype, element = DTYPES[name]

    def copy(x, y, i):
        simd.store(y, i, simd.load(x, i))

    run = compiled(copy, Pointer(element), Pointer(element), I64)
    x, y = pad([*special(dtype), np.nan, np.inf, -np.inf, 3.0], dtype), np.full(3 * LANES, 55, dtype)
    run(x, y, LANES)
    middle = slice(LANES, 2 * LANES)
    np.testing.assert_array_equal(y[middle].astype(np.float64), x[middle].astype(np.float64))
    assert np.all(np.signbit(y[middle][:12]) == np.signbit(x[middle][:12]))  # -0.0 too
    assert np.all(y[:LANES] == 55)
    assert np.all(y[2 * LANES :] == 55)


@pytest.mark.parametrize("name", DTYPES)
def test_store_rounds_to_nearest_even(name):
    dtype, element = DTYPES[name]

    def scale(x, y, factor):
        simd.store(y, 0, simd.load(x, 0) * simd.splat(factor))

    run = compiled(scale, Pointer(types.float64), Pointer(element), F64)
    rng = np.random.default_rng(0)
    for factor in (1.0, 1e-6, 1e-30, 1e3, 1e30):
        x = rng.standard_normal(LANES)
        y = np.empty(LANES, dtype)
        run(x, y, factor)
        # narrow dtypes are reached through float32, as NumPy's own cast of a float32 array
        exact = (x * factor).astype(np.float32) if dtype.itemsize == 2 else x * factor
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y.astype(np.float64), exact.astype(dtype).astype(np.float64))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", range(LANES + 1))
def test_masked_load_and_store_touch_n_values(name, n):
    dtype, element = DTYPES[name]

    def copy(x, y, z, i, n):
        v = simd.load_masked(x, i, n)
        simd.store(z, 0, v)
        simd.store_masked(y, i, v, n)

    if name not in _copies:
        _copies[name] = compiled(copy, Pointer(element), Pointer(element), Pointer(types.float64), I64, I64)
    x, y, lanes = pad(range(1, LANES + 1), dtype), np.full(3 * LANES, 55, dtype), np.empty(LANES)
    _copies[name](x, y, lanes, LANES, n)
    np.testing.assert_array_equal(lanes, [*range(1, n + 1), *[0] * (LANES - n)])
    np.testing.assert_array_equal(y.astype(np.float64), [*[55] * LANES, *range(1, n + 1), *[55] * (2 * LANES - n)])


_copies: dict = {}


def test_arithmetic_is_lane_by_lane():
    def every(a, b, out):
        u, v = simd.load(a, 0), simd.load(b, 0)
        simd.store(out, 0, u + v)
        simd.store(out, 16, u - v)
        simd.store(out, 32, u * v)
        simd.store(out, 48, simd.first_lanes(u, 5))
        bits = simd.bits_above_zero(u)
        simd.store(out, 64, simd.where_bits(v, bits))
        return simd.sum_lanes(u), bits

    double = Pointer(types.float64)
    rng = np.random.default_rng(1)
    a, b, out = rng.standard_normal(LANES), rng.standard_normal(LANES), np.empty((5, LANES))
    a[3], a[4] = 0.0, np.nan
    total, bits = compiled(every, double, double, double)(a, b, out)
    above = ~(a <= 0)  # what passes a gradient: NaN does
    np.testing.assert_array_equal(out[0], a + b)
    np.testing.assert_array_equal(out[1], a - b)
    np.testing.assert_array_equal(out[2], a * b)
    np.testing.assert_array_equal(out[3], [*a[:5], *[0] * 11])
    np.testing.assert_array_equal(out[4], np.where(above, b, 0))
    assert bits == sum(1 << k for k in range(LANES) if above[k])
    assert np.isnan(total)


LANES64 = pytest.mark.parametrize("lanes64", [None, True], ids=["float32 lanes", "float64 lanes"])


def lanes64_type(lanes64):
    return types.none if lanes64 is None else types.boolean


KINDS = [(name, lanes64) for name in DTYPES for lanes64 in (None, True) if (name, lanes64) != ("float64", None)]


@pytest.mark.parametrize(("name", "lanes64"), KINDS)
def test_lanes_of_either_kind(name, lanes64):
    """What is read into float32 lanes or float64 lanes, computed there and stored, in memory of every dtype."""
    dtype, element = DTYPES[name]

    def twice_plus(x, y, z, lanes64, n):
        v = simd.read(x, 0, lanes64)
        simd.store(y, 0, v + v * v)
        some = simd.first_lanes(simd.read_masked(x, 0, n, lanes64), n - 1)
        simd.store(z, 0, simd.where_bits(some, simd.bits_above_zero(some)))

    run = compiled(twice_plus, Pointer(element), Pointer(types.float64), Pointer(element), lanes64_type(lanes64), I64)
    rng = np.random.default_rng(4)
    x = rng.standard_normal(LANES).astype(dtype)
    y, z = np.empty(LANES), np.empty(LANES, dtype)
    run(x, y, z, lanes64, 9)
    lane = np.float32 if lanes64 is None else np.float64
    v = x.astype(lane)
    np.testing.assert_allclose(y, (v + v * v).astype(np.float64), rtol=4 * np.finfo(lane).eps)
    if lanes64 is None or name == "float32":  # squares of the halves are float32 numbers anyway
        assert (y == y.astype(np.float32)).all() == (lanes64 is None)
    expected = np.where((np.arange(LANES) < 8) & (v > 0), v, 0).astype(dtype)
    np.testing.assert_array_equal(z.astype(np.float64), expected.astype(np.float64))


@LANES64
def test_constants_in_either_kind_of_lanes(lanes64):
    """Lanes rounded to float32, workspace read as float32, and a bias that makes up for the mean's rounding; or all as it was."""

    def constants(a, beta, mean, anchor, scale, out, lanes64):
        memory = simd.lanes_memory(a, lanes64)
        simd.store(memory, 0, simd.rounded(simd.load(a, 0), lanes64))
        simd.store(out, 0, simd.read(memory, 0, lanes64))
        simd.store(out, 16, simd.bias(simd.load(beta, 0), simd.load(mean, 0), simd.load(anchor, 0), simd.load(scale, 0), lanes64))

    double = Pointer(types.float64)
    rng = np.random.default_rng(5)
    a, beta, mean, anchor, scale = rng.standard_normal((5, LANES))
    out, before = np.empty((2, LANES)), a.copy()
    compiled(constants, *[double] * 6, lanes64_type(lanes64))(a, beta, mean, anchor, scale, out, lanes64)
    m = anchor.astype(np.float32)
    np.testing.assert_array_equal(out[0], before.astype(np.float32) if lanes64 is None else before)
    np.testing.assert_allclose(out[1], beta - (mean - m) * scale if lanes64 is None else beta, rtol=1e-15)


@pytest.mark.parametrize("name", DTYPES)
def test_centring_and_its_other_half(name):
    """slope * deviation_if_float64(v) + constant_term(c) is slope * (v - mean - low) + c, for every dtype of v."""
    dtype, element = DTYPES[name]

    def line(x, mean, low, slope, c, out):
        v = simd.deviation_if_float64(x, simd.load(x, 0), simd.load(mean, 0), simd.load(low, 0))
        m, s = simd.load(mean, 0), simd.load(slope, 0)
        simd.store(out, 0, s * v + simd.constant_term(x, simd.load(c, 0), s, m, None))

    double = Pointer(types.float64)
    rng = np.random.default_rng(6)
    x = (1000 + rng.standard_normal(LANES)).astype(dtype)
    mean, low, slope, c = rng.standard_normal((4, LANES))
    mean += 1000
    low *= 1e-14 if name == "float64" else 0
    out = np.empty(LANES)
    compiled(line, Pointer(element), double, double, double, double, double)(x, mean, low, slope, c, out)
    exact = slope * (x.astype(np.longdouble) - mean - low) + c
    np.testing.assert_allclose(out, exact.astype(np.float64), rtol=0, atol=1e-12 if name != "float64" else 2e-14)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_centring_in_float32_lanes(name):
    """There `deviation_if_float64` subtracts the mean in float32, and `constant_term` puts right what that leaves out."""
    dtype, element = DTYPES[name]

    def line(x, mean, slope, c, out, dark):
        m = simd.rounded(simd.load(mean, 0), None)
        v = simd.deviation_if_float64(x, simd.load_like(x, 0, m), m, m)
        simd.store(out, 0, v)
        simd.store(dark, 0, simd.constant_term(x, simd.load(c, 0), simd.load(slope, 0), simd.load(mean, 0), True))

    double = Pointer(types.float64)
    rng = np.random.default_rng(6)
    x = (1000 + rng.standard_normal(LANES)).astype(dtype)
    mean, slope, c = rng.standard_normal((3, LANES))
    mean += 1000
    out, constant = np.empty((2, LANES))
    compiled(line, Pointer(element), double, double, double, double, double)(x, mean, slope, c, out, constant)
    near = mean.astype(np.float32)
    np.testing.assert_array_equal(out, x.astype(np.float32) - near)
    np.testing.assert_allclose(slope * out + constant, slope * (x.astype(np.float64) - mean) + c, rtol=0, atol=1e-12)


@LANES64
@pytest.mark.parametrize("name", DTYPES)
def test_loads_in_the_lanes_of_another_vector(name, lanes64):
    dtype, element = DTYPES[name]
    if (name, lanes64) == ("float64", None):
        pytest.skip("float64 is never read into float32 lanes")

    def use(a, zeros, out, n, lanes64):
        like = simd.rounded(simd.load(zeros, 0), lanes64)
        simd.store(out, 0, simd.load_like(a, 1, like))
        simd.store(out, 16, simd.load_masked_like(a, 0, n, like))

    double = Pointer(types.float64)
    a = np.random.default_rng(1).standard_normal(LANES + 1).astype(dtype)
    out = np.empty((2, LANES))
    compiled(use, Pointer(element), double, double, I64, lanes64_type(lanes64))(a, np.zeros(LANES), out, 3, lanes64)
    np.testing.assert_array_equal(out[0], a[1:].astype(np.float64))
    np.testing.assert_array_equal(out[1], np.where(np.arange(LANES) < 3, a[:-1].astype(np.float64), 0))


@pytest.mark.parametrize("lanes32", [None, True], ids=["float64 sums", "float32 sums"])
def test_parts_of_sums(lanes32):
    """In float32 lanes a part starts from 0, ends after 14 vectors and is added; in float64 lanes it is the sum itself."""

    def use(total, values, narrow, out, scalars, lanes32):
        lanes = simd.lanes64_unless(lanes32)
        v = simd.rounded(simd.load(values, 0), lanes)
        part = simd.float32_sum(simd.load(total, 0), v)
        part += v
        simd.store(out, 0, part)
        simd.store(out, 16, simd.float64_sum(simd.load(total, 0), part))
        most = simd.largest(simd.rounded(simd.splat(2.0), lanes), v)
        simd.store(out, 32, most)
        simd.store(out, 48, simd.largest_if_float32(values, most, simd.rounded(simd.splat(-7.0), lanes)))
        simd.store(out, 64, simd.largest_if_float32(narrow, most, simd.rounded(simd.splat(-7.0), lanes)))
        simd.put(scalars, 0, simd.largest_lane(most))
        simd.put(scalars, 1, simd.sum_end(0, v) + 0.0)
        simd.put(scalars, 2, simd.sum_end(100, v) + 0.0)

    double = Pointer(types.float64)
    total, values = np.random.default_rng(2).standard_normal((2, LANES))
    values[3], values[5] = np.nan, -100
    out, scalars, narrow = np.empty((5, LANES)), np.empty(3), Pointer(types.float32)
    compiled(use, double, double, narrow, double, double, lanes64_type(lanes32))(total, values, np.zeros(LANES), out, scalars, lanes32)
    if lanes32:
        values = values.astype(np.float32)
        np.testing.assert_array_equal(out[0], values)
        np.testing.assert_array_equal(out[1], total + values)
        np.testing.assert_array_equal(out[2], np.fmax(2, np.abs(values)))
        np.testing.assert_array_equal(out[3], out[2])  # of float64 values nobody asks
        np.testing.assert_array_equal(out[4], np.fmax(7, np.abs(values)))
        np.testing.assert_array_equal(scalars, [100, 224, 324])
    else:
        np.testing.assert_array_equal(out[0], total + values)
        np.testing.assert_array_equal(out[1], total + values)
        np.testing.assert_array_equal(out[2:], 2)
        assert (scalars[1:] > 1e18).all()


def test_weights_of_whole_rows():
    """A pair (pointer, stride) stands for lanes full of one weight wherever a triple stands for a pointer."""

    def use(pair, triple, out, r):
        w = simd.plane(pair, r, 5)
        simd.store(out, 0, simd.load(w, 99))
        simd.store(out, 16, simd.load_masked(simd.row(pair, r, 7), 99, 3))
        return simd.by_row(pair), simd.by_row(triple), simd.by_row(None), simd.get(w, 99)

    double = Pointer(types.float64)
    pair, triple = types.Tuple((double, I64)), types.Tuple((double, I64, I64))
    a, out = np.arange(1.0, 10), np.empty((2, LANES))
    assert compiled(use, pair, triple, double, I64)((a, 2), (a, 1, 1), out, 3) == (True, False, False, 7.0)
    np.testing.assert_array_equal(out, [[7] * LANES, [7] * 3 + [0] * 13])


def test_sum_is_a_fixed_tree():
    run = compiled(lambda a: simd.sum_lanes(simd.load(a, 0)), Pointer(types.float64))
    a = np.random.default_rng(2).standard_normal(LANES)
    tree = a
    while len(tree) > 1:
        half = len(tree) // 2
        tree = tree[:half] + tree[half:]
    assert run(a) == tree[0]


def test_bits_can_be_read_from_any_position():
    run = compiled(lambda p, bit: simd.get_bits(p, bit), Pointer(types.uint16), I64)
    words = np.random.default_rng(3).integers(0, 1 << 16, 5, dtype=np.uint16)
    whole = sum(int(w) << (16 * k) for k, w in enumerate(words))
    for bit in range(64):
        assert run(words, bit) == whole >> bit & 0xFFFF


@pytest.mark.parametrize("name", DTYPES)
def test_streamed_vectors_arrive(name):
    dtype, element = DTYPES[name]

    def copy(x, y, n):
        head = simd.lanes_to_boundary(y)
        for j in range(head, n - LANES + 1, LANES):
            simd.stream(y, j, simd.load(x, j))
        simd.fence()
        return head

    run = compiled(copy, Pointer(element), Pointer(element), I64)
    x = np.arange(200).astype(dtype)
    for offset in range(1, 20):
        y = np.zeros(300, dtype)[offset : offset + 200]
        head = run(x, y, 200)
        assert (y.ctypes.data + head * dtype.itemsize) % min(64, LANES * dtype.itemsize) == 0
        stop = head + (200 - head) // LANES * LANES
        np.testing.assert_array_equal(y[head:stop].astype(float), x[head:stop].astype(float))
        assert not y[:head].any()
        assert not y[stop:].any()


def test_absent_pointers_give_none():
    def nothing(p):
        return simd.load(p, 0) is None and simd.moved(p, 3) is None and simd.load_masked(p, 0, 5) is None

    assert compiled(nothing, types.none)(None)


def test_a_pointer_is_the_address_of_the_first_element():
    """Pointers are read from NumPy's object, at DATA_OFFSET: this fails if an interpreter or a NumPy lays it out differently."""
    run = compiled(lambda p: simd.get(p, 0), Pointer(types.float32))
    a = np.arange(10, dtype=np.float32)
    assert [run(a[k:]) for k in range(10)] == a.tolist()
    assert run(a[::-1]) == 9


def test_a_loop_of_sums_is_vectorised():
    """The accumulators of an inner loop stay in registers, and a * b + c is one instruction where the CPU has it."""

    def moments(x, n, out):
        s = simd.splat(0.0)
        q = simd.splat(0.0)
        for j in range(0, n, LANES):
            e = simd.load(x, j)
            s += e
            q += e * e
        simd.store(out, 0, s)
        simd.store(out, LANES, q)

    dispatcher = njit(nogil=True, error_model="numpy")(moments)
    dispatcher.compile((Pointer(types.float32), I64, Pointer(types.float64)))
    (assembly,) = dispatcher.inspect_asm().values()
    features = dispatcher.targetctx.codegen().magic_tuple()[2]
    if "+fma" not in features:
        pytest.skip("this processor has no fused multiply-add")
    assert "vfmadd" in assembly
    register = "zmm" if "+avx512f" in features else "ymm"
    assert any("vfmadd" in line and register in line for line in assembly.splitlines())


TARGETS = {"SSE2": ("x86-64", ""), "AVX2": ("haswell", "+avx,+avx2,+fma,+f16c")}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86-64 instruction sets")
@pytest.mark.parametrize("target", TARGETS)
def test_other_instruction_sets_agree(target, tmp_path):
    cpu, features = TARGETS[target]
    script, file = Path(__file__).with_name("cpu_targets.py"), tmp_path / "other.npz"
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    subprocess.run([sys.executable, str(script), str(file)], env=environment, check=True, timeout=300)
    import cpu_targets

    here = cpu_targets.results()
    with np.load(file) as there:
        assert set(there) == set(here)
        for name, value in here.items():
            # Without FMA a product is rounded before the sum: one rounding of the dtype more, seen through sums of a few hundred.
            bound = 1e-2 if "float16" in name else 1e-6 if "float32" in name else 1e-12
            assert np.abs(there[name] - value).max() <= bound * max(1, np.abs(value).max()), name
