"""The disk cache of compiled kernels: one file for each kernel variant, named by all that its code depends on.

Numba's own cache keeps one index for a function; it is written without a lock, so processes that start together can bind a
signature to another's code, and a damaged file raises. Here each variant has a file of its own, written under a temporary name
and renamed, with a digest over its content. Anything unexpected while reading or writing means: compile, as if there were no file.

Files are pickles, as Numba's are: whoever can write to the folder can run code as you. It is created for you alone (mode 0700),
and a folder that belongs to another user is not used.
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

DIGEST = hashlib.sha256().digest_size


@lru_cache(maxsize=1)
def folder():
    """The cache's folder, or None where there is none: FASTBN_CACHE=0, or nothing of the user's own is writable."""
    if os.environ.get("FASTBN_CACHE", "1") == "0":
        return None
    chosen = os.environ.get("FASTBN_CACHE_DIR")
    try:
        if not chosen:
            from platformdirs import user_cache_dir

            chosen = user_cache_dir("fastbn", appauthor=False)
        path = Path(chosen)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK) or _belongs_to_another(path):
            return None
    except (OSError, RuntimeError, ImportError):
        return None
    return path


def _belongs_to_another(path):
    status = path.stat()
    shared = bool(status.st_mode & stat.S_IWOTH)
    return shared or (hasattr(os, "getuid") and status.st_uid != os.getuid())


@lru_cache(maxsize=1)
def sources():
    """A digest of every file of this package, so that an edited helper is noticed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key(name, signature, target):
    """The file name of a variant: a digest of sources, versions, processor and signature."""
    parts = (sources(), numba.__version__, llvmlite.__version__, numpy.__version__, sys.version, platform.platform(), *target)
    return f"{name}-{hashlib.sha256(repr((*parts, str(signature))).encode()).hexdigest()[:32]}.fastbn"


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
            content = path.read_bytes() if path else b""
            payload = content[DIGEST:]
            if not payload or hashlib.sha256(payload).digest() != content[:DIGEST]:
                return None
            result = CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # a file that cannot be used is a file that is not there
            return None
        return result if result.signature.args == tuple(sig) else None

    def save_overload(self, sig, data):
        """Keep a compiled variant; failing to is no error."""
        path = self._path(sig, data.target_context)
        if path is None:
            return
        with suppress(Exception):
            payload = pickle.dumps(data._reduce(), protocol=pickle.HIGHEST_PROTOCOL)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(payload).digest() + payload)
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
