"""What commands that take a recipe share: flags beside a recipe file, of which the flags win."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.config import calibration_fields, load_recipe
from niwaki.errors import InputError


def given(**flags: Any) -> dict[str, Any]:
    """The flags that were set; the others leave the recipe as it is."""
    return {name: value for name, value in flags.items() if value is not None}


def recipe_values(
    recipe: Path | None, text: dict[str, Any], options: Sequence[str] | None, **flags: Any
) -> dict[str, Any]:
    """The fields of a recipe: of the file, then `text` (those of its calibration), `options` key=value, and `flags`."""
    values: dict[str, Any] = load_recipe(recipe) if recipe else {}
    values |= given(**flags)
    values["calibration"] = {**calibration_fields(values.get("calibration")), **given(**text)}
    values["options"] = {**(values.get("options") or {}), **_key_values(options or [])}
    return values


def _key_values(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"--set {pair!r}: expected key=value")
        found[key] = value
    return found
