"""Every Python example in README.md and docs/ runs and prints what the page says; links lead somewhere; examples/ run."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONAL = ("ml_dtypes", "torch")  # a page is run up to the first block that imports one that is missing


def blocks(page):
    """(line number, text) of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after another, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for line, text in blocks(page):
        for module in OPTIONAL:
            if f"import {module}" in text:
                pytest.importorskip(module, reason=f"{page.name} shows from line {line} on how fastbn works with {module}")
        if ">>>" in text:
            example = doctest.DocTestParser().get_doctest(text, namespace, page.name, str(page), line)
            report = []
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append, clear_globs=False)
            assert result.failed == 0, "".join(report)
            namespace.update(example.globs)  # the parser works on a copy
        else:
            exec(compile("\n" * line + text, str(page), "exec"), namespace)


def test_the_pages_have_examples():
    assert len(PAGES) >= 9
    for page in PAGES[1:]:
        assert blocks(page), f"{page.name} has no Python block: nothing shows that what it says holds"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_lead_to_files(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_an_example_that_is_wrong_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "wrong.md"
    page.write_text("text\n\n```python\n>>> 1 + 1\n3\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        test_examples_run(page, tmp_path, monkeypatch)


def example(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "distributed_moments.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("workers", [1, 3, 50])  # 50: some of the 48 samples' parts are empty
def test_distributed_moments(workers):
    done = example("--workers", str(workers))
    assert done.returncode == 0, done.stderr
    errors = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(errors) == workers
    # dgamma and dbeta of the whole batch in one call may be off by 1e-6 of the sum of their 9408 absolute terms, of which a hundredth is
    # left; all else differs by two roundings. A worker that used its own part's statistics is off by 1e-2.
    assert max(errors) < 1e-5


def test_distributed_moments_without_mpi4py():
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        done = example("--mpi")
        assert done.returncode == 1
        assert "pip install 'fastbn[mpi]'" in done.stderr
    else:
        pytest.skip("mpi4py is installed: its absence cannot be shown")
