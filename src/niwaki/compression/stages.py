"""Stages of a recipe, one or two: a structured method first, then the methods that compress what it leaves.

`comp+gptq` with target `0.25+4bit` removes a quarter of the parameters and quantizes the rest. The second stage reads
the smaller model, on the same calibration windows. Its record contains that of the first stage.
"""

from dataclasses import dataclass

from niwaki.compression.allocation import OWN_WIDTHS
from niwaki.compression.run_record import RunRecord
from niwaki.config.recipe import Recipe
from niwaki.data.texts import CalibrationWindows
from niwaki.errors import TargetError
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import METHODS


@dataclass(frozen=True)
class FirstStage:
    """Finished first stage, as the second one uses it: its run.json, the recipe of both, the windows of both."""

    record: RunRecord
    recipe: Recipe
    calibration: CalibrationWindows | None


def split_stages(recipe: Recipe) -> list[Recipe]:
    """Return one recipe per stage: two if the recipe begins with a structured method, else the recipe itself.

    Raises TargetError unless both stages have a target.
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
    widths = recipe.allocation in OWN_WIDTHS
    shaping = {
        "method": first,
        "target": targets[0],
        "options": own,
        "allocation": recipe.allocation if widths else "auto",
        "keep_blocks": (),
        "embeddings": "none",
    }
    after = {
        "method": rest,
        "target": targets[1],
        "options": {key: value for key, value in recipe.options.items() if key not in own},
        "allocation": "auto" if widths else recipe.allocation,
    }
    return [recipe.model_copy(update=shaping), recipe.model_copy(update=after)]


def merged_record(record: RunRecord, first: FirstStage) -> RunRecord:
    """Return the record of the last stage for the whole recipe: the first model, all options, the seconds of both."""
    resolved = {"device": record.recipe.device, "batch_tokens": record.recipe.batch_tokens}
    whole = {
        "model": first.record.model,
        "recipe": first.recipe.model_copy(update=resolved),
        "options": {**first.record.options, **record.options},
        "seconds": round(first.record.seconds + record.seconds, 2),
        "stages": [first.record],
    }
    return record.model_copy(update=whole)
