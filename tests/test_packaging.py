"""What is installed: a wheel that holds the kernels as fastbn.kernels, and an import that loads neither Numba nor CuPy."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_lazy(tmp_path):
    code = "import sys, fastbn; print([m for m in ('numba', 'llvmlite', 'cupy', 'numpy') if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


def test_every_public_name_loads(tmp_path):
    code = "import fastbn; print(all(getattr(fastbn, name) is not None for name in fastbn.__all__), len(set(fastbn.__all__)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).startswith("True")


def test_unknown_names_are_attribute_errors():
    import fastbn

    with pytest.raises(AttributeError, match="batch_morn"):
        fastbn.batch_morn  # noqa: B018
    assert dir(fastbn) == sorted([*fastbn.__all__, "__version__"])


def test_type_checkers_see_the_names_that_load():
    import fastbn

    tree = ast.parse((ROOT / "fastbn" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: f"fastbn.{fastbn._HOME[name.asname]}" == line.module for line in checked.body for name in line.names}
    assert seen == dict.fromkeys(fastbn.__all__, True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """A source distribution built from a copy of the sources, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "source"
    copy.mkdir()
    for name in ("fastbn", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-R", str(ROOT / name), str(copy / name), cwd=folder)
    run(sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})", cwd=copy)
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel built from the source distribution, as pip does where it finds no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder))
    run(sys.executable, "-m", "pip", "wheel", *flags, str(sdist), cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_kernels_under_fastbn(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"fastbn/kernels/cpu/planes.py", "fastbn/kernels/cuda/planes.py", "fastbn/py.typed", "fastbn/functional.py"} <= set(names)
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "bench/"))]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["numba", "numpy", "platformdirs"]


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    flags = ("--no-deps", "--quiet", "--disable-pip-version-check", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *flags, str(wheel), cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import numpy as np, fastbn; print(fastbn.__file__); "
        "y, ctx = fastbn.batch_norm_forward(np.eye(4)); print(fastbn.batch_norm_backward(y, ctx)[0].shape)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.splitlines() == [str(target / "fastbn" / "__init__.py"), "(4, 4)"]
