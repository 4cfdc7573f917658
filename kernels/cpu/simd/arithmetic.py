"""Arithmetic on vectors, lane by lane and across lanes."""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic

from fastbn.kernels.cpu.simd.types import (
    F32,
    F64,
    I1,
    I32,
    I64,
    LANES,
    absent_gives_none,
    constant,
    f32x16,
    f64x16,
    lanes,
    lanes_below,
    spread,
    vector_of,
)

# Vectors that are summed in float32 lanes before they are added to float64. A sum of products is then off by 15 roundings of 6e-8 at most,
# one of them of x - mean, which is 0.9e-6 of its absolute terms; and 14x14 values are one part.
PART = 14


def _fold(builder, value, join):
    """One lane from all: the lower half joined with the upper, until one is left."""
    n = LANES
    while n > 1:
        n //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (ir.Constant(ir.VectorType(I32, n), list(range(k, k + n))) for k in (0, n))
        value = join(builder.shuffle_vector(value, undefined, low), builder.shuffle_vector(value, undefined, high))
    return builder.extract_element(value, ir.Constant(I32, 0))


@intrinsic
@absent_gives_none
def splat(typingctx, s):
    """Sixteen copies of s."""

    def codegen(context, builder, sig, args):
        return spread(builder, args[0], F64)

    return f64x16(types.float64), codegen


@intrinsic
def lanes64_unless(typingctx, lanes32):
    """The argument `lanes64` of lanes for sums: None, for float32 lanes, where `lanes32` is there, else True."""
    if isinstance(lanes32, types.NoneType):
        return types.boolean(lanes32), lambda context, builder, sig, args: ir.Constant(I1, True)
    return types.none(lanes32), lambda context, builder, sig, args: context.get_dummy_value()


@intrinsic
def rounded(typingctx, v, lanes64):
    """float64 lanes as float32 lanes, or as they are where `lanes64` is not None."""

    def codegen(context, builder, sig, args):
        return args[0] if sig.return_type == f64x16 else builder.fptrunc(args[0], vector_of(F32))

    return lanes(lanes64)(v, lanes64), codegen


def _largest(builder, m, v):
    kind = v.type
    magnitude = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.fabs.v{LANES}f32")
    size = builder.call(magnitude, [v])
    return builder.select(builder.fcmp_ordered(">", size, m), size, m)


@intrinsic
def largest(typingctx, m, v):
    """Lane by lane the larger of m and abs(v), m where v is NaN. Only float32 lanes ask: of float64 it is m."""

    def codegen(context, builder, sig, args):
        return args[0] if sig.args[1] == f64x16 else _largest(builder, *args)

    return m(m, v), codegen


@intrinsic
def largest_if_float32(typingctx, p, m, v):
    """`largest` of values loaded from float32; of others it is m."""
    if p.dtype != types.float32 or v != f32x16:
        return m(p, m, v), lambda context, builder, sig, args: args[1]
    return m(p, m, v), lambda context, builder, sig, args: _largest(builder, args[1], args[2])


@intrinsic
def float32_sum(typingctx, total, like):
    """What lanes of `like`'s kind start from to go on with a sum: 0 in float32 lanes, in float64 lanes the sum itself."""

    def codegen(context, builder, sig, args):
        return args[0] if sig.args[1] == f64x16 else constant(F32, 0.0)

    return like(total, like), codegen


@intrinsic
def float64_sum(typingctx, total, part):
    """The sum after that: the total and the part in float32 lanes, or the part, which holds all."""

    def codegen(context, builder, sig, args):
        if sig.args[1] == f64x16:
            return args[1]
        return builder.fadd(args[0], builder.fpext(args[1], vector_of(F64)))

    return total(total, part), codegen


@intrinsic
def sum_end(typingctx, i, like):
    """Where a part that starts at index i is added to the sum: after PART vectors in float32 lanes, never in float64 lanes."""

    def codegen(context, builder, sig, args):
        if sig.args[1] == f64x16:
            return ir.Constant(I64, 1 << 62)
        return builder.add(args[0], ir.Constant(I64, PART * LANES))

    return types.int64(types.int64, like), codegen


