"""Assertions shared by the tests: run fastbn, compare with the reference, say exactly what differed.

The bounds are those of the contract:

    |y - exact|            <= bound * max(1, |exact|)
    |dx - exact|           <= bound * max |gamma * invstd * dy|     (the largest of the channel)
    |dgamma, dbeta - exact| <= bound * sum of the absolute values of their terms

with bound = 1e-6 for float32 (17 roundings of a float32, 6e-8 each: float32 arithmetic that centres first fits, a
float32 statistic or x * a + b with large means does not) and 1e-13 for float64, the same for the gradients: 900
roundings of 1.1e-16, so that sums of some 1e5 terms fit in any order, and a mean kept in one float64 word does not
where mean / std is 1e6.
"""

import gc

import numpy as np
import reference

import fastbn

BOUND = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-13}
# Statistics are float64 for every input. float32 inputs: three digits below the bound of y. float64 inputs: the bound
# of y allows a relative error of 2e-13 in var; 1e-12 leaves room for m2, a sum of up to 3e5 terms.
STATISTICS = {np.dtype(np.float32): 1e-9, np.dtype(np.float64): 1e-12}


def native(dtype):
    """The dtype in the machine's byte order."""
    return np.dtype(dtype).newbyteorder("=")


def bound_of(*arrays):
    """The contract's bound for results that were rounded to the dtypes of these arrays (None is ignored)."""
    return max(BOUND[native(a.dtype)] for a in arrays if a is not None)


def order_of(x):
    """How x lies in memory, for messages."""
    if x.flags.c_contiguous:
        return "C"
    return "F" if x.flags.f_contiguous else f"strides {x.strides}"


def assert_within(actual, exact, bound, what, x, axis):
    """|actual - exact| <= bound, element by element; NaN and inf must be where the reference has them."""
    actual = reference.widen(actual, exact.dtype.type)
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    with np.errstate(all="ignore"):
        error = np.abs(actual - exact)
        same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
        bad = ~(same | (error <= bound))
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        worst = np.nanmax(np.where(bad & np.isfinite(error), error, 0))
        allowed = np.broadcast_to(bound, exact.shape)[where]
        raise AssertionError(
            f"{what}: {x.dtype} x of shape {x.shape}, axis {axis}, order {order_of(x)}: {int(bad.sum())} of {bad.size} values"
            f" off, largest error {float(worst):.3g}; first at {where}: got {float(actual[where])!r},"
            f" exact {float(exact[where])!r}, allowed error {float(allowed):.3g}"
        )


def assert_forward_close(y, exact, x, axis, what="forward", bound=None):
    """The contract's bound on y."""
    bound = bound_of(x) if bound is None else bound
    with np.errstate(invalid="ignore"):
        assert_within(y, exact, bound * np.maximum(1, np.abs(exact)), what, x, axis)


def assert_same_order(y, x):
    """y is dense, of the same dtype (byte order included), and its axes lie in the same order in memory as those of x."""
    assert y.dtype == x.dtype, f"y has dtype {y.dtype}, x has {x.dtype}"
    assert y.shape == x.shape, f"y has shape {y.shape}, x has {x.shape}"
    dense = np.empty_like(x, order="K", subok=False)  # NumPy's own meaning of "the same order"
    assert y.strides == dense.strides, f"y has strides {y.strides}, expected {dense.strides} for x with {x.strides}"


def _modes(frozen):
    """Keyword arguments of the function and of the reference for frozen statistics `(mean, var)`, or for training."""
    if frozen is None:
        return {}, {}
    mean, var = frozen
    return {"running_mean": mean, "running_var": var, "training": False}, {"mean": mean, "var": var}


def check_forward(x, gamma=None, beta=None, *, axis=1, eps=1e-5, frozen=None, out=None, **features):
    """Run the forward and compare y and the context with the reference; returns (y, ctx)."""
    ours, theirs = _modes(frozen)
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, axis=axis, eps=eps, out=out, **ours, **features)
    exact = reference.forward(x, gamma, beta, axis=axis, eps=eps, **theirs, **features)
    assert_forward_close(y, exact.y, x, axis)
    if frozen is None:
        assert_statistics(ctx.mean, ctx.var, exact, x, axis)
    for name in ("mean", "var", "invstd"):
        value = getattr(ctx, name)
        assert value.dtype == np.float64, f"ctx.{name} has dtype {value.dtype}"
        assert value.shape == (x.shape[axis],), f"ctx.{name} has shape {value.shape}"
    if out is not None:
        assert y is out, "the forward returned another array than out"
    return y, ctx


def assert_statistics(mean, var, exact, x, axis):
    """Mean and biased variance: within STATISTICS of the standard deviation and the variance."""
    bound = STATISTICS[native(x.dtype)]
    with np.errstate(invalid="ignore"):
        # One float64 word holds a mean to half a unit in its last place, however accurate the sums are.
        mean_bound = bound * np.sqrt(exact.var) + np.abs(exact.mean) * 2.0**-52
        finite = np.isfinite(exact.var)
        assert_within(mean[finite], exact.mean[finite], mean_bound[finite], "ctx.mean", x, axis)
        # A float64 cannot hold the variance of subnormal float64 values: it may be zero.
        var_bound = bound * exact.var + np.finfo(np.float64).smallest_subnormal
        assert_within(var[finite], exact.var[finite], var_bound[finite], "ctx.var", x, axis)
    assert not np.isfinite(var[~finite]).any(), f"ctx.var of channels holding NaN or inf is finite: {var}"


