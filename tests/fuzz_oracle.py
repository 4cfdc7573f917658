"""Judge of the cases that fuzz.py makes: what a call that worked must have returned, and what it may not have touched."""

import warnings

import checks
import numpy as np
import reference

import fastbn

# Bits of the significand and exponent of the smallest normal number.
HALVES = {"float16": (11, -14), "bfloat16": (8, -126)}


def copies(arguments):
    return {k: np.array(v, subok=False) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def bounded(actual, exact, scale, x, axis, what):
    """Within the contract's bound times `scale`; results beyond the dtype's range are infinite; half types round once."""
    dtype = checks.native(x.dtype)
    largest = 2.0**127 * (2 - 2.0**-7) if dtype.name == "bfloat16" else float(np.finfo(dtype).max)
    with np.errstate(all="ignore"):
        edge = np.abs(np.abs(exact) / largest - 1) < 1e-2  # may round to either side
        beyond = np.where(np.abs(exact) > largest, np.sign(exact) * np.inf, exact)
        exact = np.where(edge, reference.widen(actual), beyond)
        bound = (1e-6 if dtype.itemsize < 8 else 1e-13) * scale
        if dtype.name in HALVES:
            bound = bound + 0.5 * checks.ulp(np.where(np.isfinite(exact), exact, 0), *HALVES[dtype.name])
        else:
            bound = bound + float(np.finfo(dtype).smallest_subnormal)
    checks.assert_within(actual, exact, bound, what, x, axis)


def full_weights(a):
    """sample_weight with x's shape without the channel axis, and 1 for the largest, as only their ratios count."""
    w, x = a.get("sample_weight"), a["x"]
    if w is None:
        return None
    shape = tuple(n for k, n in enumerate(x.shape) if k != a["axis"] % x.ndim)
    w = np.asarray(w, np.longdouble)
    w = w / (w.max(initial=0) or 1)
    return np.broadcast_to(w if w.shape == shape else w.reshape(-1, *[1] * (len(shape) - 1)), shape)


def reference_of(a, given):
    theirs = {"mean": given[0], "var": given[1]} if given else {"sample_weight": full_weights(a)}
    theirs |= {k: a.get(k) for k in ("residual", "activation")}
    return reference.forward(a["x"], a.get("gamma"), a.get("beta"), eps=float(a["eps"]), axis=a["axis"], **theirs)


def check_output(y, a, exact, what):
    x, axis = a["x"], a["axis"]
    assert y.shape == x.shape, f"{what}: shape {y.shape}"
    assert y.dtype == x.dtype, f"{what}: dtype {y.dtype} for {x.dtype}"
    # Of the terms that are added: the contract's bound assumes a gamma of about 1, and no cancellation with the residual.
    with np.errstate(all="ignore"):
        terms = np.maximum(1, np.abs(exact.xhat))
        if a.get("gamma") is not None:
            terms = terms * np.abs(reference.per_channel(reference.widen(a["gamma"]), x.ndim, axis))
        scale = np.where(np.isfinite(terms), np.maximum(np.maximum(1, np.abs(np.nan_to_num(exact.pre))), terms), 1)
    bounded(y, exact.y, scale, x, axis, what)


def check_running(case, before, exact, caught):
    """Running statistics moved once, or, where they cannot be, a warning and the old ones."""
    a = case.arguments
    x, axis = before["x"], before["axis"]
    new, old = (tuple(d[n] for n in ("running_mean", "running_var")) for d in (a, before))
    total = np.longdouble(x.size // x.shape[axis])
    if before.get("sample_weight") is not None:
        w = full_weights(before)
        total = w.sum() ** 2 / (w**2).sum()
        if total - 1 < 1e-6:
            return  # one weight and dust: n - 1 is lost in rounding
    with np.errstate(all="ignore"):
        factor = total / (total - 1) if before.get("unbiased", True) else 1
        batch = exact.mean, exact.var * factor
        usable = np.ones(len(new[0]), bool)
        limit = min(np.finfo(checks.native(o.dtype)).max for o in old)
        for b in batch:
            usable &= np.abs(b) <= limit
        for name, n, o, b in zip(("running_mean", "running_var"), new, old, batch, strict=True):
            m = float(before.get("momentum", 0.1))
            moved = (1 - m) * o.astype(np.longdouble) + m * b
            slack = np.finfo(checks.native(o.dtype)).eps * np.abs(moved) + 1e-9 * m * (np.sqrt(np.abs(exact.var)) + np.abs(b))
            good = np.where(usable, np.abs(n - moved) <= slack + np.finfo(checks.native(o.dtype)).smallest_subnormal, n == o)
            assert good.all(), f"{name} is {n[~good]}, expected {np.where(usable, moved, o)[~good]}, was {o[~good]}"
    assert bool(caught) == (not usable.all()), f"{len(caught)} warnings, {(~usable).sum()} channels that are not finite"


def check_backward(case, before, exact, ctx, y, given):
    x, axis = before["x"], before["axis"]
    dy = np.array(case.dy)
    results = fastbn.batch_norm_backward(case.dy, ctx, out=case.dx)
    relu = before.get("activation") == "relu"
    with np.errstate(all="ignore"):
        if relu and (np.abs(exact.pre[exact.pre != 0]) < 1e-6).any():
            return  # whether the ReLU let such a value through, its sign in y may not tell
        mask = reference.widen(y) > 0 if relu else None
        theirs = {"mean": given[0], "var": given[1]} if given else {"sample_weight": full_weights(before)}
        right = reference.backward(dy, x, before.get("gamma"), eps=float(before["eps"]), axis=axis, mask=mask, **theirs)
        # Of channels with NaN or inf all that is promised is that they do not touch the others.
        sick = ~np.isfinite(right.dx_scale * right.dgamma_scale) | ~np.isfinite(exact.invstd)
        sick |= ~np.isfinite(np.where(np.isfinite(reference.widen(x)), 0, 1).max(axis=reference.other_axes(x.ndim, axis)) * np.inf)
        spread = reference.per_channel(sick, x.ndim, axis)
        ours, exact_dx = np.where(spread, 0, reference.widen(results[0])), np.where(spread, 0, right.dx)
        scale = reference.per_channel(np.where(sick, 1, right.dx_scale), x.ndim, axis)
    bounded(ours, exact_dx, scale, x, axis, "dx")
    # No float holds a mean more finely than its smallest step: with subnormal x that much of every xhat is open.
    smallest = float(np.finfo(np.float32 if x.itemsize < 8 else np.float64).smallest_subnormal)
    sums = (("gamma", results[1], right.dgamma, right.dgamma_scale), ("beta", results[2], right.dbeta, right.dbeta_scale))
    for name, g, e, s in sums:
        p = before.get(name)
        if p is None:
            assert g is None, f"d{name} without {name}"
            continue
        with np.errstate(all="ignore"):
            bound = (1e-13 if min(p.itemsize, x.itemsize) == 8 else 1e-6) * s + smallest * ctx.invstd * right.dbeta_scale
        checks.assert_within(np.where(sick, 0, g), np.where(sick, 0, e), np.where(sick, 1, bound), f"d{name}", x, axis)
    if case.dx is not None:
        assert np.shares_memory(results[0], case.dx), "dx is not out"


def call(case):
    a = dict(case.arguments)
    x = a.pop("x")
    if case.function == "moments":
        return fastbn.moments(x, **a), None
    if case.function == "inference":
        p = [a.pop(n) for n in ("gamma", "beta", "mean", "var")]
        return fastbn.batch_norm_inference(x, *p, **a), None
    return fastbn.batch_norm_forward(x, **a)


def check_success(case, before, result, ctx, caught):
    a = before
    x, axis = a["x"], a["axis"]
    w = full_weights(a)
    if w is not None and x.size and (w > 0).any():
        # An alias: beside a weight of 1e90, one of 1 vanishes in float64. And where a channel begins with a weight of 0,
        # the reference does not shift before it sums, and rounds the mean to 5e-20 of it: coarser than the kernels do.
        count, mean, m2 = reference.moments(x, axis=axis, sample_weight=w)
        with np.errstate(all="ignore"):
            if (w[w > 0] < 1e-6).any() or (np.abs(mean) > 1e5 * np.sqrt(m2 / count)).any():
                return
    if case.function == "moments":
        count, mean, m2 = (0, 0, 0) if x.size == 0 else reference.moments(x, axis=axis, sample_weight=full_weights(a))
        if count == 0:
            assert result.count == 0
            return
        with np.errstate(all="ignore"):
            if a.get("sample_weight") is not None:
                unit = np.asarray(a["sample_weight"], np.longdouble).max()
                count, m2 = count * unit, m2 * unit
            np.testing.assert_allclose(result.count, float(count), rtol=1e-12)
            finite = np.isfinite(m2)
            rtol = 1e-9 if x.itemsize < 8 else 1e-11
            bound = rtol * np.sqrt(m2 / count) + np.abs(mean) * 2.0**-52
            assert (np.abs(result.mean - mean) <= bound)[finite].all(), "moments: mean"
            assert (np.abs(result.m2 - m2) <= rtol * m2 + 1e-300)[finite].all(), "moments: m2"
        return
    given = (a["mean"], a["var"]) if case.function == "inference" else None
    if case.function == "forward" and not a["training"]:
        given = a["running_mean"], a["running_var"]
    if x.size == 0:
        assert result.shape == x.shape
        for name in ("running_mean", "running_var"):
            if a.get(name) is not None:
                assert checks.same_bits(np.asarray(case.arguments[name]), a[name]), f"{name} changed by an empty batch"
        return
    exact = reference_of(a, given)
    check_output(result, a, exact, case.function)
    if ctx is not None:
        if not given and a.get("running_mean") is not None:
            check_running(case, a, exact, caught)
        else:
            assert not caught, f"warned: {caught[0].message}"
        if isinstance(case.dy, np.ndarray):
            check_backward(case, a, exact, ctx, result, given)


def due(a, function):
    """Whether a ValueError is due for fewer than two values per channel."""
    x, w = a["x"], a.get("sample_weight")
    if function != "forward" or not a["training"] or not isinstance(x, np.ndarray) or x.ndim < 2 or x.size == 0:
        return False
    return (x.size // x.shape[a["axis"]] if w is None else (full_weights(a) > 0).sum()) < 2


def check_margins(out):
    """Nothing was written around or between the elements of an output from `fuzz.scatter`, which fills its buffer with 0x42."""
    whole = out
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    if whole.dtype == np.uint8:
        out[...] = np.frombuffer(b"\x42" * out.itemsize, out.dtype)[0]
        assert (whole == 0x42).all(), "something was written beside the output"


def run(case):
    """Make the call and judge it: "works", or the name of the exception's type. AssertionError: a bug is found."""
    before, expected = copies(case.arguments), case.expected
    named = {n: v for n, v in (*case.arguments.items(), ("dy", case.dy), ("dx", case.dx)) if isinstance(v, np.ndarray)}
    named = {n: v for n, v in named.items() if not v.dtype.hasobject}
    snapshot = checks.snapshot(*named.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, ctx = call(case)
        except (ValueError, TypeError) as error:
            checks.assert_unchanged(snapshot)
            if expected == "works" and not due(before, case.function):
                raise AssertionError("raised, but must work") from error
            return type(error).__name__
        assert expected != "raises", "worked, but must raise"
        # A float32 dgamma may be too small for a float64 dy of 1e90: NumPy warns of the infinity, as it does elsewhere.
        caught = [w for w in caught if "overflow encountered in cast" not in str(w.message)]
        other = [w for w in caught if "running statistics" not in str(w.message)]
        assert not other, f"warned: {other[0].message}"
        try:
            check_success(case, before, result, ctx, caught)
        except (ValueError, TypeError) as error:
            if expected == "works":
                raise AssertionError("the backward raised, but must work") from error
            return f"works, backward {type(error).__name__}"
        assert len(caught) <= 1, f"warned: {caught[-1].message}"
    # An output may share memory with the input that it is allowed to be.
    outputs = [v for n, v in named.items() if case.written(n) or n == "dx"]
    checks.assert_unchanged([u for u in snapshot if not any(np.may_share_memory(u[0], o) for o in outputs)])
    for name in ("out", "dx"):
        if name in named:
            check_margins(named[name])
    return "works"
