"""Single elements, and the bits of a packed mask."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastbn.kernels.cpu.simd.conversions import widen
from fastbn.kernels.cpu.simd.types import ELEMENTS, F64, I1, I16, I32, I64, absent_gives_none, constant, f64x16, spread, vector_of


@intrinsic
@absent_gives_none
def get(typingctx, p, i):
    """One element, as float64; of sixteen lanes the first."""
    if p == f64x16:
        return types.float64(p, types.int64), lambda context, builder, sig, args: builder.extract_element(args[0], ir.Constant(I32, 0))

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        element = builder.load(builder.gep(args[0], [args[1]], source_etype=ELEMENTS[dtype]), typ=ELEMENTS[dtype])
        if dtype == types.float64:
            return element
        if dtype == types.float32:
            return builder.fpext(element, F64)
        vector = widen(context, builder, dtype, spread(builder, element, ELEMENTS[dtype]))
        return builder.extract_element(vector, ir.Constant(I32, 0))

    return types.float64(p, types.int64), codegen


@intrinsic
def put(typingctx, p, i, s):
    """Write one float64 scalar to memory of float32 or float64."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        value = args[2] if dtype == types.float64 else builder.fptrunc(args[2], ELEMENTS[dtype])
        builder.store(value, builder.gep(args[0], [args[1]], source_etype=ELEMENTS[dtype]))
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
        above = builder.fcmp_unordered(">", args[0], constant(sig.args[0].element, 0.0))
        return builder.zext(builder.bitcast(above, I16), I64)

    return types.int64(v), codegen


@intrinsic
def where_bits(typingctx, v, bits):
    """v where the bit is set, 0 elsewhere."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(builder.trunc(args[1], I16), vector_of(I1))
        return builder.select(chosen, args[0], constant(sig.args[0].element, 0.0))

    return v(v, types.int64), codegen
