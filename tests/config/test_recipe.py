"""Recipes and options: the texts that parse, and one clear line for each that does not."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from pydantic import BaseModel

from niwaki.compression.allocation import OwlConfig
from niwaki.config.recipe import (
    Calibration,
    Recipe,
    current_name,
    explanations,
    load_recipe,
    make_options,
    make_recipe,
)
from niwaki.errors import InputError, TargetError
from niwaki.methods.registry import METHODS, get_method
from niwaki.runtime.contextual.predictor_files import Running, read_running


@pytest.mark.parametrize(("written", "target"), [("0.5", "0.5"), ("'2:4'", "2:4"), (".25", "0.25")])
def test_targets_in_yaml(tmp_path: Path, written: str, target: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: wanda\ntarget: {written}\n")
    assert make_recipe(load_recipe(path)).target == target


@pytest.mark.parametrize("written", ["2:4", "4:8", "1:4", "8:16"])
def test_an_unquoted_n_of_m_is_told_to_be_quoted(tmp_path: Path, written: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: wanda\ntarget: {written}\n")
    with pytest.raises(TargetError, match=f'quote it, target: "{written}"'):
        make_recipe(load_recipe(path))


@pytest.mark.parametrize(
    "given", ["a.txt", Path("a.txt"), ["a.txt"], (Path("a.txt"),), {"files": "a.txt"}, {"files": [Path("a.txt")]}]
)
def test_calibration_may_be_one_file_or_many(given: object) -> None:
    recipe = make_recipe({"method": "wanda", "target": "0.5", "calibration": given})
    assert recipe.calibration.files == ("a.txt",)


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text('method: wanda\ntarget: "2:4"\ncalibration: {files: [a.txt], samples: 8, seq_len: 16}\n')
    recipe = make_recipe(load_recipe(path))
    assert (recipe.method, recipe.target, recipe.calibration.samples) == ("wanda", "2:4", 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "expected a mapping"),
        ("resume: true\n", "unknown recipe field 'resume'.*recipe.yaml"),
        ("options: [a]\n", "options: expected a mapping"),
        ("a: [", "is not YAML"),
        (None, "cannot read the recipe"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_recipe_problems_name_the_field() -> None:
    with pytest.raises(InputError, match="unknown recipe field 'metod': did you mean 'method'"):
        make_recipe({"metod": "wanda", "target": "0.5"})
    with pytest.raises(InputError, match="method is missing: give one"):
        make_recipe({"target": "0.5"})
    with pytest.raises(InputError, match="calibration: expected files or a mapping"):
        make_recipe({"method": "wanda", "target": "0.5", "calibration": 5})
    with pytest.raises(InputError, match=r"calibration\.samples"):
        make_recipe({"method": "wanda", "target": "0.5", "calibration": {"samples": 0}})


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    pass


def test_a_method_without_options_says_so() -> None:
    with pytest.raises(InputError, match="m has no options, got 'x'"):
        make_options(NoOptions, {"x": 1}, "m")


@dataclass(frozen=True, kw_only=True)
class Options:
    count: int = 1
    share_frac: float = 0.5
    flag: bool = False


@pytest.mark.parametrize("owner", [*METHODS, "owl", "recipe", "calibration"])
def test_every_field_has_an_explanation(owner: str) -> None:
    models: dict[str, type[BaseModel]] = {"recipe": Recipe, "calibration": Calibration}
    if owner in models:
        config: type = models[owner]
        names = list(models[owner].model_fields)
    else:
        config = OwlConfig if owner == "owl" else get_method(owner).config
        names = [entry.name for entry in fields(config)]
    explained = explanations(config)
    for name in names:
        assert re.match(r"[A-Zαλ].*\.$", explained.get(name, "")), f"{owner}.{name}"


def test_options_of_an_earlier_version_keep_their_spelling() -> None:
    config = make_options(get_method("shadow").config, {"unit": "prompt", "stand_in": "0.25", "trust": False}, "shadow")
    assert (config.mean_fill, config.shrinkage) == (0.25, False)
    assert current_name("most_rounds") == "max_rounds"
    assert read_running({"stand_in": 0.7, "least_prompt": 3}) == Running(mean_fill=0.7, min_prompt=3)


def test_options_are_coerced_and_checked() -> None:
    assert make_options(Options, {"count": "3", "share_frac": "0.1", "flag": "true"}, "m") == Options(
        count=3, share_frac=0.1, flag=True
    )
    with pytest.raises(InputError, match="unknown option of m 'cuont': did you mean 'count'"):
        make_options(Options, {"cuont": "3"}, "m")
    for name, value in [("count", "1.5"), ("flag", "maybe"), ("share_frac", "x")]:
        with pytest.raises(InputError, match=f"m option {name}: expected"):
            make_options(Options, {name: value}, "m")
