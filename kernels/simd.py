"""A small SIMD vocabulary for Numba: sixteen float64 lanes, and pointers to memory of any floating dtype.

Every kernel computes in one type, ``f64x16``. Memory holds float32, float64, float16 or bfloat16; `load` widens to float64 in
registers and `store` rounds once on the way out, so a kernel is written once for all dtypes and never rounds in between.

===============================  ==================================================================
``load(p, i)``                   lanes p[i:i+16]
``load_some(p, i, n)``           lanes p[i:i+n], the others 0; touches no other memory
``store``, ``store_some``        the reverse, rounding once to the memory's dtype
``stream(p, i, v)``              store around the cache; p + i must be `lanes_to_boundary` aligned
``fence()``                      after streaming, before another thread may read
``splat(s)``                     sixteen copies of a scalar
``a + b``, ``a - b``, ``a * b``  lane by lane; a * b + c contracts to one FMA where the CPU has it
``smaller``, ``larger``          lane-wise minimum and maximum
``sum_lanes(v)``                 sum in a fixed tree: the same bits everywhere
``centre(p, v, mean, low)``      v - mean, and for p in float64 also - low: the mean as two words
``keep(v, n)``                   lanes 0..n-1 of v, the others 0
``bits_above_zero(v)``           int64, bit k set unless v[k] <= 0 (set for NaN)
``only(v, bits)``                v where the bit is set, 0 elsewhere
===============================  ==================================================================

A tensor is a tuple (pointer, stride, stride); optional ones are None, and so is whatever is loaded from None.

Why like this, measured on a 2-core AVX-512 machine (32x64x56x56 float32 training forward):

- LLVM vectors as a Numba type instead of auto-vectorised loops: a loop with two accumulators and a store does not vectorise
  reliably without broad fastmath, and a loop with a non-temporal store never does.
- Sixteen lanes for every dtype: two AVX-512 registers of float64, four of AVX2, eight of SSE2 or NEON; LLVM splits them by itself.
- ``fmul`` and ``fadd`` with the ``contract`` flag, not ``llvm.fma``, which is a library call per lane on a CPU without FMA.
- Heads and tails are vectors too, loaded and stored under a mask, so that one formula serves all elements: the bits of y do not
  depend on where a vector happens to start.
"""

import operator
from functools import wraps

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

__all__ = [
    "LANES",
    "Pointer",
    "Vector",
    "address",
    "bfloat16",
    "bits_above_zero",
    "centre",
    "channel_stride",
    "f64x16",
    "fence",
    "get",
    "get_bits",
    "keep",
    "lanes_to_boundary",
    "larger",
    "load",
    "load_some",
    "moved",
    "only",
    "pointer_of",
    "prefetch",
    "provided",
    "put",
    "put_bits",
    "row_stride",
    "smaller",
    "splat",
    "store",
    "store_some",
    "stream",
    "sum_lanes",
]

LANES = 16

I1, I16, I32, I64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def _vector_of(element):
    return ir.VectorType(element, LANES)


def _constant(element, value):
    """A vector constant with `value` in every lane."""
    return ir.Constant(_vector_of(element), [value] * LANES)


# ---------------------------------------------------------------------------------------------------------------- types


class Vector(types.Type):
    """Sixteen float64 in registers."""

    def __init__(self):
        super().__init__(name="f64x16")


class BFloat16(types.Type):
    """The upper half of a float32; exists in memory only."""

    bitwidth = 16

    def __init__(self):
        super().__init__(name="bfloat16")


