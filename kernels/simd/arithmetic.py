"""Arithmetic on vectors, lane by lane and across lanes."""

import operator

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic

from fastbn.kernels.simd.types import (
    F64,
    I32,
    LANES,
    absent_gives_none,
    constant,
    f64x16,
    lanes_below,
    spread,
)


@intrinsic
@absent_gives_none
def splat(typingctx, s):
    """Sixteen copies of s."""

    def codegen(context, builder, sig, args):
        return spread(builder, args[0], F64)

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
        return builder.select(lanes_below(builder, args[1]), args[0], constant(F64, 0.0))

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
