"""Loads and stores of vectors, whole, masked and streamed; pointers and tensors."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.kernels.cpu.simd.conversions import narrow, narrow_to_stream, widen
from fastbn.kernels.cpu.simd.types import (
    ELEMENTS,
    F16,
    F32,
    F64,
    I1,
    I16,
    I32,
    I64,
    LANES,
    Pointer,
    absent_gives_none,
    constant,
    f64x16,
    lanes,
    lanes_below,
    spread,
    vector_of,
)


def _size(dtype):
    return dtype.bitwidth // 8


def address_of(builder, dtype, pointer, index):
    """The address of the vector that starts at element `index`."""
    element = builder.gep(pointer, [index], source_etype=ELEMENTS[dtype])
    return builder.bitcast(element, vector_of(ELEMENTS[dtype]).as_pointer())


def _masked(builder, kind, dtype, result, arguments):
    """Call llvm.masked.load or llvm.masked.store for sixteen elements of dtype."""
    letter = {F16: "f16", F32: "f32", F64: "f64", I16: "i16"}[ELEMENTS[dtype]]
    function = ir.FunctionType(result, [a.type for a in arguments])
    name = f"llvm.masked.{kind}.v{LANES}{letter}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def masked_load(builder, dtype, pointer, i, n):
    """Elements i..i+n as they lie in memory, zeros behind."""
    raw = vector_of(ELEMENTS[dtype])
    zero = ir.Constant(raw, [ir.Constant(raw.element, 0)] * LANES)
    arguments = [address_of(builder, dtype, pointer, i), ir.Constant(I32, _size(dtype)), lanes_below(builder, n), zero]
    return _masked(builder, "load", dtype, raw, arguments)


def masked_store(builder, dtype, pointer, i, raw, n):
    """Elements i..i+n = raw[:n], as they lie in memory."""
    arguments = [raw, address_of(builder, dtype, pointer, i), ir.Constant(I32, _size(dtype)), lanes_below(builder, n)]
    _masked(builder, "store", dtype, ir.VoidType(), arguments)


def _load(vector):
    """The code of a load, of all sixteen or of args[2], into these lanes."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        if sig.args[2:3] == (types.int64,):
            value = masked_load(builder, dtype, *args[:3])
        else:
            value = builder.load(address_of(builder, dtype, args[0], args[1]), typ=vector_of(ELEMENTS[dtype]))
            value.align = _size(dtype)
        return widen(context, builder, dtype, value, vector.element)

    return codegen


@intrinsic
@absent_gives_none
def load(typingctx, p, i):
    """p[i:i+16] as float64; sixteen lanes p themselves."""
    if p == f64x16:
        return p(p, types.int64), lambda context, builder, sig, args: args[0]
    return f64x16(p, types.int64), _load(f64x16)


@intrinsic
@absent_gives_none
def load_masked(typingctx, p, i, n):
    """p[i:i+n] as float64, zeros behind; sixteen lanes p[:n] likewise."""
    if p == f64x16:

        def first_lanes(context, builder, sig, args):
            return builder.select(lanes_below(builder, args[2]), args[0], constant(F64, 0.0))

        return p(p, types.int64, types.int64), first_lanes
    return f64x16(p, types.int64, types.int64), _load(f64x16)


@intrinsic
@absent_gives_none
def read(typingctx, p, i, lanes64):
    """p[i:i+16] as float32, or as float64 where `lanes64` is not None."""
    return lanes(lanes64)(p, types.int64, lanes64), _load(lanes(lanes64))


@intrinsic
@absent_gives_none
def read_masked(typingctx, p, i, n, lanes64):
    """p[i:i+n] as float32, or as float64 where `lanes64` is not None; zeros behind."""
    return lanes(lanes64)(p, types.int64, types.int64, lanes64), _load(lanes(lanes64))


@intrinsic
def load_like(typingctx, p, i, v):
    """p[i:i+16] in lanes of v's kind."""
    return v(p, types.int64, v), _load(v)


@intrinsic
def load_masked_like(typingctx, p, i, n, v):
    """p[i:i+n] in lanes of v's kind, zeros behind."""
    return v(p, types.int64, types.int64, v), _load(v)


@intrinsic
def store(typingctx, p, i, v):
    """p[i:i+16] = v, rounded once."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        raw = narrow(context, builder, dtype, args[2])
        builder.store(raw, address_of(builder, sig.args[0].dtype, args[0], args[1])).align = _size(dtype)
        return context.get_dummy_value()

    return types.void(p, types.int64, v), codegen


@intrinsic
def store_masked(typingctx, p, i, v, n):
    """p[i:i+n] = v[:n], rounded once."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        masked_store(builder, dtype, args[0], args[1], narrow(context, builder, dtype, args[2]), args[3])
        return context.get_dummy_value()

    return types.void(p, types.int64, v, types.int64), codegen


def _boundary(dtype):
    """Bytes a streamed vector must be aligned to: its own size, a cache line at most."""
    return min(64, LANES * _size(dtype))