class Pointer(types.Type):
    """The address of elements of `dtype`; from Python it arrives as a NumPy array, which is not checked in any way."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Pointer({dtype})")


f64x16 = Vector()
bfloat16 = BFloat16()

_ELEMENTS = {types.float32: F32, types.float64: F64, types.float16: F16, bfloat16: I16, types.uint16: I16}


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector_of(F64))


@register_model(BFloat16)
class BFloat16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I16)


@register_model(Pointer)
class PointerModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _ELEMENTS[fe_type.dtype].as_pointer())


# Where a NumPy array keeps its data pointer: first behind the object header (PyArrayObject_fields in NumPy's C API, unchanged since 1.0).
# Read there it costs a nanosecond; `array.ctypes.data` or `__array_interface__` cost half a microsecond each.
DATA_OFFSET = object.__basicsize__


@unbox(Pointer)
def unbox_pointer(typ, obj, c):
    field = c.builder.gep(c.builder.bitcast(obj, ir.IntType(8).as_pointer()), [ir.Constant(I64, DATA_OFFSET)], source_etype=ir.IntType(8))
    element = _ELEMENTS[typ.dtype].as_pointer()
    return NativeValue(c.builder.load(c.builder.bitcast(field, element.as_pointer()), typ=element))


# -------------------------------------------------------------------------------------------------- conversions in registers


def _has_f16c(context):
    return "+f16c" in context.codegen().magic_tuple()[2]


def _half_to_f32(builder, h):
    """float16 bits to float32 by integers, for CPUs without F16C: 2**112 rebiases the exponent and normalises subnormals."""
    wide = builder.zext(h, _vector_of(I32))
    sign = builder.shl(builder.and_(wide, _constant(I32, 0x8000)), _constant(I32, 16))
    shifted = builder.shl(builder.and_(wide, _constant(I32, 0x7FFF)), _constant(I32, 13))
    scaled = builder.fmul(builder.bitcast(shifted, _vector_of(F32)), _constant(F32, 2.0**112))
    special = builder.icmp_unsigned(">=", shifted, _constant(I32, 0x7C00 << 13))
    infinite = builder.or_(shifted, _constant(I32, 0x7F800000))
    magnitude = builder.select(special, infinite, builder.bitcast(scaled, _vector_of(I32)))
    return builder.bitcast(builder.or_(magnitude, sign), _vector_of(F32))


def _f32_to_half(builder, v):
    """float32 to float16 bits by integers, to nearest even, for CPUs without F16C."""
    bits = builder.bitcast(v, _vector_of(I32))
    sign = builder.and_(builder.lshr(bits, _constant(I32, 16)), _constant(I32, 0x8000))
    magnitude = builder.and_(bits, _constant(I32, 0x7FFFFFFF))
    # normal: rebias the exponent by -112 and round at bit 13
    odd = builder.and_(builder.lshr(magnitude, _constant(I32, 13)), _constant(I32, 1))
    rounded = builder.add(builder.add(magnitude, _constant(I32, (-112 << 23) % 2**32 + 0xFFF)), odd)
    normal = builder.lshr(rounded, _constant(I32, 13))
    # subnormal: adding 0.5 lets the float adder round at the right bit
    half = builder.fadd(builder.bitcast(magnitude, _vector_of(F32)), _constant(F32, 0.5))
    subnormal = builder.sub(builder.bitcast(half, _vector_of(I32)), _constant(I32, 0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, _constant(I32, 113 << 23))
    finite = builder.select(small, subnormal, normal)
    large = builder.icmp_unsigned(">=", magnitude, _constant(I32, 143 << 23))
    nan = builder.icmp_unsigned(">", magnitude, _constant(I32, 0x7F800000))
    special = builder.select(nan, _constant(I32, 0x7E00), _constant(I32, 0x7C00))
    return builder.trunc(builder.or_(builder.select(large, special, finite), sign), _vector_of(I16))


def _bfloat16_to_f32(builder, b):
    return builder.bitcast(builder.shl(builder.zext(b, _vector_of(I32)), _constant(I32, 16)), _vector_of(F32))


def _f32_to_bfloat16(builder, v):
    """To nearest even by adding 0x7FFF plus the last kept bit; NaN stays NaN."""
    bits = builder.bitcast(v, _vector_of(I32))
    odd = builder.and_(builder.lshr(bits, _constant(I32, 16)), _constant(I32, 1))
    rounded = builder.add(builder.add(bits, _constant(I32, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", v, v)
    quiet = builder.or_(bits, _constant(I32, 0x400000))
    return builder.trunc(builder.lshr(builder.select(nan, quiet, rounded), _constant(I32, 16)), _vector_of(I16))


def _widen(context, builder, dtype, raw):
    """Sixteen elements as they lie in memory, to float64."""
    if dtype == types.float64:
        return raw
    if dtype == types.float16:
        if _has_f16c(context):
            raw = builder.fpext(raw, _vector_of(F32))
        else:
            raw = _half_to_f32(builder, builder.bitcast(raw, _vector_of(I16)))
    elif dtype == bfloat16:
        raw = _bfloat16_to_f32(builder, raw)
    return builder.fpext(raw, _vector_of(F64))


def _narrow(context, builder, dtype, value):
    """Sixteen float64, to elements as they lie in memory."""
    if dtype == types.float64:
        return value
    value = builder.fptrunc(value, _vector_of(F32))
    if dtype == types.float16:
        if _has_f16c(context):
            return builder.fptrunc(value, _vector_of(F16))
        return builder.bitcast(_f32_to_half(builder, value), _vector_of(F16))
    return _f32_to_bfloat16(builder, value) if dtype == bfloat16 else value


# --------------------------------------------------------------------------------------------------------------- memory


def absent_gives_none(definition):
    """Make an intrinsic of None be None, so that kernels pass optional arguments on without asking."""

    @wraps(definition)
    def wrapper(typingctx, first, *rest):
        if isinstance(first, types.NoneType):
            return types.none(first, *rest), lambda context, builder, sig, args: context.get_dummy_value()
        return definition(typingctx, first, *rest)

    return wrapper


def _size(dtype):
    return dtype.bitwidth // 8


def _at(builder, pointer_type, pointer, index):
    """The address of the vector that starts at element `index`."""
    element = builder.gep(pointer, [index], source_etype=_ELEMENTS[pointer_type.dtype])
    return builder.bitcast(element, _vector_of(_ELEMENTS[pointer_type.dtype]).as_pointer())


def _lanes_below(builder, n):
    """<16 x i1>: which lanes come before n."""
    lane = ir.Constant(_vector_of(I64), list(range(LANES)))
    return builder.icmp_signed("<", lane, _spread(builder, n, I64))


def _spread(builder, scalar, element):
    undefined = ir.Constant(_vector_of(element), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_vector_of(I32), [0] * LANES))


def _masked(builder, kind, dtype, result, arguments):
    """Call llvm.masked.load or llvm.masked.store for sixteen elements of dtype."""
    letter = {F16: "f16", F32: "f32", F64: "f64", I16: "i16"}[_ELEMENTS[dtype]]
    function = ir.FunctionType(result, [a.type for a in arguments])
    name = f"llvm.masked.{kind}.v{LANES}{letter}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


@intrinsic
@absent_gives_none
def load(typingctx, p, i):
    """p[i:i+16] as float64."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        value = builder.load(_at(builder, sig.args[0], *args), typ=_vector_of(_ELEMENTS[dtype]))
        value.align = _size(dtype)
        return _widen(context, builder, dtype, value)

    return f64x16(p, types.int64), codegen


