"""The disk cache: cold starts side by side, damaged and foreign files, folders that cannot be used or trusted."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import subprocesses

import fastbn
from fastbn.kernels.cpu import cache

ROUNDS = int(os.environ.get("FASTBN_TEST_COLD_ROUNDS", "2"))
POSIX = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX")
# Two kernels in two signatures each, asked for in another order by every process. Prints the bits of all results. Unoptimised, as
# that compiles in half the time and the race for the files is the same.
COLD = """
import hashlib, json, sys, random
import fastbn, inputs
order = [(d, s, a) for d in ("f4", "f8") for s, a in (((4, 20, 300), 1), ((30, 20), -1))]
random.Random(int(sys.argv[1])).shuffle(order)
found = {}
for dtype, shape, axis in order:
    found[f"{dtype} {shape}"] = hashlib.sha256(fastbn.batch_norm_inference(
        inputs.normal(shape).astype(dtype), *inputs.parameters(20), axis=axis).tobytes()).hexdigest()
print(json.dumps(found, sort_keys=True))
"""
# One kernel of a few lines: what most tests here compile or load. `finish` runs it over three channels, of gamma 2 and variance 3.
FINISH = """
import numpy as np
from fastbn.kernels.cpu import cache, channels, variants
from fastbn.kernels.cpu.arguments import PLACES, Channels, Shape

def finish():
    table, absent, constants = np.zeros((channels.TABLE_ROWS, 3)), np.zeros(0), np.zeros(PLACES + 3, np.int64)
    constants[Shape._fields.index("C")], constants[PLACES - len(Channels._fields) : PLACES] = 3, 8
    vectors = [np.full(3, value) for value in (2.0, 0.0, 0.0, 3.0, 0.0)]  # gamma, beta, mean, var, low
    arrays, options = (absent, absent, None, None, None, None, *vectors, table, absent), (None, None, None)
    code = variants.compiled("one", (channels.finish_given,), "float64")
    desk, cuts = np.zeros(0, np.int64), np.array([1, 1, 3, 0, 1])  # one phase of one piece, of one task; no desk for one thread
    code(desk, cuts, 1, 0, 1, arrays, options, (1.0, 0.0, 1.0, 0.0, False, False), constants)
    right = (table[channels.INVSTD] == 0.5).all() and (table[channels.SCALE] == 1.0).all()
    dispatcher = next(iter(variants._compiled.values()))[0]
    return right, "loaded" if sum(dispatcher._cache_hits.values()) else "compiled"
