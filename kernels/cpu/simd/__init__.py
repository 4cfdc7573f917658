"""A small SIMD vocabulary for Numba: sixteen float64 or float32 lanes, and pointers to memory of any floating dtype.

Memory holds float32, float64, float16 or bfloat16. Statistics and gradients are computed in one type, ``f64x16``: `load` widens in
registers and `store` rounds once on the way out, so a kernel is written once for all dtypes and never rounds in between. Output of
float32 and narrower is computed in ``f32x16`` where that is as good: `read` gives lanes of the one or the other kind.

===================================  ==================================================================
``load(p, i)``                       lanes p[i:i+16]
``load_masked(p, i, n)``             lanes p[i:i+n], the others 0; touches no other memory
``read``, ``read_masked``            the same in float32 lanes, or float64 where the last argument is not None
``load_like``, ``load_masked_like``  the same in lanes of the kind of the last argument
``rounded(v, lanes64)``              float64 lanes as float32 lanes, or as they are where `lanes64` is not None
``lanes_memory(p, lanes64)``         workspace of float64, or the same as float32, for such lanes
``bias(beta, mean, anchor, ...)``    beta - (mean - anchor) * scale for float32 lanes, which subtract the anchor; else beta
``store``, ``store_masked``          the reverse, rounding once to the memory's dtype
``stream(p, i, v)``                  store around the cache; p + i must be `lanes_to_boundary` aligned
``fence()``                          after streaming, before another thread may read
``splat(s)``                         sixteen copies of a scalar
``a + b``, ``a - b``, ``a * b``      lane by lane; a * b + c contracts to one FMA where the CPU has it
``sum_lanes(v)``                     sum in a fixed tree: the same bits everywhere
``float32_sum``, ``float64_sum``     sums in float32 lanes, added to float64 lanes at each `sum_end`
``largest(m, v)``                    the larger of m and abs(v) in float32 lanes; ``largest_lane(v)`` a scalar
``deviation(p, v, mean, low)``       v - mean, and for p in float64 also - low: the mean as two words
``deviation_if_float64(...)``        the same of float64, v of narrower values; ``constant_term`` makes the constant term fit
``needs_two_words(tensor)``          whether these need the second word, so that p is float64
``exact_lanes``, ``put_lanes``       sixteen channels of workspace, for formulas that give the bits they give of scalars (exact.py)
``values_of``, ``set_values``        the same of a per-channel array, float32 or float64 as is known at run time
``how_many(chosen, n)``              how many of the first n lanes a comparison of such lanes chose
``first_lanes(v, n)``                lanes 0..n-1 of v, the others 0
``bits_above_zero(v)``               int64, bit k set unless v[k] <= 0 (set for NaN)
``where_bits(v, bits)``              v where the bit is set, 0 elsewhere
===================================  ==================================================================

A tensor is a tuple (pointer, stride, stride); optional ones are None, and so is whatever is loaded from None. Weights that are the same
for a whole row or plane are a pair (pointer, stride): what would be a pointer into them is lanes full of the one weight.

Why like this:

- LLVM vectors as a Numba type instead of auto-vectorised loops: a loop with two accumulators and a store does not vectorise
  reliably without broad fastmath, and a loop with a non-temporal store never does.
- Sixteen lanes for every dtype: two AVX-512 registers of float64, four of AVX2, eight of SSE2 or NEON (half of that for float32); LLVM
  splits them by itself.
- ``fmul`` and ``fadd`` with the ``contract`` flag, not ``llvm.fma``, which is a library call per lane on a CPU without FMA.
- Heads and tails are vectors too, loaded and stored under a mask, so that one formula serves all elements: the bits of y do not
  depend on where a vector happens to start.
"""

from fastbn.kernels.cpu.simd.arithmetic import (
    bias,
    constant_term,
    deviation,
    deviation_if_float64,
    first_lanes,
    float32_sum,
    float64_sum,
    lanes64_unless,
    largest,
    largest_if_float32,
    largest_lane,
    needs_two_words,
    rounded,
    splat,
    sum_end,
    sum_lanes,
)
from fastbn.kernels.cpu.simd.elements import bits_above_zero, get, get_bits, put, put_bits, where_bits
from fastbn.kernels.cpu.simd.exact import as_float32, exact, exact_lanes, how_many, put_lanes, set_values, values_of
from fastbn.kernels.cpu.simd.memory import (
    by_row,
    fence,
    lanes_memory,
    lanes_to_boundary,
    load,
    load_like,
    load_masked,
    load_masked_like,
    moved,
    plane,
    prefetch,
    prefetch_once,
    read,
    read_masked,
    row,
    row_stride,
    store,
    store_masked,
    stream,
    vectors,
)
from fastbn.kernels.cpu.simd.types import LANES, Pointer, Vector, bfloat16, f32x16, f64x16
