"""Sixteen elements as they lie in memory, to float32 or float64 lanes and back: one rounding, to nearest even."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from fastbn.kernels.cpu.simd.types import F16, F32, F64, I16, I32, LANES, bfloat16, constant, vector_of


def _has(context, feature):
    """Whether the processor that code is made for has a feature, by LLVM's name."""
    return feature in context.codegen().magic_tuple()[2].split(",")


def has_f16c(context):
    return _has(context, "+f16c")


def _half_to_f32(builder, h):
    """float16 bits to float32 by integers, for CPUs without F16C: 2**112 rebiases the exponent and normalises subnormals."""
    lanes64 = builder.zext(h, vector_of(I32))
    sign = builder.shl(builder.and_(lanes64, constant(I32, 0x8000)), constant(I32, 16))
    shifted = builder.shl(builder.and_(lanes64, constant(I32, 0x7FFF)), constant(I32, 13))
    scaled = builder.fmul(builder.bitcast(shifted, vector_of(F32)), constant(F32, 2.0**112))
    special = builder.icmp_unsigned(">=", shifted, constant(I32, 0x7C00 << 13))
    infinite = builder.or_(shifted, constant(I32, 0x7F800000))
    magnitude = builder.select(special, infinite, builder.bitcast(scaled, vector_of(I32)))
    return builder.bitcast(builder.or_(magnitude, sign), vector_of(F32))


def _f32_to_half(builder, v):
    """float32 to float16 bits by integers, to nearest even, for CPUs without F16C."""
    bits = builder.bitcast(v, vector_of(I32))
    sign = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 0x8000))
    magnitude = builder.and_(bits, constant(I32, 0x7FFFFFFF))
    # normal: rebias the exponent by -112 and round at bit 13
    odd = builder.and_(builder.lshr(magnitude, constant(I32, 13)), constant(I32, 1))
    rounded = builder.add(builder.add(magnitude, constant(I32, (-112 << 23) % 2**32 + 0xFFF)), odd)
    normal = builder.lshr(rounded, constant(I32, 13))
    # subnormal: adding 0.5 lets the float adder round at the right bit
    half = builder.fadd(builder.bitcast(magnitude, vector_of(F32)), constant(F32, 0.5))
    subnormal = builder.sub(builder.bitcast(half, vector_of(I32)), constant(I32, 0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, constant(I32, 113 << 23))
    finite = builder.select(small, subnormal, normal)
    large = builder.icmp_unsigned(">=", magnitude, constant(I32, 143 << 23))
    nan = builder.icmp_unsigned(">", magnitude, constant(I32, 0x7F800000))
    special = builder.select(nan, constant(I32, 0x7E00), constant(I32, 0x7C00))
    return builder.trunc(builder.or_(builder.select(large, special, finite), sign), vector_of(I16))


def _bfloat16_to_f32(builder, b):
    return builder.bitcast(builder.shl(builder.zext(b, vector_of(I32)), constant(I32, 16)), vector_of(F32))


def _f32_to_bfloat16(builder, v):
    """To nearest even by adding 0x7FFF plus the last kept bit; NaN stays NaN."""
    bits = builder.bitcast(v, vector_of(I32))
    odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = builder.add(builder.add(bits, constant(I32, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", v, v)
    quiet = builder.or_(bits, constant(I32, 0x400000))
    return builder.trunc(builder.lshr(builder.select(nan, quiet, rounded), constant(I32, 16)), vector_of(I16))


def widen(context, builder, dtype, raw, lane=F64):
    """Sixteen elements as they lie in memory, to lanes that are no narrower."""
    if dtype == types.float64:
        return raw
    if dtype == types.float16:
        by_hardware = has_f16c(context)
        raw = builder.fpext(raw, vector_of(F32)) if by_hardware else _half_to_f32(builder, builder.bitcast(raw, vector_of(I16)))
    elif dtype == bfloat16:
        raw = _bfloat16_to_f32(builder, raw)
    return builder.fpext(raw, vector_of(F64)) if lane == F64 else raw


def narrow(context, builder, dtype, value):
    """Sixteen lanes, to elements as they lie in memory."""
    if dtype == types.float64:
        return builder.fpext(value, vector_of(F64)) if value.type == vector_of(F32) else value
    if value.type == vector_of(F64):
        value = builder.fptrunc(value, vector_of(F32))
    if dtype == types.float16:
        if has_f16c(context):
            return builder.fptrunc(value, vector_of(F16))
        return builder.bitcast(_f32_to_half(builder, value), vector_of(F16))
    return _f32_to_bfloat16(builder, value) if dtype == bfloat16 else value


def narrow_to_stream(context, builder, dtype, value):
    """`narrow`, to elements that LLVM can store around the cache.

    A vector of halves it stores like any other, and float16 took 1.2 times as long as bfloat16 (LLVM 22). As integers it knows what to do,
    but sees through a bitcast: they must come from the instruction itself.
    """
    if dtype != types.float16:
        return narrow(context, builder, dtype, value)
    if value.type == vector_of(F64):
        value = builder.fptrunc(value, vector_of(F32))
    if not has_f16c(context):
        return _f32_to_half(builder, value)
    current_rounding = ir.Constant(I32, 4)  # to nearest even
    if _has(context, "+avx512f"):
        kind = ir.FunctionType(vector_of(I16), [vector_of(F32), I32, vector_of(I16), I16])
        convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.vcvtps2ph.512")
        return builder.call(convert, [value, current_rounding, ir.Constant(vector_of(I16), None), ir.Constant(I16, -1)])
    kind = ir.FunctionType(ir.VectorType(I16, 8), [ir.VectorType(F32, 8), I32])
    convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.vcvtps2ph.256")
    halves = []
    for first in (0, 8):
        lanes = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
        halves.append(builder.call(convert, [builder.shuffle_vector(value, value, lanes), current_rounding]))
    return builder.shuffle_vector(*halves, ir.Constant(vector_of(I32), list(range(LANES))))
