"""Presets are recipes: complete, overridable, and refused where they make no sense."""

from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.config.presets import PRESETS
from niwaki.config.recipe import make_recipe
from niwaki.config.targets import parse_target
from niwaki.errors import InputError
from niwaki.methods.registry import make_steps
from support.models import tiny_llama, write_texts


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("target", ["0.5", "2:4", "2bit", "4bit", "1.75bit", "2:4+4bit"])
def test_every_preset_is_a_valid_recipe(name: str, target: str) -> None:
    recipe = make_recipe({"preset": name, "target": target})
    steps = make_steps(recipe.method, recipe.options, parse_target(target))
    assert steps[-1].part(parse_target(target)) is not None


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ({"target": "2:4"}, "sparsegpt+wandapp"),
        ({"target": 0.5}, "sparsegpt+wandapp"),
        ({"target": "4bit"}, "gptq"),
        ({"target": "1.75bit"}, "trellis"),
        ({"target_bytes": "600KB"}, "trellis"),
        ({"options": {"squeeze10.salient_frac": 0.2}}, "squeeze10"),
        ({"options": {"squeeze10.salient_frac": 0.2}, "target": "2bit"}, "squeeze10"),
        ({"target": "0.5+3bit"}, "sparsegpt+wandapp+gptq"),
    ],
)
def test_the_target_decides_the_chain_of_a_preset(target: dict[str, Any], method: str) -> None:
    recipe = make_recipe({"preset": "best", **target})
    assert recipe.method == method
    rounds = [value for name, value in recipe.options.items() if name.endswith("rounds")]
    assert rounds and min(rounds) > 0


def test_a_target_that_a_preset_cannot_read_is_refused_as_without_one() -> None:
    for target, message in (("4 planes", "target"), (124, "YAML reads")):
        with pytest.raises(InputError, match=message):
            make_recipe({"preset": "best", "target": target})


def test_single_options_win_over_the_preset() -> None:
    recipe = make_recipe({"preset": "best", "target": "0.5", "options": {"wandapp.rounds": 2}})
    steps = make_steps(recipe.method, recipe.options, parse_target("0.5"))
    assert steps[1].config.rounds == 2 and steps[0].config.exchanges == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "bes"}, "did you mean 'best'"),
        ({"preset": "best", "method": "wanda"}, "brings its own method"),
        ({}, "method is missing"),
    ],
)
def test_wrong_presets_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe({"target": "0.5", **values})


def test_a_preset_runs_and_records_what_it_stood_for(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    record = niwaki.compress(
        tiny_llama(tmp_path / "model", blocks=2),
        tmp_path / "out",
        preset="balanced",
        target="2:4",
        calibration={"files": (str(text),), "samples": 10, "seq_len": 16},
        options={"wandapp.rounds": 1, "wandapp.samples": 4},
        device="cpu",
    )
    assert record["recipe"]["method"] == "sparsegpt+wandapp"
    assert record["options"]["wandapp"]["target"] == "both" and record["dense_stream"]
    assert record["result"]["zeros_frac"] == 0.5


def test_a_basis_of_your_own_wins_over_that_of_the_preset() -> None:
    assert make_recipe({"preset": "best", "target": "0.5"}).rotate == "auto"
    assert make_recipe({"preset": "best", "target": "0.5", "rotate": "none"}).rotate == "none"
    assert make_recipe({"preset": "fast", "target": "0.5"}).rotate == "none"


def test_presets_count_logits_unless_some_blocks_alone_are_compressed() -> None:
    for target, option in (("2:4", "wandapp.kl"), ("4bit", "gptq.kl"), ("1.75bit", "squeeze10.kl")):
        assert make_recipe({"preset": "balanced", "target": target}).options[option] == 1
    assert "wandapp.kl" not in make_recipe({"preset": "balanced", "target": "2:4", "blocks": "0-3"}).options