@intrinsic
@absent_gives_none
def load_some(typingctx, p, i, n):
    """p[i:i+n] as float64, zeros behind."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        raw = _vector_of(_ELEMENTS[dtype])
        zero = ir.Constant(raw, [ir.Constant(raw.element, 0)] * LANES)
        pointer = _at(builder, sig.args[0], args[0], args[1])
        arguments = [pointer, ir.Constant(I32, _size(dtype)), _lanes_below(builder, args[2]), zero]
        return _widen(context, builder, dtype, _masked(builder, "load", dtype, raw, arguments))

    return f64x16(p, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, p, i, v):
    """p[i:i+16] = v, rounded once."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        raw = _narrow(context, builder, dtype, args[2])
        builder.store(raw, _at(builder, sig.args[0], args[0], args[1])).align = _size(dtype)
        return context.get_dummy_value()

    return types.void(p, types.int64, f64x16), codegen


@intrinsic
def store_some(typingctx, p, i, v, n):
    """p[i:i+n] = v[:n], rounded once."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        pointer = _at(builder, sig.args[0], args[0], args[1])
        raw = _narrow(context, builder, dtype, args[2])
        arguments = [raw, pointer, ir.Constant(I32, _size(dtype)), _lanes_below(builder, args[3])]
        _masked(builder, "store", dtype, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(p, types.int64, f64x16, types.int64), codegen


def _boundary(dtype):
    """Bytes a streamed vector must be aligned to: its own size, a cache line at most."""
    return min(64, LANES * _size(dtype))


@intrinsic
def stream(typingctx, p, i, v):
    """p[i:i+16] = v around the cache: the line is not read first. p + i must lie on a boundary."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        raw = _narrow(context, builder, dtype, args[2])
        instruction = builder.store(raw, _at(builder, sig.args[0], args[0], args[1]))
        instruction.align = _boundary(dtype)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(p, types.int64, f64x16), codegen