@intrinsic
def largest_lane(typingctx, v):
    """The largest lane of v, in which none is NaN."""

    def codegen(context, builder, sig, args):
        most = _fold(builder, args[0], lambda low, high: builder.select(builder.fcmp_ordered(">", low, high), low, high))
        return most if sig.args[0] == f64x16 else builder.fpext(most, F64)

    return types.float64(v), codegen


@intrinsic
def bias(typingctx, beta, mean, anchor, scale, lanes64):
    """b of y = (x - m) * scale + b: m is the anchor rounded to float32; or the mean, so that b is beta, if `lanes64` is not None."""

    def codegen(context, builder, sig, args):
        beta_, mean_, anchor_, scale_ = args[:4]
        if lanes(lanes64) == f64x16:
            return beta_
        m = builder.fpext(builder.fptrunc(anchor_, vector_of(F32)), vector_of(F64))
        return builder.fsub(beta_, builder.fmul(builder.fsub(mean_, m), scale_))

    return f64x16(beta, mean, anchor, scale, lanes64), codegen


@intrinsic
def deviation(typingctx, p, v, mean, low):
    """v - mean of values loaded from p.

    A float64 mean is exact enough for anything narrower. For float64 values it is half an ulp off, 1e-10 standard deviations
    where mean / std is 1e6: there the mean has a second word.
    """

    def codegen(context, builder, sig, args):
        centred = builder.fsub(args[1], args[2])
        return builder.fsub(centred, args[3]) if sig.args[0].dtype == types.float64 else centred

    return v(p, v, mean, low), codegen


@intrinsic
def needs_two_words(typingctx, tensor):
    """Whether deviations of a tensor's values need a mean in two words: a constant, so that what it guards vanishes."""

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(1), sig.args[0][0].dtype == types.float64)

    return types.boolean(tensor), codegen


@intrinsic
def deviation_if_float64(typingctx, p, v, mean, low):
    """v - mean of values loaded from float64, and in float32 lanes; v of others: there `constant_term` has the mean in a constant term."""

    def codegen(context, builder, sig, args):
        if sig.args[0].dtype == types.float64:
            return builder.fsub(builder.fsub(args[1], args[2]), args[3])
        return builder.fsub(args[1], args[2]) if sig.args[1] == f32x16 else args[1]

    return v(p, v, mean, low), codegen


@intrinsic
def constant_term(typingctx, p, c, slope, mean, lanes32):
    """c of slope * (v - mean) + c, made to fit `deviation_if_float64`: c - slope * mean for values narrower than float64.

    What cancels then is 2**24 times the result at most, as far as a mean of float32 values can lie from them: 1e-9 of it is lost.
    In float32 lanes (`lanes32` is not None) it is what rounding the mean leaves out.
    """

    def codegen(context, builder, sig, args):
        if sig.args[0].dtype == types.float64:
            return args[1]
        left = args[3]
        if not isinstance(sig.args[4], types.NoneType):
            left = builder.fsub(left, builder.fpext(builder.fptrunc(left, vector_of(F32)), vector_of(F64)))
        return builder.fsub(args[1], builder.fmul(args[2], left))

    return c(p, c, slope, mean, lanes32), codegen


@intrinsic
def first_lanes(typingctx, v, n):
    """The first n lanes of v, zeros behind."""

    def codegen(context, builder, sig, args):
        return builder.select(lanes_below(builder, args[1]), args[0], constant(sig.args[0].element, 0.0))

    return v(v, types.int64), codegen


@intrinsic
def sum_lanes(typingctx, v):
    """Sum of the lanes, halves added to halves: a fixed tree, so the same bits on every CPU."""

    def codegen(context, builder, sig, args):
        return _fold(builder, args[0], builder.fadd)

    return types.float64(v), codegen


def _define(operation, instruction):
    """Give Python's operator a meaning for vectors; `contract` lets a * b + c become one FMA."""

    @infer_global(operation)
    class Template(ConcreteTemplate):
        cases = tuple(signature(v, v, v) for v in (f64x16, f32x16))

    @lower_builtin(operation, f64x16, f64x16)
    @lower_builtin(operation, f32x16, f32x16)
    def lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args, flags=["contract"])


for _operation in (operator.add, operator.iadd):
    _define(_operation, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
