"""NumPy or CuPy, by the name of the device."""

import importlib

import numpy as np


class DeviceError(Exception):
    """The device that was asked for is not there; the message says what to do."""


def array_module(device):
    """numpy for "cpu", cupy for "cuda". DeviceError without CuPy or without a GPU."""
    if device == "cpu":
        return np
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise DeviceError(
            f"--device {device} needs CuPy ({error}): pip install 'fastbn[cuda12]' or 'fastbn[cuda13]', or use --device cpu"
        ) from error
    try:
        cupy.zeros(1)
    except Exception as error:  # CuPy has several ways to say so: no driver, no device, a device that is taken
        raise DeviceError(f"--device {device}: CuPy finds no usable GPU ({error}); use --device cpu") from error
    return cupy


def synchronise(xp):
    """Wait for the GPU, whose work is asynchronous; without it a clock would measure launches."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
