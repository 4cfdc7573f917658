"""Data types of GPU arrays, and loads and stores of 16 bytes.

Versions
--------
1. x[i] for each element: Numba and NVVM never merge neighbouring loads, a quarter of the possible bytes are in flight.
2. (here) `load` and `store` move `lanes` neighbouring elements between an array and a thread's tile: one LDG.E.128 or STG.E.128
   where lanes fill 16 bytes, one plain access where lanes == 1 (planes or pointers that are not aligned).

Half types travel as uint16 arrays and are float32 in tiles: `fpext` and a shift widen, stores round to nearest even. bfloat16
stores need compute capability 8.0.
"""

from dataclasses import dataclass

import numpy as np
from numba import float32, float64, uint16

from fastbn.kernels.cuda.target import BUNDLED, SIMULATED


@dataclass(frozen=True)
class Kind:
    """A data type: its name, the element type of arrays, the type of arithmetic, and how many elements are 16 bytes."""

    name: str
    storage: object
    compute: object
    lanes: int


KINDS = {
    "float32": Kind("float32", float32, float32, 4),
    "float64": Kind("float64", float64, float64, 2),
    "float16": Kind("float16", uint16, float32, 8),
    "bfloat16": Kind("bfloat16", uint16, float32, 8),
}


# The simulator's twins, also the definition of what the intrinsics below do.


def _widen(name, value):
    if name == "float16":
        return np.float32(np.uint16(value).view(np.float16))
    if name == "bfloat16":
        return (np.uint32(value) << np.uint32(16)).view(np.float32)
    return value


def _narrow(name, value):
    if name == "float16":
        with np.errstate(over="ignore"):
            return np.float16(value).view(np.uint16)
    if name == "bfloat16":
        bits = int(np.float32(value).view(np.uint32))
        if bits & 0x7FFFFFFF > 0x7F800000:
            return np.uint16(0x7FFF)  # NaN, as cvt.rn.bf16 writes it
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return value


def _python_access(kind, lanes):
    def load(x, i, tile, k):
        if lanes > 1 and i % lanes:
            raise RuntimeError(f"unaligned 16-byte load at element {i}")
        for u in range(lanes):
            tile[k + u] = _widen(kind.name, x[i + u])

    def store(x, i, tile, k):
        if lanes > 1 and i % lanes:
            raise RuntimeError(f"unaligned 16-byte store at element {i}")
        for u in range(lanes):
            x[i + u] = _narrow(kind.name, tile[k + u])

    return load, store


