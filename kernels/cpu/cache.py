"""The disk cache of compiled kernels: one file for each variant of a program, named by all that its code depends on.

Numba's own cache keeps one index for a function; it is written without a lock, so processes that start together can bind a
signature to another's code, and a damaged file raises. Here each variant has a file of its own, written under a temporary name
and renamed, with a digest over its name and content. Anything unexpected while reading or writing means: compile, as if there were
no file.

Files are pickles, as Numba's are: whoever can write them can run code as you. So the folder is made for you alone (mode 0700), a
folder or a file that another user owns or may write is not used, and nothing is unpickled before its digest was found right. The
digest finds damage; it is no signature. See SECURITY.md.
"""

import hashlib
import os
import pickle
import platform
import stat
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import llvmlite
import numba
import numpy
from numba.core.compiler import CompileResult

import fastbn

DIGEST = hashlib.sha256().digest_size
# Numba's settings that change the code it makes. The processor's name and features are in the key by themselves.
SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "DISABLE_INTEL_SVML")


@lru_cache(maxsize=1)
def folder():
    """The cache's folder, or None where there is none: FASTBN_CACHE=0, or no folder of the user's own."""
    if os.environ.get("FASTBN_CACHE", "1") == "0":
        return None
    chosen = os.environ.get("FASTBN_CACHE_DIR")
    try:
        if chosen:
            path = Path(chosen).expanduser().absolute()
        else:
            from platformdirs import user_cache_dir

            path = Path(user_cache_dir("fastbn", appauthor=False))
        # A user without a home has "~/.cache": not a place to make, or to trust, in whatever folder the process happens to be.
        if not path.is_absolute():
            return None
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if _is_mine(path.stat()) else None
    except (OSError, RuntimeError, ValueError, ImportError):
        return None


def _is_mine(status):
    """Whether the user of this process owns a file or folder, and nobody else may write it."""
    if not hasattr(os, "getuid"):  # Windows: the user's cache folder is the user's
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@lru_cache(maxsize=1)
def sources():
    """A digest of every file of the CPU kernels, so that an edited helper is noticed."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("simd/*.py"), *here.parent.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key(name, signature, target):
    """The file name of a variant: a digest of sources, versions, processor (in `target`), settings and signature."""
    versions = (fastbn.__version__, numba.__version__, llvmlite.__version__, numpy.__version__, sys.version, platform.platform())
    settings = tuple(getattr(numba.config, name, None) for name in SETTINGS)
    parts = (sources(), *versions, *target, settings, str(signature))
    return f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.fastbn"


def pack(name, payload):
    """A file's content: a digest over the file's name and the payload, and the payload."""
    return hashlib.sha256(name.encode() + payload).digest() + payload


def unpack(path):
    """The payload of a file, or None if it is damaged, another file's, or not the user's own."""
    with open(path, "rb") as file:
        if not _is_mine(os.fstat(file.fileno())):
            return None
        content = file.read()
    payload = content[DIGEST:]
    return payload if payload and pack(path.name, payload) == content else None


class KernelCache:
    """What a Numba dispatcher asks of its cache: `load_overload` and `save_overload`, for its one signature."""

    def __init__(self, name):
        self.name = name
        self.cache_path = str(folder() or "")

    def _path(self, signature, context):
        root = folder()
        return root and root / key(self.name, signature, context.codegen().magic_tuple())

    def load_overload(self, sig, target_context):
        """The compiled variant, or None for any reason at all."""
        target_context.refresh()
        try:
            path = self._path(sig, target_context)
            payload = unpack(path) if path else None
            result = CompileResult._rebuild(target_context, *pickle.loads(payload)) if payload else None
        except Exception:  # a file that cannot be used is a file that is not there
            return None
        return result if result is not None and result.signature.args == tuple(sig) else None

    def save_overload(self, sig, data):
        """Keep a compiled variant; failing to is no error."""
        with suppress(Exception):
            path = self._path(sig, data.target_context)
            if path is None:
                return
            content = pack(path.name, pickle.dumps(data._reduce(), protocol=pickle.HIGHEST_PROTOCOL))
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise

    def enable(self):
        """Nothing to do: the environment decides."""

    def disable(self):
        """Nothing to do: the environment decides."""

    def flush(self):
        """Nothing to do: files are never stale, a changed kernel has another name."""
