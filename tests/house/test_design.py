"""Design rules that a machine can check: order of imports, sizes, public names, clean errors."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import niwaki
from house.layout import ORDER
from house.measures import circles, module_files
from niwaki import errors
from niwaki.methods.registry import METHODS, get_method

SOURCE = Path(niwaki.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

LAYOUT = {"__init__", *ORDER}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MIN_MODULE_LINES = 500, 60, 60

# Larger or smaller than the rule, each with its reason.
SIZE_EXCEPTIONS: dict[str, str] = {
    "cli.export": "each command has a file of its own",
    "cli.generate": "each command has a file of its own",
}


MODULES = module_files(SOURCE)


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, lazily or not, outside `if TYPE_CHECKING`."""
    typing_only = {
        id(inner)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "niwaki":
            base = node.module.partition(".")[2]
            inner = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {name if name in MODULES else base for name in inner}
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("niwaki.")}
    return found - {""}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items() if name}


def test_the_layout_is_what_one_sees() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert {entry.removesuffix(".py") for entry in entries} == LAYOUT
    assert len(entries) <= 18


@pytest.mark.parametrize("name", IMPORTS, ids=str)
def test_imports_point_one_way(name: str) -> None:
    folder = name.split(".")[0]
    for other in IMPORTS[name]:
        assert ORDER.index(other.split(".")[0]) <= ORDER.index(folder), f"{name} imports {other}, which stands above"


def test_a_circle_is_found_through_any_number_of_files() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_no_circle_between_files_or_folders() -> None:
    """Count lazy imports too. A folder is a package at any depth; one that holds the other makes none."""
    assert circles(IMPORTS) == []
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    folder = {name: name if name in packages else name.rpartition(".")[0] for name in MODULES}
    graph: dict[str, set[str]] = {package: set() for package in packages if package}
    for name, others in IMPORTS.items():
        if folder[name]:
            found = {folder[other] for other in others if other in folder}
            graph[folder[name]] |= {
                other
                for other in found
                if other and not f"{other}.".startswith(f"{folder[name]}.") and not folder[name].startswith(f"{other}.")
            }
    assert circles(graph) == []


def test_methods_import_no_other_method_and_the_walk_names_none() -> None:
    for name in METHODS:
        for other in IMPORTS[f"methods.{name}"]:
            assert other.removeprefix("methods.") not in METHODS, f"{name} imports {other}"
    walk = (SOURCE / "compression" / "walk.py").read_text(encoding="utf-8")
    assert not [name for name in METHODS if re.search(rf"\b{name}\b", walk)]


def test_general_modules_import_no_private_name() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("niwaki"):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                assert set(private) <= {"_cpu"}, f"{path.name} imports {private}"


def sizes_broken() -> set[str]:
    """Return the modules, and functions as module:function, that break a rule of size."""
    found = set()
    importers = {name: [one for one, others in IMPORTS.items() if name in others] for name in MODULES}
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        small = lines < MIN_MODULE_LINES and len(importers[name]) == 1 and path.name != "__init__.py"
        if small or lines > MAX_FILE_LINES:
            found.add(name)
        for node in ast.walk(TREES[path]):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                found.add(f"{name}:{node.name}")
    return found


def test_sizes() -> None:
    """Check that a file has at most 500 lines, a function 60, and a module under 60 lines two importers."""
    assert sizes_broken() == set(SIZE_EXCEPTIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_and_public_functions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), path
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    members = [node for owner in classes if not owner.name.startswith("_") for node in owner.body]
    for node in [*tree.body, *members]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert _is_ellipsis(node) or ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name}"


def _is_ellipsis(node: ast.FunctionDef | ast.ClassDef) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.value.value is ...


def test_public_names_are_complete_sorted_and_there() -> None:
    names = [name for name in niwaki.__all__ if name[0].isupper()]
    functions = [name for name in niwaki.__all__ if name[0].islower()]
    assert niwaki.__all__ == sorted(names) + sorted(functions)
    for name in niwaki.__all__:
        assert callable(getattr(niwaki, name))
    tree = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__}
    assert tree == set(names)


def test_every_error_descends_from_one_base() -> None:
    for name in niwaki.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(niwaki, name), errors.NiwakiError)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = niwaki.compres  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_method_modules_tell_paper_cost_and_example(name: str) -> None:
    method = get_method(name)
    assert method.paper
    for word in ("Source:", "ost:", "niwaki compress"):
        assert word in method.doc, f"{name}: the docstring misses {word!r}"


def test_tests_never_leave_the_repository() -> None:
    outside = ".." + "/shared"
    for path in (SOURCE.parents[1] / "tests").rglob("*.py"):
        assert outside not in path.read_text(encoding="utf-8"), path


def test_no_test_file_imports_another() -> None:
    """Check that builders for several test files stand in `tests/support`."""
    for path in (SOURCE.parents[1] / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path
