"""Launching kernels, in as few microseconds of host time as the installed numba-cuda allows; the caller has checked the arguments.

1. Numba's launcher, kernel[grid, block, stream](...): 31 to 116 us a launch (seen on a driver that does nothing). Always works.
2. The flat launcher: cuda.core launches the same compiled kernel with its arguments as plain words, 0.6 to 2 us (seen likewise). It
   reads a private attribute of numba-cuda, so it is used for the versions below only, and given up for good at the first surprise.

Not yet run on a GPU: both roads are written after numba-cuda's and cuda.core's sources.
"""

import logging
from functools import lru_cache

from fastbn.kernels.cuda.target import SIMULATED, numba_cuda
from fastbn.kernels.cuda.variants import compiled

# Versions (major, minor) of numba-cuda whose kernels have `_codelibrary.get_cufunc().kernel` and take arrays as `flat` writes them.
FLAT_VERSIONS = ((0, 30),)

_log = logging.getLogger("fastbn")
_flat_works = not SIMULATED
_flat_kernels = {}


class DeviceArray:
    """A contiguous 1-D view of device memory: what both launchers need to know of an array, and a reference that keeps it alive.

    `words` are Numba's seven of a 1-D array: meminfo, parent, nitems, itemsize, data, shape, strides.
    """

    __slots__ = ("base", "itemsize", "pointer", "size", "typestr", "words")

    def __init__(self, pointer, size, itemsize, typestr, base=None):
        self.pointer, self.size, self.itemsize, self.typestr, self.base = pointer, size, itemsize, typestr, base
        self.words = 0, 0, size, itemsize, pointer, size, itemsize

    @property
    def __cuda_array_interface__(self):
        """Version 3, without a stream: Numba then does not wait for one."""
        return {"shape": (self.size,), "typestr": self.typestr, "data": (self.pointer, False), "version": 3, "strides": None}


def flat(arguments):
    """The arguments of a kernel as plain words: arrays as seven, int as int64, float as float64.

    cuda.core takes an int for eight bytes and a float for a double, which is what the kernels' int64 and float64 are. Nothing of NumPy
    may be among them: it would be packed in its own size.
    """
    words = []
    for argument in arguments:
        if type(argument) is DeviceArray:
            words += argument.words
        else:
            words.append(argument)
    return words


def flat_supported(version):
    """Whether the flat launcher knows this version of numba-cuda, a string such as '0.30.4'."""
    try:
        return tuple(int(part) for part in version.split(".")[:2]) in FLAT_VERSIONS
    except ValueError:
        return False


def _flat_kernel(variant, device):
    """The kernel as cuda.core knows it: compiled, and loaded on the device."""
    key = variant, device
    function = _flat_kernels.get(key)
    if function is None:
        import numba_cuda as package

        if not flat_supported(package.__version__):
            raise RuntimeError(f"the flat launcher does not know numba-cuda {package.__version__}")
        overload = next(iter(compiled(variant).overloads.values()))
        overload.bind()
        function = _flat_kernels[key] = overload._codelibrary.get_cufunc().kernel
    return function


@lru_cache(maxsize=1024)
def _flat_configuration(blocks, threads):
    import cuda.core as core

    return core.LaunchConfig(grid=blocks, block=threads)


@lru_cache(maxsize=256)
def _flat_stream(device, handle):
    """A stream as cuda.core knows it: by handle, which the driver may give to a stream of another device once this one is gone."""
    import cuda.core as core

    return core.Stream.from_handle(handle)


def _flat_launch(variant, blocks, threads, device, stream, arguments):
    """Launch through cuda.core; any exception means that this road is closed here."""
    import cuda.core as core

    function = _flat_kernel(variant, device)
    core.launch(_flat_stream(device, stream), _flat_configuration(blocks, threads), function, *flat(arguments))


def ready(variant, device):
    """Compile a variant, and load it on the device where the flat launcher can, so that launching has little left to fail."""
    global _flat_works
    if _flat_works:
        try:
            _flat_kernel(variant, device)
            return
        except Exception as error:  # as in `launch`
            _flat_works = False
            _log.info("flat launcher not used: %s: %s", type(error).__name__, error)
    compiled(variant)


def launch(variant, blocks, threads, device, stream, arguments):
    """Run a kernel variant on `blocks` blocks of `threads` threads; `stream` is the handle (an int) of a stream of `device`."""
    global _flat_works
    if _flat_works:
        try:
            _flat_launch(variant, blocks, threads, device, stream, arguments)
            return
        except Exception as error:  # whatever is private may break in any way; Numba's launcher then does it, or says what is wrong
            _flat_works = False
            _log.info("flat launcher not used: %s: %s", type(error).__name__, error)
    kernel = compiled(variant)
    if SIMULATED:
        kernel[blocks, threads](*arguments)
    else:
        kernel[blocks, threads, numba_cuda.external_stream(stream) if stream else 0](*arguments)
