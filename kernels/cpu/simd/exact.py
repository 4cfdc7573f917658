"""Sixteen channels at a time, in float64 lanes that compute what scalars do, bit for bit.

The formulas of kernels/formulas.py take such lanes as they take scalars. A product and a sum never contract to one FMA here: the bits of
statistics are the same on every CPU, and those of the twins on the GPU.

A call does this once a channel. One channel at a time, the divisions and square roots of (64, 128) took 0.9 us, a quarter of a
forward's kernels and half of inference's.
"""

import math
import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from fastbn.kernels import formulas
from fastbn.kernels.cpu.simd.memory import masked_load, masked_store
from fastbn.kernels.cpu.simd.types import F32, F64, I1, I16, I64, LANES, Vector, f64x16, spread, vector_of

exact64 = Vector("exact64", F64)
REAL = types.float64


class Choice(types.Type):
    """Sixteen truth values."""

    def __init__(self):
        super().__init__(name="choice")


choice = Choice()


@register_model(Choice)
class ChoiceModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, vector_of(I1))


def _as_lanes(builder, kind, value):
    return spread(builder, value, F64) if kind == REAL else value


def _define(function, result, number, code):
    """Give a function or operator of one to three arguments a meaning for lanes, of which some may be scalars. `code` makes the LLVM IR."""
    first = (choice,) if function is formulas.where else ()
    each = number - len(first)
    kinds = [k for k in ((exact64,), (exact64, exact64), (REAL, exact64), (exact64, REAL), (REAL, REAL)) if len(k) == each]
    kinds = [(*first, *k) for k in kinds if first or exact64 in k]

    @infer_global(function)
    class Template(ConcreteTemplate):
        cases = tuple(signature(result, *k) for k in kinds)

    for k in kinds:

        @lower_builtin(function, *k)
        def lower(context, builder, sig, args):
            return code(builder, *(_as_lanes(builder, kind, a) for kind, a in zip(sig.args, args, strict=True)))


def _of_llvm(name):
    def code(builder, v):
        kind = ir.FunctionType(v.type, [v.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f64"), [v])

    return code


def _compare(sign):
    def code(builder, a, b):
        return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, a, b)

    return code


for _name, _instruction in (("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")):
    _define(getattr(operator, _name), exact64, 2, lambda builder, a, b, name=_instruction: getattr(builder, name)(a, b))
for _name, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
    _define(getattr(operator, _name), choice, 2, _compare(_sign))
_define(operator.neg, exact64, 1, lambda builder, v: builder.fneg(v))
_define(abs, exact64, 1, _of_llvm("fabs"))
_define(math.sqrt, exact64, 1, _of_llvm("sqrt"))
_define(formulas.where, exact64, 3, lambda builder, chosen, a, b: builder.select(chosen, a, b))


def _define_logic(operation, name):
    @infer_global(operation)
    class Template(ConcreteTemplate):
        cases = (signature(choice, choice, choice),)

    @lower_builtin(operation, choice, choice)
    def lower(context, builder, sig, args):
        return getattr(builder, name)(*args)


@infer_global(formulas.where)
class _WhereOfScalars(ConcreteTemplate):
    cases = (signature(REAL, types.boolean, REAL, REAL),)


@lower_builtin(formulas.where, types.boolean, REAL, REAL)
def _where_of_scalars(context, builder, sig, args):
    return builder.select(*args)


_define_logic(operator.and_, "and_")
_define_logic(operator.or_, "or_")


@intrinsic
def exact(typingctx, v):
    """float64 lanes as these lanes."""
    return exact64(f64x16), lambda context, builder, sig, args: args[0]


@intrinsic
def as_float32(typingctx, v):
    """Lanes rounded to float32."""

    def codegen(context, builder, sig, args):
        return builder.fpext(builder.fptrunc(args[0], vector_of(F32)), vector_of(F64))

    return exact64(exact64), codegen


@intrinsic
def how_many(typingctx, chosen, n):
    """How many of the first n lanes are chosen."""

    def codegen(context, builder, sig, args):
        bits = builder.zext(builder.bitcast(args[0], I16), I64)
        below = builder.sub(builder.shl(ir.Constant(I64, 1), args[1]), ir.Constant(I64, 1))
        return builder.ctpop(builder.and_(bits, below))

    return types.int64(choice, types.int64), codegen


@intrinsic
def exact_lanes(typingctx, p, c, n):
    """p[c:c+n] of float64, the other lanes 0."""

    def codegen(context, builder, sig, args):
        return masked_load(builder, REAL, *args)

    return exact64(p, types.int64, types.int64), codegen


@intrinsic
def put_lanes(typingctx, p, c, v, n):
    """p[c:c+n] = v[:n]."""

    def codegen(context, builder, sig, args):
        masked_store(builder, REAL, *args)
        return context.get_dummy_value()

    return types.void(p, types.int64, v, types.int64), codegen


def _if_size(builder, size, bytes_):
    return builder.if_then(builder.icmp_signed("==", size, ir.Constant(I64, bytes_)))


@intrinsic
def values_of(typingctx, vector, c, n, absent):
    """Channels c..c+n of a vector, float32 or float64 as is known at run time; `absent` in all lanes where there is none."""

    def codegen(context, builder, sig, args):
        vector, c, n, absent = args
        p, size = builder.extract_value(vector, 0), builder.extract_value(vector, 1)
        result = cgutils.alloca_once_value(builder, spread(builder, absent, F64))
        with _if_size(builder, size, 4):
            single = masked_load(builder, types.float32, builder.bitcast(p, F32.as_pointer()), c, n)
            builder.store(builder.fpext(single, vector_of(F64)), result)
        with _if_size(builder, size, 8):
            builder.store(masked_load(builder, REAL, builder.bitcast(p, F64.as_pointer()), c, n), result)
        return builder.load(result)

    return exact64(vector, types.int64, types.int64, REAL), codegen


@intrinsic
def set_values(typingctx, vector, c, v, n):
    """Write channels c..c+n of a vector, rounded once; nothing where there is none."""

    def codegen(context, builder, sig, args):
        vector, c, v, n = args
        p, size = builder.extract_value(vector, 0), builder.extract_value(vector, 1)
        with _if_size(builder, size, 4):
            masked_store(builder, types.float32, builder.bitcast(p, F32.as_pointer()), c, builder.fptrunc(v, vector_of(F32)), n)
        with _if_size(builder, size, 8):
            masked_store(builder, REAL, builder.bitcast(p, F64.as_pointer()), c, v, n)
        return context.get_dummy_value()

    return types.void(vector, types.int64, v, types.int64), codegen
