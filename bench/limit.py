"""The limit: a copy with streaming stores, the fastest way to read one array and write another.

Batch normalisation reads x and writes y at least once, so no implementation can take less time than this copy on
arrays that exceed the cache. For the backward the limit is `dx = x + dy`: two arrays read, one written. An ordinary
store first reads the cache line that it is about to overwrite; a streaming (non-temporal) store does not, which is
why `numpy.copyto` is *not* the limit. On arrays that fit a cache streaming stores lose against ordinary ones, and a
normalisation may then be faster than its limit: read the ratios of small shapes with that in mind.

LLVM vectors are a Numba type here, since plain loops marked non-temporal do not vectorise.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

BYTES = 64  # one vector: a cache line, so that a streaming store fills it whole
SERIAL_BYTES = 2_000_000  # below, waking a second thread costs more than it saves
I32 = ir.IntType(32)


class Vector(types.Type):
    """`<16 x float>` or `<8 x double>`."""

    def __init__(self, name: str, element: ir.Type, lanes: int) -> None:
        super().__init__(name=name)
        self.llvm = ir.VectorType(element, lanes)


VECTORS = {
    types.float32: Vector("limit_f32x16", ir.FloatType(), 16),
    types.float64: Vector("limit_f64x8", ir.DoubleType(), 8),
}


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


def _pointer(context, builder, array_type, array, index):
    """The address of array[index], as a pointer to a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTORS[array_type.dtype].llvm.as_pointer())


@intrinsic
def load(typingctx, x, i):
    """x[i:i+lanes], at any address that is a multiple of the item size."""

    def codegen(context, builder, sig, args):
        value = builder.load(_pointer(context, builder, sig.args[0], *args))
        value.align = sig.args[0].dtype.bitwidth // 8
        return value

    return VECTORS[x.dtype](x, i), codegen


@intrinsic
def stream(typingctx, x, i, v):
    """x[i:i+lanes] = v past the caches; the address has to be a multiple of 64."""

    def codegen(context, builder, sig, args):
        store = builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1]))
        store.align = BYTES
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(x, i, v), codegen


@intrinsic
def add(typingctx, a, b):
    def codegen(context, builder, sig, args):
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def fence(typingctx):
    """Streaming stores are weakly ordered: nothing may read them before this."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True)
def stream_copy(x, y, start, stop, first, lanes):
    """y[start:stop] = x[start:stop]; `first` is the smallest index at or after start where y is aligned to 64 bytes."""
    head = min(first, stop)
    for i in range(start, head):
        y[i] = x[i]
    tail = head + (stop - head) // lanes * lanes
    for i in range(head, tail, lanes):
        stream(y, i, load(x, i))
    for i in range(tail, stop):
        y[i] = x[i]
    fence()


@njit(nogil=True)
def stream_add(x, dy, dx, start, stop, first, lanes):
    """dx[start:stop] = x[start:stop] + dy[start:stop]; `first` as in `stream_copy`."""
    head = min(first, stop)
    for i in range(start, head):
        dx[i] = x[i] + dy[i]
    tail = head + (stop - head) // lanes * lanes
    for i in range(head, tail, lanes):
        stream(dx, i, add(load(x, i), load(dy, i)))
    for i in range(tail, stop):
        dx[i] = x[i] + dy[i]
    fence()


class Limit:
    """Streaming copy and addition on a fixed number of threads, the caller being one of them.

    Parameters
    ----------
    threads : int
        How many threads share an array; each takes one run of neighbouring elements.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.empty(5, np.float32)
    >>> Limit(2).copy(np.arange(5, dtype=np.float32), y)
    >>> y
    array([0., 1., 2., 3., 4.], dtype=float32)
    """

    def __init__(self, threads: int = os.cpu_count() or 1) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 is needed")
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "limit") if threads > 1 else None

    def copy(self, x: np.ndarray, y: np.ndarray) -> None:
        """Stream x into y; both flat, contiguous, of one dtype (float32 or float64)."""
        self._share(stream_copy, (x,), y)

    def add(self, x: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> None:
        """Stream x + dy into dx."""
        self._share(stream_add, (x, dy), dx)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _share(self, kernel, sources: tuple[np.ndarray, ...], out: np.ndarray) -> None:
        for array in (*sources, out):
            if array.ndim != 1 or not array.flags.c_contiguous or array.shape != out.shape or array.dtype != out.dtype:
                raise ValueError(f"got {array.shape} {array.dtype} and {out.shape} {out.dtype}; give flat contiguous arrays alike")
        lanes = BYTES // out.itemsize
        offset = out.ctypes.data % BYTES // out.itemsize  # elements since the last 64-byte boundary
        n = out.size
        threads = self.threads if out.nbytes >= SERIAL_BYTES else 1
        cuts = [n * t // threads for t in range(threads + 1)]

        def share(t: int) -> None:
            start, stop = cuts[t], cuts[t + 1]
            kernel(*sources, out, start, stop, start + -(start + offset) % lanes, lanes)

        waiting = [self._pool.submit(share, t) for t in range(1, threads)] if threads > 1 else []
        share(0)
        for future in waiting:
            future.result()
