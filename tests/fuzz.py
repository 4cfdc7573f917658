"""Random calls, good and bad: each works and equals the reference, or raises ValueError or TypeError with nothing written.

    python tests/fuzz.py --cases 100000 --seed 0        # prints each failing case and the command that repeats it

`make_case` draws everything from one `random.Random`, so that hypothesis can drive it too (test_fuzz.py) and shrink what
fails. A case is a call that works, behind random strides, byte orders and alignments, and then, five times in six, one to
three mutations of its arguments. A mutation says what must become of the call: "works", "raises" or "either". The judge is
fuzz_oracle.py.
"""

import argparse
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import inputs
import numpy as np

try:
    import ml_dtypes

    DTYPES = [np.dtype(np.float32)] * 3 + [np.dtype(np.float64)] * 3 + [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]
STRUCTURED = np.dtype([("a", np.float32), ("b", np.int32)])


class Subclass(np.ndarray):
    """What np.memmap and others are: an array by another name."""


@dataclass
class Case:
    """A call: the function's name, its arguments, the gradient for a backward and where that goes."""

    function: str
    arguments: dict
    dy: object = None
    dx: object = None
    # What was done to an argument, and what must become of the call for it.
    changes: dict = field(default_factory=dict)

    def change(self, name, what, expected):
        self.changes[name] = (what, expected)

    @property
    def expected(self):
        expected = [e for _, e in self.changes.values()] + (["raises"] if self.clashes() else [])
        return max(expected, key=("works", "either", "raises").index, default="works")

    def clashes(self):
        """Whether running statistics that are written share memory with an array that is only read."""
        arrays = {n: a for n, a in self.arguments.items() if isinstance(a, np.ndarray)}
        pairs = [(n, m) for n in arrays if n.startswith("running") and self.updates for m in arrays if m != n]
        return bool(arrays["x"].size) and any(np.shares_memory(arrays[n], arrays[m]) for n, m in pairs) if "x" in arrays else False

    @property
    def updates(self):
        """Whether running statistics are written."""
        return self.function == "forward" and bool(self.arguments.get("training", True))

    def written(self, name):
        return name == "out" or (name.startswith("running") and self.updates)

    def describe(self):
        def show(v):
            if isinstance(v, np.ndarray):
                return f"{type(v).__name__}({v.dtype}, {v.shape}, strides {v.strides}, writeable {v.flags.writeable})"
            return repr(v)[:80]

        shown = {**self.arguments, "dy": self.dy, "dx": self.dx}
        lines = [f"    {name} = {show(v)}" for name, v in shown.items() if v is not None]
        return "\n".join([f"{self.function}: expected {self.expected}, {self.changes}", *lines])


# -------------------------------------------------------------------------------------------------------- arrays


