"""Agreement of CONTRIBUTING.md with the code: its example, its layout, its paths."""

import ast
import re
import types
from pathlib import Path

import torch

from house.layout import ORDER
from niwaki.config.targets import NM, Sparsity
from support.models import run_method

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_example_method_works_as_written() -> None:
    source = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    assert source is not None
    method = types.ModuleType("randomly")
    exec(compile(source[1], "randomly.py", "exec"), method.__dict__)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    for target in (Sparsity(0.3), NM(2, 4)):
        found = run_method(method, weight, torch.empty(0, 16), target)
        assert int((found == 0).sum()) == target.zeros_in(6, 16)
        assert torch.equal(found[found != 0], weight[found != 0])


def test_example_recipes_are_valid() -> None:
    from niwaki.config.recipe import load_recipe, make_recipe
    from niwaki.config.targets import parse_target
    from niwaki.methods.registry import make_steps

    found = sorted((GUIDE.parent / "examples").glob("*.yaml"))
    assert found
    for path in found:
        recipe = make_recipe(load_recipe(path))
        assert make_steps(recipe.method, recipe.options, parse_target(recipe.target))


def test_the_layout_and_the_places_to_add_are_those_of_the_tree() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    source = GUIDE.parent / "src" / "niwaki"
    layout = text.partition("## Layout")[2].partition("## Where to add")[0]
    places = text.partition("## Where to add")[2].partition("## Rules of the code")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", layout, re.M) for name in re.findall(r"`([\w.]+)/?`", row)]
    assert [name.removesuffix(".py") for name in named] == list(ORDER)
    for name in named:
        if not name.endswith(".py"):
            first = ast.get_docstring(ast.parse((source / name / "__init__.py").read_text(encoding="utf-8"))) or ""
            assert first, f"{name} does not say what lives there"
    found = [path for path in re.findall(r"`([\w/.]+(?:\.py|/))`", places) if "NAME" not in path]
    assert len(found) > 10
    for path in found:
        assert any((base / path).exists() for base in (source, GUIDE.parent)), path
    named = re.findall(r"((?:`[\w.]+`(?:, | and | or )?)+) (?:of|in) `([\w/]+\.py)`", places)
    assert len(named) > 20
    for names, path in named:
        content = (source / path).read_text(encoding="utf-8") if "NAME" not in path else None
        for name in re.findall(r"`([\w.]+)`", names) if content else []:
            assert "NAME" in name or re.search(rf"\b{name}\b", content or ""), f"{path} has no {name}"
