"""What a call that fails on the way to its kernels leaves behind: running statistics, y and dx as they were."""

import inputs
import numpy as np
import pytest
from cupy_standin import on_device as gpu

import fastbn
from fastbn.kernels.cuda import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPE = (3, 4, 5, 60)  # a channel is too long for one block: statistics and normalising are two launches


class CompileError(RuntimeError):
    pass


def failing(monkeypatch, verb):
    """Kernels whose names begin with `verb` cannot be compiled; gives the names of those that could."""
    real, seen = launch.compiled, []

    def compiled(variant):
        if variant.name.startswith(verb):
            raise CompileError(variant.name)
        seen.append(variant.name)
        return real(variant)

    monkeypatch.setattr(launch, "compiled", compiled)
    return seen


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("verb", ["stats", "normalise"])
def test_a_kernel_that_cannot_be_compiled_leaves_everything(cupy, monkeypatch, axis, verb):
    x = gpu(inputs.normal(SHAPE if axis == 1 else (30, 5, 4)))
    mean, var, out = gpu(np.zeros(4, np.float32)), gpu(np.ones(4, np.float32)), cupy.zeros_like(x)
    with monkeypatch.context() as patch:
        seen = failing(patch, verb)
        with pytest.raises(CompileError, match=verb):
            fastbn.batch_norm_forward(x, running_mean=mean, running_var=var, axis=axis, out=out)
        assert len(seen) == (verb == "normalise")  # the statistics' kernel was compiled, and not launched
    assert not mean.any()
    assert (var == 1).all()
    assert not out.any()
    fastbn.batch_norm_forward(x, running_mean=mean, running_var=var, axis=axis, out=out)
    assert mean.all()
    assert out.any()


def test_a_backward_that_cannot_be_compiled_writes_nothing(cupy, monkeypatch):
    x = gpu(inputs.normal(SHAPE))
    _, ctx = fastbn.batch_norm_forward(x, gpu(np.ones(4, np.float32)))
    out = cupy.zeros_like(x)
    failing(monkeypatch, "apply")
    with pytest.raises(CompileError):
        fastbn.batch_norm_backward(x, ctx, out=out)
    assert not out.any()


def test_no_memory_for_the_workspace_leaves_everything(cupy, monkeypatch):
    def full(*arguments):
        raise MemoryError("out of memory")

    mean, var = gpu(np.zeros(4, np.float32)), gpu(np.ones(4, np.float32))
    monkeypatch.setattr("fastbn.cuda.streams.workspace", full)
    with pytest.raises(MemoryError):
        fastbn.batch_norm_forward(gpu(inputs.normal(SHAPE)), running_mean=mean, running_var=var)
    assert not mean.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_output_that_cannot_be_copied_back_leaves_the_statistics(cupy, monkeypatch, dtype):
    x = gpu(inputs.normal(SHAPE))
    out = gpu(np.zeros((*SHAPE[:-1], 2 * SHAPE[-1]), np.float32)[..., ::2])  # written through a copy
    mean, var = gpu(np.zeros(4, dtype)), gpu(np.ones(4, np.float32))
    real = type(x).__setitem__

    def refusing(self, key, value):
        if self.ndim == 4:
            raise MemoryError("out of memory")
        real(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(type(x), "__setitem__", refusing)
        with pytest.raises(MemoryError):
            fastbn.batch_norm_forward(x, running_mean=mean, running_var=var, out=out)
    assert not mean.any()
    assert (var == 1).all()
    fastbn.batch_norm_forward(x, running_mean=mean, running_var=var, out=out)
    assert mean.all()
