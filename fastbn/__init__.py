"""Batch normalisation for NumPy and CuPy arrays.

Names are loaded when they are first used: ``import fastbn`` imports neither Numba nor CuPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, in the form that exports a name; tests/test_packaging.py compares with _HOME
    from fastbn.blocks import batch_norm_backward_apply as batch_norm_backward_apply
    from fastbn.blocks import batch_norm_backward_reduce as batch_norm_backward_reduce
    from fastbn.blocks import batch_norm_forward_apply as batch_norm_forward_apply
    from fastbn.common.context import Context as Context
    from fastbn.config import show_config as show_config
    from fastbn.cpu.threads import get_num_threads as get_num_threads
    from fastbn.cpu.threads import set_num_threads as set_num_threads
    from fastbn.folding import fold_batch_norm as fold_batch_norm
    from fastbn.functional import batch_norm_backward as batch_norm_backward
    from fastbn.functional import batch_norm_forward as batch_norm_forward
    from fastbn.functional import batch_norm_inference as batch_norm_inference
    from fastbn.functional import moments as moments
    from fastbn.layers import BatchNorm as BatchNorm
    from fastbn.statistics import Moments as Moments
    from fastbn.tools import Explanation as Explanation
    from fastbn.tools import explain as explain
    from fastbn.tools import warmup as warmup

__version__ = "0.1.0"

# Public names, and the modules that they are in.
_HOME = {
    "BatchNorm": "layers",
    "Context": "common.context",
    "Explanation": "tools",
    "Moments": "statistics",
    "batch_norm_backward": "functional",
    "batch_norm_backward_apply": "blocks",
    "batch_norm_backward_reduce": "blocks",
    "batch_norm_forward": "functional",
    "batch_norm_forward_apply": "blocks",
    "batch_norm_inference": "functional",
    "explain": "tools",
    "fold_batch_norm": "folding",
    "get_num_threads": "cpu.threads",
    "moments": "functional",
    "set_num_threads": "cpu.threads",
    "show_config": "config",
    "warmup": "tools",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastbn' has no attribute {name!r}")
    from fastbn.cpu.threads import importing  # a fork waits for it: no child inherits half an import

    with importing:
        value = getattr(import_module(f"fastbn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