@intrinsic
def stream(typingctx, p, i, v):
    """p[i:i+16] = v around the cache: the line is not read first. p + i must lie on a boundary."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        raw = narrow_to_stream(context, builder, dtype, args[2])
        pointer = builder.bitcast(address_of(builder, sig.args[0].dtype, args[0], args[1]), raw.type.as_pointer())
        instruction = builder.store(raw, pointer)
        instruction.align = _boundary(dtype)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(p, types.int64, v), codegen


@intrinsic
def lanes_to_boundary(typingctx, p):
    """Elements from p to the next address that `stream` accepts."""

    def codegen(context, builder, sig, args):
        dtype = sig.args[0].dtype
        negative = builder.neg(builder.ptrtoint(args[0], I64))
        tail_columns = builder.and_(negative, ir.Constant(I64, _boundary(dtype) - 1))
        return builder.udiv(tail_columns, ir.Constant(I64, _size(dtype)))

    return types.int64(p), codegen


@intrinsic
@absent_gives_none
def moved(typingctx, p, i):
    """p + i, counted in elements."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]], source_etype=ELEMENTS[sig.args[0].dtype])

    return p(p, types.int64), codegen


def _tensor_element(builder, tensor_type, tensor, steps):
    """The address of an element of a tensor; steps are (index, place of its stride in the tuple, 0 for a stride of 1)."""
    offset = ir.Constant(I64, 0)
    for index, place in steps:
        offset = builder.add(offset, builder.mul(index, builder.extract_value(tensor, place)) if place else index)
    return builder.gep(builder.extract_value(tensor, 0), [offset], source_etype=ELEMENTS[tensor_type[0].dtype])


def _of_row(tensor, *indices):
    """Signature and code for the element of a row, in all lanes, of a pair (pointer to float64, stride of a row)."""

    def codegen(context, builder, sig, args):
        return spread(builder, builder.load(_tensor_element(builder, sig.args[0], args[0], ((args[1], 1),)), typ=F64), F64)

    return f64x16(tensor, *indices), codegen


@intrinsic
def by_row(typingctx, tensor):
    """Whether a tensor has one element a row: a pair, not a triple."""
    known = ir.Constant(I1, not isinstance(tensor, types.NoneType) and len(tensor) == 2)
    return types.boolean(tensor), lambda context, builder, sig, args: known


@intrinsic
@absent_gives_none
def plane(typingctx, tensor, n, c):
    """The pointer to plane (n, c) of a tensor; lanes full of element n where it has one a row."""
    if len(tensor) == 2:
        return _of_row(tensor, types.int64, types.int64)

    def codegen(context, builder, sig, args):
        return _tensor_element(builder, sig.args[0], args[0], ((args[1], 1), (args[2], 2)))

    return tensor[0](tensor, types.int64, types.int64), codegen


@intrinsic
@absent_gives_none
def row(typingctx, tensor, r, column):
    """The pointer to element (r, column) of a tensor; lanes full of element r where it has one a row."""
    if len(tensor) == 2:
        return _of_row(tensor, types.int64, types.int64)

    def codegen(context, builder, sig, args):
        return _tensor_element(builder, sig.args[0], args[0], ((args[1], 1), (args[2], 0)))

    return tensor[0](tensor, types.int64, types.int64), codegen


@intrinsic
def row_stride(typingctx, tensor):
    """Elements from a row to the next; 0 of None."""

    def codegen(context, builder, sig, args):
        absent = isinstance(sig.args[0], types.NoneType)
        return ir.Constant(I64, 0) if absent else builder.extract_value(args[0], 1)

    return types.int64(tensor), codegen


@intrinsic
def vectors(typingctx, array, r):
    """The pointer to row r of a contiguous two-dimensional array."""

    def codegen(context, builder, sig, args):
        a = context.make_array(sig.args[0])(context, builder, args[0])
        offset = builder.mul(args[1], builder.extract_value(a.shape, 1))
        return builder.gep(a.data, [offset], source_etype=ELEMENTS[sig.args[0].dtype])

    return Pointer(array.dtype)(array, types.int64), codegen


@intrinsic
def lanes_memory(typingctx, p, lanes64):
    """A pointer to float64, as it is or, where `lanes64` is None, as one to float32: workspace for lanes of either kind."""
    if isinstance(lanes64, types.NoneType):
        return Pointer(types.float32)(p, lanes64), lambda context, builder, sig, args: builder.bitcast(args[0], F32.as_pointer())
    return p(p, lanes64), lambda context, builder, sig, args: args[0]


def _prefetch(p, locality):
    """Signature and code of a prefetch; LLVM's locality is 2 for L2, 0 for what is read once."""

    def codegen(context, builder, sig, args):
        byte = builder.gep(args[0], [args[1]], source_etype=ELEMENTS[sig.args[0].dtype])
        byte = builder.bitcast(byte, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
        hint = [ir.Constant(I32, value) for value in (0, locality, 1)]  # read, where to, data
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [byte, *hint])
        return context.get_dummy_value()

    return types.void(p, types.int64), codegen


@intrinsic
@absent_gives_none
def prefetch(typingctx, p, i):
    """Ask for the cache line of p[i]; never faults. Of None: nothing."""
    return _prefetch(p, 2)


@intrinsic
@absent_gives_none
def prefetch_once(typingctx, p, i):
    """The same for a line that is read once, and need not displace others from L2 and L3."""
    return _prefetch(p, 0)


@intrinsic
def fence(typingctx):
    """Order streamed stores before whatever this thread does next."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
