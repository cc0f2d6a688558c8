"""The index of the benchmarks is fresh and complete, and no script imports another one."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from benchmarks import index

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))
SYSTEM = sorted((ROOT / "tests" / "system" / "serving").glob("*.py"))


def test_the_index_is_fresh() -> None:
    assert index.render() == TEXT, "run `python -m benchmarks.index`"


def test_every_result_is_in_the_index_with_a_script_that_exists() -> None:
    names = index.results()
    assert len(names) > 60
    for name in names:
        assert f"(results/{name})" in TEXT, name
        modules = index.modules_of(name)
        assert modules, f"{name}: say in benchmarks/index.py which script made it"
        assert all(importlib.util.find_spec(module) for module in modules), name


def test_every_script_is_in_the_index() -> None:
    scripts = list(index.scripts())
    assert len(scripts) > 25
    for module in scripts:
        assert f"python -m {module}" in TEXT or f"(../{module.replace('.', '/')}.py)" in TEXT, module


def test_every_result_has_a_claim_on_a_page_that_links_to_it() -> None:
    claims = index.claims()
    assert list(claims) == sorted(claims) and set(claims) == set(index.results(".json"))
    for name, claim in claims.items():
        assert claim.endswith(".") and 4 < len(claim.split()) <= 25, f"{name}: one sentence of at most 25 words"
        assert index.pages_of(name), f"{name}: no page links to it"


def test_recorded_commands_get_the_modules_of_today() -> None:
    old = "OMP_NUM_THREADS=2 python benchmarks/packed_linear_gpu.py --out benchmarks/results/packed-linear-h100.json"
    module, out = "benchmarks.kernels.packed_linear --device cuda", "benchmarks/results/kernels/packed-linear-h100.json"
    assert index.modern(old) == f"OMP_NUM_THREADS=2 python -m {module} --out {out}"
    assert index.modern(index.modern(old)) == index.modern(old)
    assert index.modern("python rollout_real.py --out results/none.json") == (
        "python -m tests.system.serving.reach_rollout --out results/none.json"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_script_imports_no_other_script_and_has_500_lines(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for name in (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    assert not imported & set(index.scripts())


@pytest.mark.parametrize("path", [*MODULES, *SYSTEM], ids=lambda path: path.stem)
def test_the_names_that_a_script_imports_from_niwaki_exist(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("niwaki"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                assert alias.name in dir(module) or importlib.util.find_spec(submodule), submodule
