"""Where code lives: which part of the package imports which, which parts run SQL, and what each folder's map names."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import notifyq

from ..conftest import FIRST

PACKAGE = Path(notifyq.__file__).parent
ROOT = Path(__file__).parents[2]
EDGES = {"cli", "demo", "django", "embedded", "testing"}
MOST_LINES, MOST_FUNCTION_LINES = 350, 60
LONGER = {"embedded/server.py": 425}  # exceptions, which CONTRIBUTING.md names; they grow no longer
RUNS_SQL = {"client", "worker", "database"} | EDGES


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The modules of notifyq that `name` imports, in functions and for types too."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            submodules = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {module}
    return found & MODULES.keys()


IMPORTS = {name: imports_of(name) for name in MODULES}


def part(module: str) -> str:
    """The folder of a module; its own name at the top."""
    return [*module.split("."), ""][1]


def test_imports_of_every_kind_are_seen() -> None:
    """One is relative, one for types only, one in a function. If they weren't seen, the tests below could not fail."""
    assert "notifyq.worker.decide" in IMPORTS["notifyq.worker.claim"]
    assert "notifyq.worker.runners" in IMPORTS["notifyq.worker.maintenance"]
    assert "notifyq.demo.stage" in IMPORTS["notifyq.demo"]


def test_the_wings_import_neither_each_other_nor_an_edge() -> None:
    for wing, other in (("client", "worker"), ("worker", "client")):
        for module in MODULES:
            if part(module) == wing:
                reached = {part(target) for target in IMPORTS[module]}
                assert not reached & ({other} | EDGES), module


def test_nothing_below_imports_an_edge() -> None:
    for module, targets in IMPORTS.items():
        if part(module) not in EDGES and module != "notifyq.__main__":
            local = {target for target in targets if part(target) in EDGES}
            assert not local, f"{module} imports {local}"


def test_no_import_cycle() -> None:
    """Imports for types and imports in functions count."""
    TopologicalSorter({name: targets - {name} for name, targets in IMPORTS.items()}).prepare()


def test_only_some_folders_run_sql() -> None:
    running = set()
    for module, path in MODULES.items():
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        if "SQL" in names:
            running.add(part(module))
            assert part(module) in RUNS_SQL, module
    assert running >= {"client", "worker", "database"}


def test_each_folder_has_a_map_of_its_modules() -> None:
    """The docstring of its `__init__`. That of the whole package is in CONTRIBUTING.md."""
    folders = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert len(folders) >= 9
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        named = set(re.findall(r"\w+", text))
        assert {path.stem for path in folder.glob("[!_]*.py")} <= named, folder


def test_lines_of_sql_end_at_column_120() -> None:
    """Python's are held by the formatter, which doesn't read SQL."""
    paths = [ROOT / "schema.sql", *PACKAGE.rglob("*.sql"), *(ROOT / "tests").rglob("*.sql")]
    assert len(paths) > 80
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120, f"{path}:{number}"


def test_files_and_functions_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(PACKAGE).as_posix()
        lines = len(text.splitlines())
        most = LONGER.get(name, MOST_LINES)
        assert lines <= most, name
        assert name not in LONGER or lines > MOST_LINES, f"{name} is no exception any more"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MOST_FUNCTION_LINES, f"{name}: {node.name}"


def test_a_claimer_keeps_little() -> None:
    """What it does next is decide.py's, so what that depends on is in the State."""
    tree = ast.parse((PACKAGE / "worker/claim.py").read_text(encoding="utf-8"))
    [claimer] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Claimer"]
    kept = {
        node.attr
        for node in ast.walk(claimer)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert 10 < len(kept) <= 15, kept


def test_the_files_that_begin_first_are_there() -> None:
    """A file that was renamed would begin among the last, and nothing else would say so."""
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(FIRST) <= names
