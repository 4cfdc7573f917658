"""The same results as PyTorch, where it is installed: outputs, gradients, running statistics, memory formats.

In float64 the two agree to rounding: 1e-11 leaves PyTorch's sums room. In float32 PyTorch's own error is about 1e-6 on
values of order one, so that 1e-5 tells a wrong formula from its rounding.
"""

import inputs
import numpy as np
import pytest

import fastbn

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")

CLOSE = {np.float32: {"rtol": 1e-5, "atol": 1e-5}, np.float64: {"rtol": 1e-11, "atol": 1e-11}}
DTYPES = pytest.mark.parametrize("dtype", inputs.FLOATS, ids=["float32", "float64"])
SHAPES = {"nc": (32, 7), "ncl": (5, 5, 5), "nchw": (4, 6, 9, 11), "ncdhw": (2, 3, 4, 5, 6), "n1": (1, 4, 6, 6)}


def compare(x, dtype, *, training=True, momentum=0.1, eps=1e-5, affine=True, track=True, memory_format=None):
    gamma, beta, mean, var = inputs.parameters(x.shape[1], dtype)
    dy = inputs.normal(x.shape, dtype, seed=1)
    tx = torch.tensor(x)
    if memory_format is not None:
        tx = tx.to(memory_format=memory_format)
        x = np.asarray(tx.numpy())
    tx.requires_grad_(True)
    tg, tb = (torch.tensor(a, requires_grad=True) if affine else None for a in (gamma, beta))
    tm, tv = (torch.tensor(a) if track else None for a in (mean, var))
    if not track:
        mean = var = None
    if not affine:
        gamma = beta = None
    ty = torch.nn.functional.batch_norm(tx, tm, tv, tg, tb, training=training, momentum=momentum, eps=eps)
    ty.backward(torch.tensor(dy))

    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, mean, var, training=training, momentum=momentum, eps=eps)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, ctx)
    close = CLOSE[dtype]
    np.testing.assert_allclose(y, ty.detach().numpy(), **close)
    np.testing.assert_allclose(dx, tx.grad.numpy(), **close)
    if affine:
        n = x.size // x.shape[1]
        np.testing.assert_allclose(dgamma, tg.grad.numpy(), rtol=close["rtol"], atol=close["atol"] * n**0.5)
        np.testing.assert_allclose(dbeta, tb.grad.numpy(), rtol=close["rtol"], atol=close["atol"] * n**0.5)
    if track:
        np.testing.assert_allclose(mean, tm.numpy(), **close)
        np.testing.assert_allclose(var, tv.numpy(), **close)
    return y, ty


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, training, dtype):
    compare(inputs.normal(shape, dtype), dtype, training=training)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_momentum(momentum):
    compare(inputs.normal((5, 5, 5), np.float64), np.float64, momentum=momentum)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("eps", [0.6, 1e-3])
def test_eps(eps, training):
    compare(inputs.normal((5, 5, 5), np.float64), np.float64, eps=eps, training=training)


@pytest.mark.parametrize("track", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_missing_parameters(affine, track):
    compare(inputs.normal((5, 5, 5), np.float64), np.float64, affine=affine, track=track)


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        pytest.param((4, 6, 9, 11), torch.channels_last, id="channels_last"),
        pytest.param((2, 6, 3, 4, 5), torch.channels_last_3d, id="channels_last_3d"),
    ],
)
def test_memory_formats(shape, memory_format, training, dtype):
    y, ty = compare(inputs.normal(shape, dtype), dtype, training=training, memory_format=memory_format)
    size = np.dtype(dtype).itemsize
    assert y.strides == tuple(size * s for s in ty.stride()), "y lies in memory otherwise than PyTorch's"


def test_axis_last_is_a_permuted_torch():
    x = inputs.normal((4, 9, 11, 6), np.float64)
    y, _ = fastbn.batch_norm_forward(x, axis=-1)
    ty = torch.nn.functional.batch_norm(torch.tensor(x).permute(0, 3, 1, 2), None, None, training=True)
    np.testing.assert_allclose(y, ty.permute(0, 2, 3, 1).numpy(), **CLOSE[np.float64])


def test_relu_and_residual():
    x, r, dy = (inputs.normal((4, 6, 5, 7), np.float64, seed=s) for s in range(3))
    gamma, beta, *_ = inputs.parameters(6, np.float64)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, gamma, beta, r)]
    tx, tg, tb, tr = leaves
    ty = torch.relu(torch.nn.functional.batch_norm(tx, None, None, tg, tb, training=True) + tr)
    ty.backward(torch.tensor(dy))
    y, ctx = fastbn.batch_norm_forward(x, gamma, beta, activation="relu", residual=r)
    np.testing.assert_allclose(y, ty.detach().numpy(), **CLOSE[np.float64])
    for ours, leaf in zip(fastbn.batch_norm_backward(dy, ctx), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), **CLOSE[np.float64])


def test_fastbn_is_nearer_to_the_truth():
    # The reason for fastbn's float64 statistics: mean 1e4, std 1e-2 in float32.
    x = inputs.values("1e4 +- 1e-2", (8, 3, 32, 32))
    exact, _ = fastbn.batch_norm_forward(x.astype(np.float64))
    y, _ = fastbn.batch_norm_forward(x)
    ty = torch.nn.functional.batch_norm(torch.tensor(x), None, None, training=True).numpy()
    ours, theirs = np.abs(y - exact).max(), np.abs(ty - exact).max()
    assert ours <= 5e-6, ours  # bound 1e-6 * max(1, |y|), |y| up to 5
    assert ours < theirs