"""
# Prints whether the result is right, how the variant came, and the folder.
ONE = f"{FINISH}\nprint(*finish(), cache.folder())\n"


def one(env, **options):
    """(result is right, "loaded" or "compiled", folder) in a fresh process."""
    right, how, folder = subprocesses.run(ONE, env=env, **options).split(maxsplit=2)
    assert right == "True"
    return how, folder.strip()


@pytest.fixture(scope="module")
def one_kernel(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "cache"
    assert one(environment(path)) == ("compiled", str(path))
    return path


@pytest.fixture
def folder(one_kernel, tmp_path):
    """A folder that holds one kernel."""
    return shutil.copytree(one_kernel, tmp_path / "cache")


def environment(path):
    return {"FASTBN_CACHE_DIR": str(path), "FASTBN_CACHE": None}


def only_file(path):
    (found,) = path.iterdir()
    return found


def cold(number, **env):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(subprocesses.PATHS), "NUMBA_OPT": "0", **env}
    done = subprocess.run([sys.executable, "-c", COLD, str(number)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_processes_that_start_cold(tmp_path):
    """Bit for bit the results of a process without a cache; afterwards a ninth loads what they left."""
    with ThreadPoolExecutor(9) as pool:
        uncached = pool.submit(cold, 0, FASTBN_CACHE="0")
        for k in range(ROUNDS):
            path = tmp_path / str(k)
            started = [pool.submit(cold, n, FASTBN_CACHE="1", FASTBN_CACHE_DIR=str(path)) for n in range(8)]
            assert all(process.result() == uncached.result() for process in started), f"round {k}"
            assert cold(8, FASTBN_CACHE="1", FASTBN_CACHE_DIR=str(path)) == uncached.result()
            names = sorted(p.name for p in path.iterdir())
            # a program for each of two dtypes and two layouts: one file each, no temporary ones; and one for threads that wait
            assert len(names) == 4 + (int(subprocesses.run("import fastbn; print(fastbn.get_num_threads())")) > 1), names
            assert all(name.endswith(".fastbn") for name in names)


def test_files_are_loaded_and_private(folder):
    file = only_file(folder)
    assert one(environment(folder))[0] == "loaded"
    if hasattr(os, "getuid"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


DAMAGE = {
    "empty": lambda c: b"",
    "shorter than a digest": lambda c: c[:20],
    "a digest alone": lambda c: c[:32],
    "truncated": lambda c: c[:-1],
    "half": lambda c: c[: len(c) // 2],
    "bit flipped in the digest": lambda c: flip(c, 5),
    "bit flipped in the code": lambda c: flip(c, len(c) * 3 // 4),
    "something else": lambda c: b"\x80\x04not a kernel" * 50,
}


def damaged_process(path, contents):
    """Each content in turn under the kernel's name, in one process that asks for the kernel anew each time."""
    code = f"""{FINISH}
import pathlib, pickle, sys
path, contents = pathlib.Path(sys.argv[1]), pickle.load(open(sys.argv[2], "rb"))
for content in contents:
    path.write_bytes(content)
    variants._compiled.clear()
    right, how = finish()
    assert right
    print(how, cache.unpack(path) is not None)
"""
    listed = path.parent.parent / "contents"
    listed.write_bytes(pickle.dumps(contents))
    code = code.replace("sys.argv[1]", repr(str(path))).replace("sys.argv[2]", repr(str(listed)))
    return subprocesses.run(code, env=environment(path.parent))


def test_damaged_files_are_compiled_anew(folder):
    """And replaced: the file is sound again afterwards. Once undamaged, to see that a sound file is loaded here."""
    file = only_file(folder)
    content = file.read_bytes()
    out = damaged_process(file, [content, *(damage(content) for damage in DAMAGE.values())]).splitlines()
    assert out == ["loaded True"] + ["compiled True"] * len(DAMAGE)


class Trap:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "unpickled")


def test_foreign_files_are_compiled_anew(folder, tmp_path):
    """Sound files with other content, and pickles without a right digest, which must not be loaded to find that out."""
    file, trace = only_file(folder), tmp_path / "trace"
    foreign = [
        cache.pack(file.name, pickle.dumps(("0.0.1", "of another version"))),
        cache.pack(file.name, pickle.dumps(None)),
        cache.pack("another-kernel.fastbn", file.read_bytes()[cache.DIGEST :]),
        bytes(cache.DIGEST) + pickle.dumps(Trap(trace)),
        pickle.dumps(Trap(trace)),
    ]
    assert damaged_process(file, foreign).splitlines() == ["compiled True"] * len(foreign)
    assert not trace.exists(), "a file was unpickled although its digest was wrong"


def test_a_file_under_another_kernels_name_is_not_loaded(folder):
    """As after a restored backup: content is bound to its name."""
    file = only_file(folder)
    assert cache.unpack(file) is not None
    other = file.rename(file.with_name("other.fastbn"))
    assert cache.unpack(other) is None