def check_backward(
    dy,
    ctx,
    y,
    x,
    gamma=None,
    beta=None,
    *,
    axis=1,
    eps=1e-5,
    frozen=None,
    out=None,
    sample_weight=None,
    residual=None,
    activation=None,
):
    """Run the backward and compare all gradients with the reference; returns what the backward returned."""
    _, theirs = _modes(frozen)
    mask = None
    if activation == "relu":
        # The sign of a value within rounding of zero is the implementation's own: take its mask. That y itself is right
        # was checked by check_forward.
        mask = np.asarray(y) > 0
    # The reference comes first: out may be dy.
    exact = reference.backward(dy, x, gamma, axis=axis, eps=eps, sample_weight=sample_weight, mask=mask, **theirs)
    results = fastbn.batch_norm_backward(dy, ctx, out=out)
    assert len(results) == (3 if residual is None else 4), f"the backward returned {len(results)} results"
    dx, dgamma, dbeta = results[:3]
    assert dx.shape == x.shape
    assert dx.dtype == x.dtype, f"dx has dtype {dx.dtype}, x has {x.dtype}"
    bound = bound_of(x)
    assert_within(dx, exact.dx, bound * reference.per_channel(exact.dx_scale, x.ndim, axis), "dx", x, axis)
    # No float holds a mean more finely than its smallest step: with subnormal x that much of every xhat is open.
    slack = float(np.finfo(native(x.dtype)).smallest_subnormal) * ctx.invstd * exact.dbeta_scale
    assert_parameter_gradient(dgamma, exact.dgamma, exact.dgamma_scale, gamma, "dgamma", x, axis, slack)
    assert_parameter_gradient(dbeta, exact.dbeta, exact.dbeta_scale, beta, "dbeta", x, axis)
    if residual is not None:
        # dresidual is dy or zero: no arithmetic, so no error is allowed.
        assert_within(results[3], exact.dresidual, 0, "dresidual", x, axis)
        assert results[3].dtype == x.dtype
    if out is not None:
        assert dx is out, "the backward returned another array than out"
    return results


def assert_parameter_gradient(gradient, exact, scale, parameter, what, x, axis, slack=0):
    """dgamma or dbeta: None where the parameter was None, else within the bound (+ slack), in the parameter's dtype."""
    if parameter is None:
        assert gradient is None, f"{what} should be None where its parameter is None"
        return
    assert gradient.dtype == native(parameter.dtype), f"{what} has dtype {gradient.dtype}, parameter {parameter.dtype}"
    assert_within(gradient, exact, bound_of(x, parameter) * scale + slack, what, x, axis)


def check_both(x, gamma=None, beta=None, *, axis=1, dy=None, **options):
    """Forward, then backward, compared with the reference; returns (y, ctx, results of the backward)."""
    y, ctx = check_forward(x, gamma, beta, axis=axis, **options)
    if dy is None:
        dy = np.random.default_rng(x.size).standard_normal(x.shape).astype(native(x.dtype))
    return y, ctx, check_backward(dy, ctx, y, x, gamma, beta, axis=axis, **options)


def check_inference(x, gamma, beta, mean, var, *, axis=1, eps=1e-5, out=None, **features):
    """Run the inference and compare with the reference."""
    exact = reference.forward(x, gamma, beta, axis=axis, eps=eps, mean=mean, var=var, **features)  # out may be x
    y = fastbn.batch_norm_inference(x, gamma, beta, mean, var, axis=axis, eps=eps, out=out, **features)
    assert_forward_close(y, exact.y, x, axis, "inference")
    if out is not None:
        assert y is out, "the inference returned another array than out"
    return y


def same_bits(a, b):
    """Equal shape, dtype and bytes (so that NaNs and signs of zero count)."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def same_results(found, expected):
    """The same number of arrays, each of the same bits."""
    return len(found) == len(expected) and all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def ulp(exact, bits, smallest_exponent):
    """The unit in the last place, at |exact|, of a float with `bits` bits of significand and gradual underflow."""
    exponent = np.frexp(np.where(exact == 0, 1, exact))[1] - 1
    exponent = np.where(exact == 0, smallest_exponent, np.maximum(exponent, smallest_exponent))
    return np.ldexp(np.longdouble(1), exponent - (bits - 1))


def snapshot(*arguments):
    """Bytes of every array among the arguments (of its whole buffer, where it is a view)."""
    taken = []
    for a in arguments:
        if isinstance(a, np.ndarray):
            whole = a
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            taken.append((whole, np.asarray(whole).tobytes()))
    return taken


def assert_unchanged(taken):
    """No array of the snapshot has changed."""
    for a, before in taken:
        assert np.asarray(a).tobytes() == before, f"an argument of shape {a.shape}, dtype {a.dtype} was written to"


def held_bytes(ctx, x):
    """(bytes of the arrays that ctx keeps apart from x, whether it keeps x itself)."""
    seen, stack, own, keeps_x = set(), [ctx], 0, False
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, str, bytes)):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            if np.shares_memory(item, x):
                keeps_x = True
            else:
                own += item.nbytes
        elif item is ctx or isinstance(item, (tuple, list, dict)) or type(item).__module__.startswith("fastbn"):
            stack.extend(gc.get_referents(item))
    return own, keeps_x