@intrinsic
def lanes_to_boundary(typingctx, p):
    """Elements from p to the next address that `stream` accepts."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        negative = builder.neg(builder.ptrtoint(args[0], I64))
        rest = builder.and_(negative, ir.Constant(I64, _boundary(dtype) - 1))
        return builder.udiv(rest, ir.Constant(I64, _size(dtype)))

    return types.int64(p), codegen


@intrinsic
@absent_gives_none
def moved(typingctx, p, i):
    """p + i, counted in elements."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]], source_etype=_ELEMENTS[sig.args[0].dtype])

    return p(p, types.int64), codegen


@intrinsic
@absent_gives_none
def pointer_of(typingctx, tensor):
    """The pointer of a tensor (pointer, stride, stride)."""

    def codegen(context, builder, sig, args):
        return builder.extract_value(args[0], 0)

    return tensor[0](tensor), codegen


@intrinsic
@absent_gives_none
def provided(typingctx, tensor, p):
    """p, unless the tensor is None."""
    return p(tensor, p), lambda context, builder, sig, args: args[1]


def _stride(place):
    @intrinsic
    def stride(typingctx, tensor):
        def codegen(context, builder, sig, args):
            return builder.extract_value(args[0], place)

        def zero(context, builder, sig, args):
            return ir.Constant(I64, 0)

        return types.int64(tensor), zero if isinstance(tensor, types.NoneType) else codegen

    return stride


row_stride, channel_stride = _stride(1), _stride(2)


@intrinsic
def address(typingctx, a):
    """The pointer to the first element of a contiguous array."""

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return Pointer(a.dtype)(a), codegen


@intrinsic
def prefetch(typingctx, p, i):
    """Ask for the cache line of p[i]; never faults."""

    def codegen(context, builder, sig, args):
        byte = builder.gep(args[0], [args[1]], source_etype=_ELEMENTS[sig.args[0].dtype])
        byte = builder.bitcast(byte, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
        hint = [ir.Constant(I32, value) for value in (0, 2, 1)]  # read, into L2, data
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [byte, *hint])
        return context.get_dummy_value()

    return types.void(p, types.int64), codegen


@intrinsic
def fence(typingctx):
    """Order streamed stores before whatever this thread does next."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# ----------------------------------------------------------------------------------------------------- one element, and bits


@intrinsic
@absent_gives_none
def get(typingctx, p, i):
    """One element, as float64."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        element = builder.load(builder.gep(args[0], [args[1]], source_etype=_ELEMENTS[dtype]), typ=_ELEMENTS[dtype])
        if dtype == types.float64:
            return element
        if dtype == types.float32:
            return builder.fpext(element, F64)
        vector = _widen(context, builder, dtype, _spread(builder, element, _ELEMENTS[dtype]))
        return builder.extract_element(vector, ir.Constant(I32, 0))

    return types.float64(p, types.int64), codegen