def test_what_the_key_depends_on(monkeypatch):
    """Another fastbn, Numba, llvmlite, NumPy, Python, processor, feature, kernel, signature or setting: another file."""
    target = ("x86_64-unknown-linux-gnu", "skylake", "+avx2,+fma")

    def key(name="kernel", signature="(int64,)", target=target):
        return cache.key(name, signature, target)

    keys = [key(), key(name="other"), key(signature="(float64,)"), key(target=(target[0], "znver4", target[2]))]
    keys.append(key(target=(*target[:2], "+avx2")))
    for place, value in (
        ("fastbn.__version__", "0"),
        ("numba.__version__", "0"),
        ("llvmlite.__version__", "0"),
        ("numpy.__version__", "0"),
        ("sys.version", "0"),
        ("sources", lambda: "0"),
        ("numba.config.OPT", 0),
        ("numba.config.BOUNDSCHECK", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastbn.kernels.cpu.cache.{place}", value)
            keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_sources_cover_every_kernel_file(tmp_path, monkeypatch):
    (tmp_path / "simd").mkdir()
    names = ("cache.py", "helper.py", "simd/helper.py")
    for name in names:
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    for name in names:
        before = cache.sources.__wrapped__()
        (tmp_path / name).write_text("a = 2\n")
        assert cache.sources.__wrapped__() != before, f"an edit of {name} is not noticed"


def test_off(tmp_path):
    path = tmp_path / "cache"
    assert one({"FASTBN_CACHE": "0", "FASTBN_CACHE_DIR": str(path)}) == ("compiled", "None")
    assert not path.exists()


@POSIX
def test_no_home(tmp_path):
    """HOME unset or unwritable, no XDG_CACHE_HOME: kernels work uncached, and nothing appears in the working folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    base = {"FASTBN_CACHE_DIR": None, "FASTBN_CACHE": None, "XDG_CACHE_HOME": None}
    # A file where the home should be: nobody, root included, can make a folder in it.
    assert one({**base, "HOME": str(tmp_path / "file")}, cwd=tmp_path / "here") == ("compiled", "None")
    # A user whom the system does not know, as in containers.
    unknown = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    out = subprocesses.run(unknown + ONE, env={**base, "HOME": None}, cwd=tmp_path / "here")
    assert out.split() == ["True", "compiled", "None"]
    assert list((tmp_path / "here").iterdir()) == []


def test_a_home_that_is_not_absolute(tmp_path, monkeypatch):
    """For a user without a home some versions of platformdirs say "~/.cache", which is a place in the working folder."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: "~/.cache/fastbn")
    monkeypatch.delenv("FASTBN_CACHE_DIR", raising=False)
    monkeypatch.delenv("FASTBN_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cache.folder.__wrapped__() is None
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_a_read_only_installation_without_a_home(tmp_path):
    """The package's own folder is never written to: an import and a call leave it as it was."""
    package = tmp_path / "site"
    package.mkdir()
    shutil.copytree(Path(fastbn.__file__).parent, package / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*package.rglob("*"), package]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(package.rglob("*"))
    env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": None, "FASTBN_CACHE_DIR": None, "FASTBN_CACHE": None}
    how = subprocesses.run(f"import sys; sys.path.insert(0, {str(package)!r})\n{ONE}\nprint(cache.__file__)", env=env).split()
    assert how[:3] == ["True", "compiled", "None"]
    assert Path(how[3]).is_relative_to(package)
    assert sorted(package.rglob("*")) == before
    for path in [package, *package.rglob("*")]:
        path.chmod(0o755)


@POSIX
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_is_not_used(mode, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.mkdir()
    path.chmod(mode)
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(path))
    monkeypatch.delenv("FASTBN_CACHE", raising=False)
    assert cache.folder.__wrapped__() is None
    path.chmod(0o755)
    assert cache.folder.__wrapped__() == path


@POSIX
def test_another_users_folder_and_file_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTBN_CACHE", raising=False)
    path = cache.folder.__wrapped__()
    file = path / "kernel.fastbn"
    file.write_bytes(cache.pack(file.name, b"payload"))
    assert cache.unpack(file) == b"payload"
    monkeypatch.setattr(os, "getuid", lambda: 123_456)
    assert cache.folder.__wrapped__() is None
    assert cache.unpack(file) is None
    monkeypatch.undo()
    file.chmod(0o622)
    assert cache.unpack(file) is None


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    """Nothing is left behind, and no exception leaves."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)

    class Result:
        target_context = type("Context", (), {"codegen": lambda self: self, "magic_tuple": lambda self: ()})()

        def _reduce(self):
            return ("a kernel",)

    def fail(*args):
        raise OSError(28, "No space left on device")

    cache.KernelCache("kernel").save_overload("()", Result())
    file = only_file(tmp_path)
    file.unlink()
    monkeypatch.setattr(os, "replace", fail)
    cache.KernelCache("kernel").save_overload("()", Result())
    assert list(tmp_path.iterdir()) == []
