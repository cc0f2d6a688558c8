"""Targets, recipes and options: what parses, and one clear line for what does not."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from niwaki.compression.allocation import OwlConfig
from niwaki.config.recipe import (
    NM,
    WRITTEN_TARGETS,
    Bits,
    Calibration,
    KeepUnits,
    PrunedBits,
    Recipe,
    Sparsity,
    Target,
    current_name,
    explanations,
    load_recipe,
    make_options,
    make_recipe,
    parse_bytes,
    parse_target,
)
from niwaki.errors import InputError, TargetError
from niwaki.methods.registry import METHODS, get_method
from niwaki.runtime.contextual.predictor_files import Running, read_running


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("0.5", Sparsity(0.5)),
        ("50%", Sparsity(0.5)),
        (" 2:4 ", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("4bit", Bits(4)),
        ("1.75 bits", Bits(1.75)),
        ("2:4+4bit", PrunedBits(NM(2, 4), Bits(4))),
        (" 50% + 8 bits ", PrunedBits(Sparsity(0.5), Bits(8))),
    ],
)
def test_targets(text: str, target: object) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text", ["0", "1", "1.5", "-0.2", "nan", "4:4", "0:4", "5:4", "half", "", "0.5bit", "9bit", "2:4:8"]
)
def test_impossible_targets(text: str) -> None:
    with pytest.raises(TargetError, match="target"):
        parse_target(text)


@pytest.mark.parametrize("text", ["4bit+2:4", "2:4+0.5", "4bit+4bit", "2:4+", "+4bit", "2:4+4bit+8bit", "+"])
def test_zeros_come_before_bits(text: str) -> None:
    with pytest.raises(TargetError, match=r"zeros first, then the bits of the kept weights, such as 2:4\+4bit"):
        parse_target(text)


@pytest.mark.parametrize("text", ["5:4+4bit", "2:4+9bit", "half+4bit"])
def test_both_parts_of_a_target_are_checked(text: str) -> None:
    with pytest.raises(TargetError):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "hint"), [("50", "write 50% or 0.5"), ("2.5", "write 2.5% or 0.025"), ("150%", "50%")]
)
def test_a_percentage_without_its_sign_is_suggested(text: str, hint: str) -> None:
    with pytest.raises(TargetError, match=hint):
        parse_target(text)


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("1700000000", 1_700_000_000), ("1.7GB", 1_700_000_000), ("800 MiB", 800 * 2**20), ("3kb", 3000), ("12b", 12)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert make_recipe({"method": "squeeze10", "target_bytes": text}).target_bytes == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.7XB", "GB", "1e9", "0.0GB"])
def test_what_are_no_bytes(text: str) -> None:
    with pytest.raises(TargetError, match="expected a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("auto", "auto"), ("none", ()), ([], ()), ("7, 0,7", (0, 7)), ([3, 1], (1, 3)), (5, (5,)), ("0", (0,))],
)
def test_kept_blocks(given: object, kept: object) -> None:
    assert make_recipe({"method": "squeeze10", "target": "2bit", "keep_blocks": given}).keep_blocks == kept


@pytest.mark.parametrize("given", ["automatic", "1,", "-1", [-1], 1.5, {"a": 1}, True])
def test_what_are_no_blocks(given: object) -> None:
    with pytest.raises(TargetError, match="expected auto, none or numbers of blocks"):
        make_recipe({"method": "squeeze10", "target": "2bit", "keep_blocks": given})


def test_target_prints_as_it_is_written() -> None:
    assert [str(parse_target(text)) for text in ("0.5", "2:4", "2:4+4bit")] == ["0.5", "2:4", "2:4+4bit"]


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
    config = make_options(get_method("shadow").config, {"stand_in": "0.25", "trust": False}, "shadow")
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


def test_every_kind_of_target_describes_itself() -> None:
    assert {*WRITTEN_TARGETS, KeepUnits} == set(get_args(Target))
    explained = explanations(Recipe)["target"]
    for kind in WRITTEN_TARGETS:
        target = parse_target(kind.example)
        assert type(target) is kind and kind.words in explained and kind.example in explained
        multiple = target.columns_multiple
        assert target.zeros_in(3, 5 * multiple) >= 0, "columns in multiples of it always fit"
    with pytest.raises(TargetError) as raised:
        parse_target("half")
    assert all(kind.example in str(raised.value) for kind in WRITTEN_TARGETS)
