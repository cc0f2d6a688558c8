"""The worked example of CONTRIBUTING.md is a method that conforms."""

import re
import types
from pathlib import Path

import torch

from niwaki.config.recipe import NM, Sparsity
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
    from niwaki.config.recipe import load_recipe, make_recipe, parse_target
    from niwaki.methods.registry import make_steps

    found = sorted((GUIDE.parent / "examples").glob("*.yaml"))
    assert found
    for path in found:
        recipe = make_recipe(load_recipe(path))
        assert make_steps(recipe.method, recipe.options, parse_target(recipe.target))
