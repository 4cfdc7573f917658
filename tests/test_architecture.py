"""The map in CONTRIBUTING.md, read from the sources: imports point one way, files are short, the two backends have one interface.

    layers, functional, ...  ->  arguments  ->  cpu, cuda  ->  kernels

with common beside them, which knows the tables' rows and nothing else of the kernels. Imports inside functions count as any others, and
so do modules that `import_module` is given by name: a module that may not be known is not to be known late either.
"""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 350


def module_of(path):
    """The name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastbn" else ("fastbn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for folder in ("fastbn", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))
         if not path.is_relative_to(ROOT / "fastbn" / "kernels")}  # fmt: skip


@cache
def tree(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def known(name):
    """The module of this project that a dotted name is, or is in; None for others."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


def text(node):
    """A string, its part before the first hole if it has any."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def imported(node, module):
    """Dotted names that a statement or a call imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        home = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            home = home.rpartition(".")[0]
        base = ".".join(filter(None, (home if node.level else "", node.module)))
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args:
        function = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if function in ("import_module", "__import__"):
            return [text(node.args[0]).rstrip(".")]
    return []


def body(module):
    """All nodes of a file, but those for type checkers alone."""
    queue = [tree(module)]
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            queue.extend(node.orelse)
        else:
            queue.extend(ast.iter_child_nodes(node))


@cache
def imports(module):
    """The modules of this project that a file imports, in any place."""
    names = [name for node in body(module) for name in imported(node, module)]
    return {known(name) for name in names} - {None, module}


def folder(module):
    """Which part of the map a module belongs to: "", arguments, common, cpu, cuda, kernels, kernels.cpu, kernels.cuda."""
    parts = module.split(".")[1:]
    if FILES[module].name != "__init__.py":
        parts = parts[:-1]
    return ".".join(parts[:2]) if parts[:1] == ["kernels"] else ".".join(parts[:1])


# From where to where, besides the folder itself. "" are the files of fastbn/ itself.
ALLOWED = {
    "": {"arguments", "common"},
    "arguments": {"common", "cpu", "cuda"},
    "common": {"kernels"},
    "cpu": {"common", "kernels", "kernels.cpu"},
    "cuda": {"common", "kernels", "kernels.cuda"},
    "kernels": set(),
    "kernels.cpu": {"kernels"},
    "kernels.cuda": {"kernels"},
}
# By name: what a single file may import besides.
EXCEPTIONS = {
    "fastbn": {"fastbn.cpu.threads"},  # a lock against forks in the middle of an import
    # Beside the road: they report what the CPU's backend would do, and have done.
    "fastbn.config": {"fastbn.cpu.crew", "fastbn.cpu.threads", "fastbn.kernels.cpu.cache"},
    "fastbn.tools": {
        *(f"fastbn.cpu.{name}" for name in ("crew", "dispatch", "memory", "plan", "threads", "weights")),
        "fastbn.kernels.cpu.variants",
    },
    "fastbn.kernels.cpu.cache": {"fastbn"},  # for __version__, a part of the cache's key
}


def test_the_sources_are_found():
    assert {folder(module) for module in FILES} == set(ALLOWED)
    assert imports("fastbn.functional") >= {"fastbn.arguments.checks", "fastbn.arguments.plans", "fastbn.statistics"}
    assert "fastbn.kernels.cpu.variants" in imports("fastbn.cpu.dispatch")  # inside a function
    assert "fastbn.kernels.cuda.target" in imports("fastbn.cuda.loading")  # by name
    assert "fastbn.kernels.cuda" in imports("fastbn.cuda.loading")  # by a name that is put together
    assert "fastbn.layers" not in imports("fastbn")  # for type checkers


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    found = imports(module) - EXCEPTIONS.get(module, set())
    wrong = {other for other in found if folder(other) not in ALLOWED[folder(module)] | {folder(module)}}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_all_that_is_allowed_is_needed():
    for module, others in EXCEPTIONS.items():
        assert others <= imports(module)
        assert not {folder(other) for other in others} & ALLOWED[folder(module)]
    found = {(folder(module), folder(other)) for module in FILES for other in imports(module) - EXCEPTIONS.get(module, set())}
    assert {(here, there) for here, others in ALLOWED.items() for there in others} <= found


def test_common_knows_the_rows_and_nothing_else_of_the_kernels():
    found = {other for module in FILES if folder(module) == "common" for other in imports(module) if folder(other) == "kernels"}
    assert found == {"fastbn.kernels.rows"}


def test_no_cycle():
    """Files can be read, and imported, from the bottom up; __version__ alone comes from the top."""
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(imports(module)):
                if (module, other) != ("fastbn.kernels.cpu.cache", "fastbn"):
                    visit(other)
            open_.pop()
            done.add(module)

    for module in FILES:
        visit(module)
    assert done == set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST


# -------------------------------------------------------------------------------------------------------------- the backends


def is_backend(node):
    """Whether an expression is a backend: `backend`, or `plan.backend` of whatever plan."""
    return getattr(node, "id", None) == "backend" or getattr(node, "attr", None) == "backend"


def interface():
    """What the layers above take from a backend: names of functions, and of others."""
    called, others = set(), set()
    for module in FILES:
        if folder(module) in ("", "arguments"):
            nodes = list(body(module))
            functions = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
            for node in nodes:
                if isinstance(node, ast.Attribute) and is_backend(node.value):
                    (called if id(node) in functions else others).add(node.attr)
    return called, others


CALLED, OTHERS = interface()
CPU, CUDA = (importlib.import_module(f"fastbn.{name}.backend") for name in ("cpu", "cuda"))


def test_the_interface_is_found():
    assert {"forward", "inference", "moments", "forward_apply", "backward", "backward_reduce", "backward_apply", "separate"} <= CALLED
    assert sorted(OTHERS) == ["COUNTS_WEIGHTS", "LIBRARY"]


@pytest.mark.parametrize("name", sorted(CALLED))
def test_twins_have_the_same_functions(name):
    """With the same parameters in the same order, and the same defaults: whoever reads one knows the other."""
    ours, theirs = (inspect.signature(getattr(backend, name)).parameters.values() for backend in (CPU, CUDA))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_twins_have_the_same_constants(name):
    assert type(getattr(CPU, name)) is type(getattr(CUDA, name))


def test_twins_have_no_other_public_functions():
    """What one backend can do and the other cannot would be called by nobody, or by mistake."""
    for backend in (CPU, CUDA):
        own = {n for n, f in vars(backend).items() if inspect.isfunction(f) and f.__module__ == backend.__name__ and n[0] != "_"}
        assert own <= CALLED
