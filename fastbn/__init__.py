"""Batch normalisation for NumPy and CuPy arrays.

Names are loaded when they are first used: ``import fastbn`` imports neither Numba nor CuPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbn.blocks import batch_norm_backward_apply, batch_norm_backward_reduce, batch_norm_forward_apply
    from fastbn.config import show_config
    from fastbn.context import Context
    from fastbn.folding import fold_batch_norm
    from fastbn.functional import batch_norm_backward, batch_norm_forward, batch_norm_inference, moments
    from fastbn.layers import BatchNorm
    from fastbn.statistics import Moments
    from fastbn.threads import get_num_threads, set_num_threads
    from fastbn.tools import Explanation, explain, warmup

__version__ = "0.1.0"

_HOME = {
    "BatchNorm": "layers",
    "Context": "context",
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
    "moments": "functional",
    "get_num_threads": "threads",
    "set_num_threads": "threads",
    "show_config": "config",
    "warmup": "tools",
}

__all__ = [
    "BatchNorm",
    "Context",
    "Explanation",
    "Moments",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_reduce",
    "batch_norm_forward",
    "batch_norm_forward_apply",
    "batch_norm_inference",
    "explain",
    "fold_batch_norm",
    "get_num_threads",
    "moments",
    "set_num_threads",
    "show_config",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastbn' has no attribute {name!r}")
    from fastbn.threads import importing  # a fork waits for it: no child inherits half an import

    with importing:
        value = getattr(import_module(f"fastbn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