@intrinsic
def put(typingctx, p, i, s):
    """Write one float64 scalar to memory of float32 or float64."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        value = args[2] if dtype == types.float64 else builder.fptrunc(args[2], _ELEMENTS[dtype])
        builder.store(value, builder.gep(args[0], [args[1]], source_etype=_ELEMENTS[dtype]))
        return context.get_dummy_value()

    return types.void(p, types.int64, types.float64), codegen


@intrinsic
def put_bits(typingctx, p, word, bits):
    """p[word] = the low sixteen of bits."""

    def codegen(context, builder, sig, args):
        builder.store(builder.trunc(args[2], I16), builder.gep(args[0], [args[1]], source_etype=I16))
        return context.get_dummy_value()

    return types.void(p, types.int64, types.int64), codegen


@intrinsic
def get_bits(typingctx, p, bit):
    """Sixteen bits that start at any bit; reads the two words that hold them."""

    def codegen(context, builder, sig, args):
        word = builder.gep(args[0], [builder.lshr(args[1], ir.Constant(I64, 4))], source_etype=I16)
        pair = builder.load(builder.bitcast(word, I32.as_pointer()), typ=I32)
        pair.align = 2
        shift = builder.trunc(builder.and_(args[1], ir.Constant(I64, 15)), I32)
        return builder.zext(builder.trunc(builder.lshr(pair, shift), I16), I64)

    return types.int64(p, types.int64), codegen


@intrinsic
def bits_above_zero(typingctx, v):
    """Bit k is set unless v[k] <= 0: what a gradient passes through a ReLU, NaN included."""

    def codegen(context, builder, sig, args):
        above = builder.fcmp_unordered(">", args[0], _constant(F64, 0.0))
        return builder.zext(builder.bitcast(above, I16), I64)

    return types.int64(v), codegen


@intrinsic
def only(typingctx, v, bits):
    """v where the bit is set, 0 elsewhere."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(builder.trunc(args[1], I16), _vector_of(I1))
        return builder.select(chosen, args[0], _constant(F64, 0.0))

    return f64x16(v, types.int64), codegen


# ------------------------------------------------------------------------------------------------------------- arithmetic


@intrinsic
@absent_gives_none
def splat(typingctx, s):
    """Sixteen copies of s."""

    def codegen(context, builder, sig, args):
        return _spread(builder, args[0], F64)

    return f64x16(types.float64), codegen


@intrinsic
def centre(typingctx, p, v, mean, low):
    """v - mean of values loaded from p.

    A float64 mean is exact enough for anything narrower. For float64 values it is half an ulp off, 1e-10 standard deviations
    where mean / std is 1e6: there the mean has a second word.
    """

    def codegen(context, builder, sig, args):
        centred = builder.fsub(args[1], args[2])
        return builder.fsub(centred, args[3]) if sig.args[0].dtype == types.float64 else centred

    return f64x16(p, v, mean, low), codegen


@intrinsic
def keep(typingctx, v, n):
    """The first n lanes of v, zeros behind."""

    def codegen(context, builder, sig, args):
        return builder.select(_lanes_below(builder, args[1]), args[0], _constant(F64, 0.0))

    return f64x16(v, types.int64), codegen


@intrinsic
def sum_lanes(typingctx, v):
    """Sum of the lanes, halves added to halves: a fixed tree, so the same bits on every CPU."""

    def codegen(context, builder, sig, args):
        value, n = args[0], LANES
        while n > 1:
            n //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (ir.Constant(ir.VectorType(I32, n), list(range(k, k + n))) for k in (0, n))
            value = builder.fadd(builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high))
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float64(v), codegen


def _pick(comparison):
    @intrinsic
    def pick(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(comparison, *args), *args)

        return f64x16(a, b), codegen

    return pick


smaller, larger = _pick("<"), _pick(">")


def _define(operation, instruction):
    """Give Python's operator a meaning for f64x16; `contract` lets a * b + c become one FMA."""

    @infer_global(operation)
    class Template(ConcreteTemplate):
        cases = (signature(f64x16, f64x16, f64x16),)

    @lower_builtin(operation, f64x16, f64x16)
    def lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args, flags=["contract"])


for _operation in (operator.add, operator.iadd):
    _define(_operation, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
