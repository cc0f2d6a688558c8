"""Flags win over the recipe file, options and calibration are merged."""

from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.flags import given, recipe_values


def test_flags_win_and_the_rest_stays(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: gptq\ntarget: 4bit\noptions: {group: 64, clip: true}\ncalibration: {samples: 9}\n")
    found = recipe_values(recipe, {"seq_len": 5, "samples": None}, ["group=32"], target="2bit", seed=None)
    assert found["method"] == "gptq" and found["target"] == "2bit" and "seed" not in found
    assert found["options"] == {"group": "32", "clip": True}
    assert found["calibration"] | {"samples": 9, "seq_len": 5} == found["calibration"]


def test_without_a_recipe_only_what_was_given_is_there() -> None:
    assert recipe_values(None, {}, None, method="rtn") == {"method": "rtn", "calibration": {}, "options": {}}
    assert given(a=1, b=None) == {"a": 1}


@pytest.mark.parametrize("pair", ["group", "=3"])
def test_options_are_key_value(pair: str) -> None:
    with pytest.raises(InputError, match="expected key=value"):
        recipe_values(None, {}, [pair])
