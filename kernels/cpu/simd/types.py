"""The types: sixteen floats in registers, pointers to memory, and small helpers to build LLVM vectors."""

from functools import wraps

from llvmlite import ir
from numba import types
from numba.extending import NativeValue, models, register_model, unbox

LANES = 16

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def vector_of(element):
    return ir.VectorType(element, LANES)


def constant(element, value):
    """A vector constant with `value` in every lane."""
    return ir.Constant(vector_of(element), [value] * LANES)


class Vector(types.Type):
    """Sixteen floats of one kind in registers."""

    def __init__(self, name, element):
        self.element = element
        super().__init__(name=name)


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


f64x16 = Vector("f64x16", F64)
f32x16 = Vector("f32x16", F32)


def lanes(lanes64):
    """The lanes that the type of an argument called `lanes64` stands for: float32 where it is None."""
    return f32x16 if isinstance(lanes64, types.NoneType) else f64x16


bfloat16 = BFloat16()

ELEMENTS = {types.float32: F32, types.float64: F64, types.float16: F16, bfloat16: I16, types.uint8: I8, types.uint16: I16, types.int64: I64}


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, vector_of(fe_type.element))


@register_model(BFloat16)
class BFloat16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I16)


@register_model(Pointer)
class PointerModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ELEMENTS[fe_type.dtype].as_pointer())


# Where a NumPy array keeps its data pointer: first behind the object header (PyArrayObject_fields in NumPy's C API, unchanged since 1.0).
# Read there it costs a nanosecond; `array.ctypes.data` or `__array_interface__` cost half a microsecond each.
DATA_OFFSET = object.__basicsize__


@unbox(Pointer)
def unbox_pointer(typ, obj, c):
    field = c.builder.gep(c.builder.bitcast(obj, ir.IntType(8).as_pointer()), [ir.Constant(I64, DATA_OFFSET)], source_etype=ir.IntType(8))
    element = ELEMENTS[typ.dtype].as_pointer()
    return NativeValue(c.builder.load(c.builder.bitcast(field, element.as_pointer()), typ=element))


def absent_gives_none(definition):
    """Make an intrinsic of None be None, so that kernels pass optional arguments on without asking."""

    @wraps(definition)
    def wrapper(typingctx, first, *tail_columns):
        if isinstance(first, types.NoneType):
            return types.none(first, *tail_columns), lambda context, builder, sig, args: context.get_dummy_value()
        return definition(typingctx, first, *tail_columns)

    return wrapper


def spread(builder, scalar, element):
    undefined = ir.Constant(vector_of(element), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector_of(I32), [0] * LANES))


def lanes_below(builder, n):
    """<16 x i1>: which lanes come before n."""
    lane = ir.Constant(vector_of(I64), list(range(LANES)))
    return builder.icmp_signed("<", lane, spread(builder, n, I64))