def _compiled_access(kind, lanes):
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    half, f32, f64, i16, i32, i64 = (
        ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32), ir.IntType(64),
    )  # fmt: skip
    element = {"float32": f32, "float64": f64}.get(kind.name, i16)
    size = {"float32": 4, "float64": 8}.get(kind.name, 2)
    paired = element == i16
    # Half types cross the bus as four words: <8 x i16>, and what LLVM can turn into it, would become two accesses of 8 bytes.
    vector = ir.VectorType(i32, 4) if paired else ir.VectorType(element, kind.lanes)

    def pack(builder, values):
        packed = ir.Constant(vector, ir.Undefined)
        for u, value in enumerate(values):
            packed = builder.insert_element(packed, value, ir.Constant(i32, u))
        return packed

    def global_pointer(context, builder, array_type, array, index, to):
        data = context.make_array(array_type)(context, builder, value=array).data
        address = builder.add(builder.ptrtoint(data, i64), builder.mul(index, ir.Constant(i64, size)))
        return builder.inttoptr(address, ir.PointerType(to, 1))  # address space 1: global memory

    def tile_pointers(context, builder, array_type, array, index):
        data = context.make_array(array_type)(context, builder, value=array).data
        return [builder.gep(data, [builder.add(index, ir.Constant(i64, u))]) for u in range(lanes)]

    def widen(builder, value):
        """One element as the type of arithmetic."""
        if kind.name == "float16":
            return builder.fpext(builder.bitcast(value, half), f32)
        if kind.name == "bfloat16":
            return builder.bitcast(builder.shl(builder.zext(value, i32), ir.Constant(i32, 16)), f32)
        return value

    def widen_pair(builder, word):
        """The two half-size elements of a 32-bit word."""
        high = builder.lshr(word, ir.Constant(i32, 16))
        if kind.name == "float16":
            return [widen(builder, builder.trunc(v, i16)) for v in (word, high)]
        low = builder.shl(word, ir.Constant(i32, 16))
        high = builder.and_(word, ir.Constant(i32, 0xFFFF0000))
        return [builder.bitcast(v, f32) for v in (low, high)]

    def narrow(builder, value):
        if kind.name == "float16":
            return builder.bitcast(builder.fptrunc(value, half), i16)
        if kind.name == "bfloat16":
            convert = ir.InlineAsm(ir.FunctionType(i16, [f32]), "cvt.rn.bf16.f32 $0, $1;", "=h,f")
            return builder.call(convert, [value])
        return value

    def narrow_pair(builder, low, high):
        """Two elements as one 32-bit word."""
        if kind.name == "bfloat16":
            convert = ir.InlineAsm(ir.FunctionType(i32, [f32, f32]), "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
            return builder.call(convert, [high, low])
        low, high = (builder.zext(narrow(builder, v), i32) for v in (low, high))
        return builder.or_(low, builder.shl(high, ir.Constant(i32, 16)))

    def check(x, i, tile, k):
        return x.dtype == kind.storage and tile.dtype == kind.compute and all(isinstance(v, types.Integer) for v in (i, k))

    @intrinsic
    def load(typingctx, x, i, tile, k):
        def codegen(context, builder, signature, args):
            x_type, _, tile_type, _ = signature.args
            moved = element if lanes == 1 else vector
            value = builder.load(global_pointer(context, builder, x_type, args[0], args[1], moved))
            value.align = size * lanes
            if lanes == 1:
                values = [widen(builder, value)]
            else:
                values = [builder.extract_element(value, ir.Constant(i32, u)) for u in range(vector.count)]
            if lanes > 1 and paired:
                values = [one for word in values for one in widen_pair(builder, word)]
            for one, pointer in zip(values, tile_pointers(context, builder, tile_type, args[2], args[3]), strict=True):
                builder.store(one, pointer)
            return context.get_dummy_value()

        return (types.void(x, types.int64, tile, types.int64), codegen) if check(x, i, tile, k) else None

    @intrinsic
    def store(typingctx, x, i, tile, k):
        def codegen(context, builder, signature, args):
            x_type, _, tile_type, _ = signature.args
            values = [builder.load(p) for p in tile_pointers(context, builder, tile_type, args[2], args[3])]
            if lanes > 1 and paired:
                values = [narrow_pair(builder, values[u], values[u + 1]) for u in range(0, lanes, 2)]
            packed = narrow(builder, values[0]) if lanes == 1 else pack(builder, values)
            pointer = global_pointer(context, builder, x_type, args[0], args[1], packed.type)
            builder.store(packed, pointer).align = size * lanes
            return context.get_dummy_value()

        return (types.void(x, types.int64, tile, types.int64), codegen) if check(x, i, tile, k) else None

    return load, store


def access(kind, lanes):
    """(load, store) of a kind: load(x, i, tile, k) is tile[k:k+lanes] = x[i:i+lanes], store(x, i, tile, k) the reverse.

    With lanes > 1 the address of x[i] must be a multiple of 16 bytes.
    """
    if lanes not in (1, kind.lanes):
        raise ValueError(f"{kind.name} has accesses of 1 or {kind.lanes} elements, not {lanes}")
    if SIMULATED or BUNDLED:
        return _python_access(kind, lanes)
    return _compiled_access(kind, lanes)
