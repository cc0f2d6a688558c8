"""What a recipe asks of whom: two stages where a structured method comes first, and options by their owner.

`comp+gptq` with target `0.25+4bit` shapes the model and quantizes what is left. The second stage reads a model that
already has its shape, on the same calibration windows, and the record tells of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from niwaki.compression.allocation import OwlConfig
from niwaki.config.recipe import NM, PrunedBits, Recipe, Target, make_options
from niwaki.errors import InputError, TargetError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS, Step, make_steps

OWL_PREFIX = "owl_"


@dataclass(frozen=True)
class FirstStage:
    """The first stage, as the second knows it: its run.json, the whole recipe, the windows that both use."""

    record: dict[str, Any]
    recipe: Recipe
    windows_ST: Tensor | None
    source: str


def stages_of(recipe: Recipe) -> list[Recipe]:
    """A recipe whose chain begins with a structured method, as one of that and one of the rest; else as it is.

    Raises TargetError unless both have a target.
    """
    first, _, rest = (part.strip() for part in recipe.method.partition("+"))
    if first not in METHODS or METHODS[first].kind is not MethodKind.SHAPE or not rest:
        return [recipe]
    targets = (recipe.target or "").split("+", 1)  # the rest may have two parts itself
    if len(targets) != 2:
        raise TargetError(
            f"method {recipe.method}: expected a target for {first} and one for {rest}, such as 0.25+4bit, got "
            f"{recipe.target or recipe.target_bytes}"
        )
    own = {key: value for key, value in recipe.options.items() if key.partition(".")[0] == first}
    searched = recipe.allocation == "searched"
    shaping = {
        "method": first,
        "target": targets[0],
        "options": own,
        "allocation": "searched" if searched else "auto",
        "keep_blocks": (),
        "embeddings": "none",
    }
    after = {
        "method": rest,
        "target": targets[1],
        "options": {key: value for key, value in recipe.options.items() if key not in own},
        "allocation": "auto" if searched else recipe.allocation,
    }
    return [recipe.model_copy(update=shaping), recipe.model_copy(update=after)]


def columns_multiple(steps: Sequence[Step], target: Target) -> int:
    """What the second stage needs the number of columns of every matrix to be a multiple of."""
    groups = [step.group or 1 for step in steps]
    zeros = target.zeros if isinstance(target, PrunedBits) else target
    return math.lcm(zeros.group if isinstance(zeros, NM) else 1, *groups)


def told_of_both(record: dict[str, Any], before: FirstStage) -> dict[str, Any]:
    """run.json of the last stage, telling of the whole: the model that it began with, all options, all seconds."""
    settled = {name: record["recipe"][name] for name in ("device", "batch_tokens")}
    return record | {
        "model": before.record["model"],
        "recipe": before.recipe.model_dump(mode="json") | settled,
        "options": {**before.record["options"], **record["options"]},
        "seconds": round(before.record["seconds"] + record["seconds"], 2),
        "stages": [before.record],
    }


def split_options(recipe: Recipe, target: Target) -> tuple[OwlConfig, list[Step]]:
    """Options that start with `owl_` belong to the allocation, all others to the methods."""
    of_owl = {k.removeprefix(OWL_PREFIX): v for k, v in recipe.options.items() if k.startswith(OWL_PREFIX)}
    of_methods = {k: v for k, v in recipe.options.items() if not k.startswith(OWL_PREFIX)}
    if of_owl and recipe.allocation != "owl":
        raise InputError(f"option {OWL_PREFIX}{next(iter(of_owl))} needs the allocation owl")
    return make_options(OwlConfig, of_owl, "owl"), make_steps(recipe.method, of_methods, target)
