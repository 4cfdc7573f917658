"""From the flat tuples that the host passes to the groups of arguments that kernels take (arguments.py).

Arrays come as addresses: Numba's own arrays cost 50 to 80 ns each on the way in, a tuple of three 40. In the forward of (64, 128), whose
kernels take 3 us, both together took 1 us. The groups are made here in LLVM's terms, in one go: written in Python, they took a tenth of
the time in which a program is compiled.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

from fastbn.kernels.cpu.arguments import BackwardNumbers, ChannelGradients, Channels, Data, ForwardNumbers, Gradients, Shape, whole_lines
from fastbn.kernels.cpu.simd.types import F64, I64
from fastbn.kernels.rows import BACKWARD_ROWS, TABLE_ROWS

REAL, INTEGER = types.float64, types.int64


def named(group, members):
    """The type of a group; Numba has another one where all members are alike."""
    return types.NamedUniTuple(members[0], len(members), group) if len(set(members)) == 1 else types.NamedTuple(members, group)


@intrinsic
def element(typingctx, array, k):
    """array[k], of integers."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(args[0], [args[1]], source_etype=I64), typ=I64)

    return INTEGER(array, INTEGER), codegen


class _Maker:
    """Makes groups one after the other, and takes the integers that belong to them in order."""

    def __init__(self, context, builder, arrays_type, arrays, constants):
        self.context, self.builder, self.constants, self.taken = context, builder, constants, 0
        fields = arrays_type.instance_class._fields
        self.arrays = {name: (arrays_type[k], builder.extract_value(arrays, k)) for k, name in enumerate(fields)}

    def integer(self):
        place = self.builder.gep(self.constants, [ir.Constant(I64, self.taken)], source_etype=I64)
        self.taken += 1
        return self.builder.load(place, typ=I64)

    def tuple(self, kind, values):
        return self.context.make_tuple(self.builder, kind, values)

    def pointer_and(self, number, name, kind):
        """A pointer and the next integers, of which it keeps as many as its type has; None stays None."""
        integers = [self.integer() for _ in range(number)]
        if isinstance(kind, types.NoneType):
            return self.context.get_dummy_value()
        return self.tuple(kind, [self.arrays[name][1], *integers[: len(kind) - 1]])

    def array(self, name, offset, lengths):
        """The contiguous float64 array `offset` elements behind a pointer."""
        kind, pointer = self.arrays[name]
        if isinstance(kind, types.NoneType):
            return self.context.get_dummy_value()
        a = arrayobj.make_array(types.Array(REAL, len(lengths), "C"))(self.context, self.builder)
        steps = [ir.Constant(I64, 8)]
        for length in reversed(lengths[1:]):
            steps.insert(0, self.builder.mul(steps[0], length))
        data = self.builder.gep(pointer, [offset], source_etype=F64)
        arrayobj.populate_array(a, data, lengths, steps, ir.Constant(I64, 8), None)
        return a._getvalue()

    def lines(self, n):
        """`whole_lines` of n."""
        return self.builder.and_(self.builder.add(n, ir.Constant(I64, whole_lines(1) - 1)), ir.Constant(I64, -whole_lines(1)))


def maker(backward, weight_by_row):
    """What makes the groups of a forward, or of a backward; `weight_by_row` where there is one weight a row or plane."""
    tensors, vectors = (Gradients, ChannelGradients) if backward else (Data, Channels)

    @intrinsic
    def groups(typingctx, arrays, options, numbers, constants, thread):
        kinds = dict(zip(arrays.instance_class._fields, arrays, strict=True))

        def tensor_type(name):
            if isinstance(kinds[name], types.NoneType):
                return types.none
            if name == "block_weights":
                return REAL[::1]
            return types.Tuple((kinds[name], *[INTEGER] * (1 if name == "weight" and weight_by_row else 2)))

        tensors_type = named(tensors, [tensor_type(name) for name in tensors._fields])
        vectors_type = named(vectors, [types.Tuple((kinds[name], INTEGER)) for name in vectors._fields])
        shape_type = named(Shape, [INTEGER] * len(Shape._fields))
        extra = () if backward else (types.UniTuple(INTEGER, 3),)
        numbers_type = named(BackwardNumbers if backward else ForwardNumbers, [*numbers, *extra])
        tables = [REAL[:, ::1]] * (2 if backward else 1)
        result = types.Tuple((tensors_type, vectors_type, shape_type, options, numbers_type, *tables, REAL[:, :, ::1], REAL[:, :, ::1]))

        def codegen(context, builder, sig, args):
            make = _Maker(context, builder, arrays, args[0], args[3])
            shape = {name: make.integer() for name in Shape._fields}
            constant = {n: ir.Constant(I64, n) for n in (0, 1, 4, TABLE_ROWS, BACKWARD_ROWS)}
            given_tensors = [
                make.array(name, constant[0], [shape["blocks"]]) if name == "block_weights" else make.pointer_and(2, name, kind)
                for name, kind in zip(tensors._fields, tensors_type, strict=True)
            ]
            given_vectors = [make.pointer_and(1, name, kind) for name, kind in zip(vectors._fields, vectors_type, strict=True)]
            given_numbers = [builder.extract_value(args[2], k) for k in range(len(numbers))]
            if not backward:
                given_numbers.append(make.tuple(extra[0], [make.integer() for _ in range(3)]))
            C = shape["C"]
            begin, given_tables = constant[0], [make.array("table", constant[0], [constant[TABLE_ROWS], C])]
            if backward:
                given_tables.append(make.array("workspace", constant[0], [constant[BACKWARD_ROWS], C]))
                begin = make.lines(builder.mul(constant[BACKWARD_ROWS], C))
            partial = make.array("workspace", begin, [shape["blocks"], constant[4], C])
            end = builder.add(begin, make.lines(builder.mul(builder.mul(constant[4], shape["blocks"]), C)))
            threads = builder.add(args[4], constant[1])
            scratch = make.array("workspace", end, [threads, shape["scratch_rows"], shape["scratch_columns"]])
            groups = [
                make.tuple(tensors_type, given_tensors), make.tuple(vectors_type, given_vectors),
                make.tuple(shape_type, [*shape.values()]), args[1], make.tuple(numbers_type, given_numbers),
            ]  # fmt: skip
            return make.tuple(result, [*groups, *given_tables, partial, scratch])

        return result(arrays, options, numbers, constants, INTEGER), codegen

    return groups