def scatter(r, v, plain=False):
    """The values of `v` behind other strides; unless `plain` also unaligned, byte-swapped, of a subclass."""
    dtype = v.dtype
    if not plain and r.random() < 0.1 and dtype.kind == "f":
        dtype = dtype.newbyteorder()
    order = r.sample(range(v.ndim), v.ndim) if r.random() < 0.5 else list(range(v.ndim))
    steps = [r.choice((1, 1, 2, 3, -1, -2)) if r.random() < 0.3 else 1 for _ in v.shape]
    spare = [r.choice((0, 1, 2)) if r.random() < 0.3 else 0 for _ in v.shape]
    room = [n * abs(s) + extra for n, s, extra in zip(v.shape, steps, spare, strict=True)]
    raw = np.full(int(np.prod(room)) * dtype.itemsize + 8, 0x42, np.uint8)
    offset = 1 if not plain and r.random() < 0.1 else 0
    whole = np.ndarray([room[k] for k in order], dtype, raw, offset).transpose(np.argsort(order))
    view = whole[tuple(slice(0, n * abs(s), abs(s)) for n, s in zip(v.shape, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    view[...] = v
    if not plain and r.random() < 0.05:
        view = view.view(Subclass)
    return view


def chosen(r, choices, shape, dtype):
    """An array of `choices`, of one draw of `r`: hypothesis makes no list of many thousands, one draw each."""
    return np.random.default_rng(r.getrandbits(32)).choice(np.asarray(choices, dtype), shape)


def values(r, shape, dtype, axis=0):
    """Values of some kind, with the channels on `axis`."""
    axis %= len(shape)
    channels_second = (max([*shape[:axis], *shape[axis + 1 :]], default=1),) if len(shape) == 1 else None
    if channels_second or 0 in shape:
        return chosen(r, (-1.5, 0.25, 1.0, 3.0), shape, dtype)
    order = [k for k in range(len(shape)) if k != axis]
    order.insert(1, axis)
    kind = "normal" if r.random() < 0.5 else r.choice(list(inputs.VALUES))
    with np.errstate(all="ignore"):
        v = inputs.values(kind, tuple(shape[k] for k in order), np.float32 if dtype.itemsize == 2 else dtype, r.randrange(100))
        return np.ascontiguousarray(v.transpose(np.argsort(order))).astype(dtype)


def random_shape(r):
    """Two to six axes and some hundred values; one in twenty has an axis of length 0."""
    ndim = r.randint(2, 6)
    longest = {2: 80, 3: 20, 4: 10, 5: 5, 6: 4}[ndim]
    shape = [r.randint(1, longest) for _ in range(ndim)]
    if r.random() < 0.15:
        shape[r.randrange(ndim)] = r.choice((15, 16, 17, 33, 300))
    if r.random() < 0.05:
        shape[r.randrange(ndim)] = 0
    return tuple(shape)


def parameter(r, C, low, high):
    dtype = r.choice((np.float32, np.float64))
    return scatter(r, np.asarray([r.uniform(low, high) for _ in range(C)], dtype))


def sample_weight(r, shape, axis):
    full = shape[:axis] + shape[axis + 1 :]
    shape = full if r.random() < 0.5 else full[:1]
    kinds = (
        ((False, True), bool),
        ((0, 1, 2), np.int64),
        ((0.0, 0.5, 1.0, 1.75), np.float32),
        ((0.0, 1e90, 3e90), np.float64),
    )
    choices, dtype = r.choice(kinds)
    return scatter(r, chosen(r, choices, shape, dtype))


# --------------------------------------------------------------------------------------------------------- cases


def valid_case(r):
    """A call that works."""
    shape = random_shape(r)
    axis = r.randrange(-len(shape), len(shape))
    dtype = r.choice(DTYPES)
    C = shape[axis]
    a = {"x": scatter(r, values(r, shape, dtype, axis)), "axis": axis}
    function = r.choice(("forward", "forward", "forward", "inference", "moments"))
    weighted = function != "inference" and dtype.itemsize > 2 and r.random() < 0.2
    if weighted:
        a["sample_weight"] = sample_weight(r, shape, axis % len(shape))
    if function == "moments":
        return Case(function, a)
    given = r.random() < 0.8
    a["gamma"], a["beta"] = (parameter(r, C, -2, 2), parameter(r, C, -2, 2)) if given else (None, None)
    a["eps"] = r.choice((1e-5, 1e-5, 1e-3, 0.6, 10.0, np.float32(1e-3), 1, Fraction(1, 8)))
    if r.random() < 0.3 and not weighted:
        a["activation"] = "relu"
        if dtype.itemsize > 2 and r.random() < 0.5:
            a["residual"] = scatter(r, values(r, shape, dtype, axis))
    if r.random() < 0.3:
        a["out"] = scatter(r, np.zeros(shape, a["x"].dtype), plain=True)
    mean, var = parameter(r, C, -1, 1), parameter(r, C, 0.25, 2)
    if function == "inference":
        return Case(function, {**a, "mean": mean, "var": var})
    case = Case(function, a, dy=scatter(r, inputs.normal(shape, np.float32, r.randrange(9)).astype(dtype)))
    if r.random() < 0.3:
        in_place = r.random() < 0.5 and case.dy.dtype == a["x"].dtype
        case.dx = case.dy if in_place else scatter(r, np.zeros(shape, a["x"].dtype), plain=True)
    a["training"] = r.random() < 0.7
    if not a["training"] or r.random() < 0.6:
        a |= {"running_mean": mean, "running_var": var}
    if r.random() < 0.3:
        a |= {"momentum": r.choice((0.0, 0.5, 1, np.float64(0.3), Fraction(1, 3))), "unbiased": r.random() < 0.5}
    return case


def make_case(r):
    case = valid_case(r)
    for _ in range(r.choice((0, 1, 1, 1, 2, 3))):
        if arrays_of(case):
            r.choice((bad_array, bad_array, bad_number, read_only, alias, alias, self_overlap))(r, case)
    return case


ARRAYS = ("x", "gamma", "beta", "running_mean", "running_var", "mean", "var", "residual", "sample_weight", "out")


def arrays_of(case):
    return [name for name in ARRAYS if isinstance(case.arguments.get(name), np.ndarray)]


def bad_array(r, case):
    """Another kind of object, dtype or shape in the place of an array."""
    name = r.choice(arrays_of(case))
    a = case.arguments[name]
    if a.dtype.kind not in "fVbi" or a.dtype.names:
        return
    dtype = r.choice((np.int32, np.uint8, bool, np.complex64, object, STRUCTURED, "U3", "S2", "datetime64[s]", np.longdouble))
    with np.errstate(all="ignore"):
        what, bad = r.choice(
            (
                ("dtype", lambda: np.zeros(a.shape, dtype)),
                ("list", lambda: np.zeros(a.shape).tolist()),
                ("masked array", lambda: np.ma.masked_array(np.zeros(a.shape, a.dtype))),
                ("scalar", lambda: r.choice((1.0, 0, "x", b"", np.float32(2), object(), Ellipsis))),
                ("0-D", lambda: np.zeros((), a.dtype)),
                ("one axis more", lambda: np.zeros((*a.shape, 2), a.dtype)),
                ("longer", lambda: np.zeros((a.shape[0] + 1, *a.shape[1:]), a.dtype) if a.ndim else a),
                ("another float", lambda: a.astype(np.float64 if a.dtype.itemsize < 8 else np.float32)),
            )
        )
        case.arguments[name] = bad()
    sure = what in ("list", "masked array") or (name != "sample_weight" and what == "0-D")
    sure = sure or (name not in ("x", "sample_weight", "residual", "out") and what == "one axis more" and a.ndim)
    case.change(name, what, "raises" if sure else "either")


BAD_NUMBERS = {
    "eps": (0.0, -1e-5, float("nan"), float("inf"), "1e-5", None, True, 1j, np.zeros(2)),
    "momentum": (-0.1, 1.5, float("nan"), "0.1", True, 1j, [0.1]),
    "axis": (9, -10, 1.0, None, "1", True, (1,)),
    "activation": ("gelu", 0, True, b"relu", ["relu"]),
}


def bad_number(r, case):
    name = r.choice(list(BAD_NUMBERS))
    allowed = {"forward": BAD_NUMBERS, "inference": ("eps", "axis", "activation"), "moments": ("axis",)}
    if name in allowed[case.function]:
        case.arguments[name] = r.choice(BAD_NUMBERS[name])
        case.change(name, repr(case.arguments[name]), "raises")


def read_only(r, case):
    name = r.choice(arrays_of(case))
    case.arguments[name].flags.writeable = False
    case.change(name, "read-only", "raises" if case.written(name) else case.changes.get(name, (0, "works"))[1])


def self_overlap(r, case):
    """All elements at one address, or windows that slide by one."""
    name = r.choice(arrays_of(case))
    a = case.arguments[name]
    if not a.size or a.dtype.kind not in "fV":
        return
    strides = (0 if r.random() < 0.5 else a.itemsize,) * a.ndim
    buffer = (np.zeros if name == "out" else np.ones)(a.size, a.dtype)
    case.arguments[name] = np.lib.stride_tricks.as_strided(buffer, a.shape, strides)
    shared = sum(n > 1 for n in a.shape) > (1 if any(strides) else 0)
    case.change(name, f"strides {strides}", "raises" if case.written(name) and shared else "either")


def alias(r, case):
    """Two arguments on one memory: the same array, or one that begins some elements later."""
    names = arrays_of(case)
    first, second = r.choice(names), r.choice([*names, "dy"] if isinstance(case.dy, np.ndarray) else names)
    a, b = case.arguments[first], case.dy if second == "dy" else case.arguments[second]
    if first == second or a.size == 0 or b.size == 0 or a.dtype.hasobject:
        return
    shared = a
    if a.shape != b.shape or r.random() < 0.5:
        by = r.randrange(3)
        buffer = np.ones(max(a.size, b.size) + by, a.dtype)
        case.arguments[first] = buffer[: a.size].reshape(a.shape)
        case.arguments[first][...] = a
        shared = buffer[by : by + b.size].reshape(b.shape)
        case.change(first, "moved", "either")
    if second == "dy":
        case.dy = shared
        case.change(second, f"shares memory with {first}", "either")
        return
    case.arguments[second] = shared
    case.change(second, f"shares memory with {first}", "either")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many failures")
    options = parser.parse_args()
    from fuzz_oracle import run

    outcomes, start = Counter(), time.perf_counter()
    for n in range(options.first, options.first + options.cases):
        case = make_case(random.Random(f"{options.seed}-{n}"))
        try:
            outcomes[case.function, run(case)] += 1
        except Exception as error:
            outcomes["failed"] += 1
            print(f"case {n}: python tests/fuzz.py --seed {options.seed} --first {n} --cases 1\n{case.describe()}")
            print("".join(traceback.format_exception(error, limit=-2)), flush=True)
        if outcomes["failed"] >= options.failures or time.perf_counter() - start > options.seconds:
            break
    print(f"{sum(outcomes.values())} cases in {time.perf_counter() - start:.0f} s")
    for outcome, count in sorted(outcomes.items(), key=str):
        print(f"{count:8d}  {' '.join(outcome) if isinstance(outcome, tuple) else outcome}")
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
