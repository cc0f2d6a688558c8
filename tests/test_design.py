"""The rules of the house that a machine can check: import direction, sizes, the public surface, clean errors."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import niwaki
from niwaki import errors
from niwaki.methods import EVERY, get_method

SOURCE = Path(niwaki.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if "data" not in path.relative_to(SOURCE).parts)

# A module may import from its own layer and the ones above it in this list.
LAYERS = [
    ["__init__", "_hook", "errors"],
    ["presets"],
    ["config", "costs", "device", "entrance", "kernels", "keys", "loading", "sources", "writing"],
    [
        "calibration",
        "tap",
        "codes",
        "sparse",
        "sparse_tiles",
        "records",
        "packed",
        "activations",
        "learning",
        "scores",
    ],
    ["anatomy"],
    ["checkpoint", "resizing", "statistics", "structure"],
    ["block"],
    ["allocation", "stream"],
    ["budget", "contextual", "widths"],
    ["methods", "runtime"],
    ["walk", "run", "ends", "parts", "integrity"],
    ["backward"],
    ["gradients", "tracing", "trial"],
    ["card"],
    ["measured"],
    ["stages"],
    ["planning"],
    ["job"],
    ["shaping", "shadowing"],
    ["compression"],
    ["evaluation", "generation"],
    ["recovery", "exporting", "gating", "adapting", "comparing", "reporting", "benching"],
    ["rollout"],
    ["demo", "flags", "progress", "tables", "inspecting", "plan_tables", "bench_tables", "serving"],
    [
        "bench_commands",
        "comparing_commands",
        "contextual_commands",
        "evaluation_commands",
        "inspect_commands",
        "plan_commands",
        "rollout_commands",
        "serving_commands",
    ],
    ["cli"],
]
LAYER_OF = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def part_of(path: Path) -> str:
    """The layer name of a file: its top folder, or its own name."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Layer names that a file imports, lazily or not, outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "niwaki":
            parts = node.module.split(".")
            found += [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("niwaki.")]
    return [name for name in found if not name.startswith("__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    mine = part_of(path)
    assert mine in LAYER_OF, f"{mine} has no layer: add it to LAYERS"
    for name in imports_of(path):
        assert LAYER_OF[name] <= LAYER_OF[mine], f"{mine} imports {name}, which stands above it"


def test_methods_import_no_other_method_and_the_walk_names_none() -> None:
    for name in EVERY:
        tree = ast.parse((SOURCE / "methods" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("niwaki.methods."):
                assert node.module.rsplit(".", 1)[1].startswith("_"), f"{name} imports {node.module}"
    walk = (SOURCE / "walk.py").read_text(encoding="utf-8")
    assert not [name for name in EVERY if re.search(rf"\b{name}\b", walk)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    """A file fits in 350 lines (kernels 500); a function in 70 (the command line's are mostly its options)."""
    text = path.read_text(encoding="utf-8")
    limit = 500 if part_of(path) == "kernels" else 350
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 70, f"{path.name}:{node.lineno} {node.name} has {length} lines"


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


@pytest.mark.parametrize("name", EVERY)
def test_method_modules_tell_paper_cost_and_example(name: str) -> None:
    method = get_method(name)
    assert method.PAPER
    for word in ("Source:", "ost:", "niwaki compress"):
        assert word in method.__doc__, f"{name}: the docstring misses {word!r}"


def test_tests_never_leave_the_repository() -> None:
    outside = ".." + "/shared"
    for path in (SOURCE.parents[1] / "tests").rglob("*.py"):
        assert outside not in path.read_text(encoding="utf-8"), path
