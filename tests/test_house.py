"""How the package is built: one name for one thing, imports in one direction, small documented functions."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "anyflow_cli"

# Each room may import from itself and from those after it.
ROOMS = (
    ("cli",), ("bench",), ("plan",), ("doctor", "export", "inspection"), ("evaluate",), ("train",),
    ("synthesize",), ("sample",),
    ("runs",), ("data",), ("model",), ("recipe",), ("utils",), ("flow",), ("errors",),
)  # fmt: skip
DATA_AVOIDS = ("model", "recipe")
IDIOMS = {"log", "main"}  # a module's logger, and the entry points of two programs
LONGEST = 80  # lines of a function
SHORT = 5  # lines: a private function below, with one caller, could stand in its place
INLINEABLE = 43  # how many there may be; lower it when there are fewer


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name, without the package's own."""
    files = sorted(PACKAGE.rglob("*.py"))
    named = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): ast.parse(file.read_text()) for name, file in named.items()}


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in targets:
            yield from (leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name))


def imported(tree: ast.AST, *, deferred: bool) -> Iterator[str]:
    """Dotted names of the package's modules that a tree imports, except for type checking.

    Args:
        tree: What is searched.
        deferred: Whether imports inside functions count.
    """
    for node in ast.iter_child_nodes(tree):
        checks_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if checks_types or (isinstance(node, ast.FunctionDef) and not deferred):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            base = (node.module or "").removeprefix(PACKAGE.name).removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                yield full if full in modules() else base
        yield from imported(node, deferred=deferred)


def level(module: str) -> int:
    """Place of a module's room in the order."""
    return next(number for number, rooms in enumerate(ROOMS) if module.partition(".")[0] in rooms)


def test_a_public_name_is_defined_in_one_module() -> None:
    places = defaultdict(set)
    for module, tree in modules().items():
        for name in defined(tree):
            if not name.startswith("_") and name not in IDIOMS:
                places[name].add(module)
    twice = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert twice == {}


def test_imports_go_downwards() -> None:
    wrong = []
    for module, tree in modules().items():
        if module in ("", "__init__", "__main__"):
            continue
        for other in imported(tree, deferred=True):
            upwards = other and level(other) < level(module)
            if upwards or (module.startswith("data.") and other.partition(".")[0] in DATA_AVOIDS):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {name: set(imported(tree, deferred=True)) for name, tree in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_function_is_long() -> None:
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)] == []


def test_few_private_functions_are_short_and_called_once() -> None:
    found = []
    for module, tree in modules().items():
        used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.decorator_list:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 1
                if lines < SHORT and used.count(node.name) == 1:
                    found.append(f"{module}.{node.name}")
    assert len(found) <= INLINEABLE, found
