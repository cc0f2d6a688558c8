"""What commands share: flags beside a recipe file, of which the flags win, and what is refused at once.

torch takes seconds to load. What is only a slip (a name, a target, a path) is refused before, by the functions that are
asked again where the work is done.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.config.recipe import calibration_fields, load_recipe, make_recipe, parse_target
from niwaki.config.sources import check_sources, check_tasks, model_folder
from niwaki.errors import InputError
from niwaki.methods.registry import check_names


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


def check_recipe(values: dict[str, Any]) -> None:
    """Refuses a recipe with a method, a target or a text file that cannot be."""
    recipe = make_recipe(values)
    chain = check_names(recipe.method)
    target = recipe.target or ""
    for part in target.split("+") if len(chain) > 1 else [target]:
        if part:
            parse_target(part)
    check_sources(recipe.calibration.files)


def check_given(*models: str, data: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> None:
    """Refuses models, texts and task files that cannot be where they are said to be."""
    for model in models:
        model_folder(model)
    check_sources(data or ())
    check_tasks(tasks or ())


def _key_values(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"--set {pair!r}: expected key=value")
        found[key] = value
    return found
