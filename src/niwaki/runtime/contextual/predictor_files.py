"""Files of a learned predictor, beside the weights that it was learned from.

    OUT/niwaki/shadow.safetensors     its tensors
    OUT/niwaki/shadow.json            units, rule, features, runtime settings

The weights do not change: without niwaki the folder is the dense model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from niwaki.config.recipe import current_name
from niwaki.errors import CheckpointError, format_problem
from niwaki.model.files import write_shard, write_text
from niwaki.runtime.contextual.predictor import Predictor
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.contextual.units import UnitLayout, read_layout

TENSORS, ABOUT = "niwaki/shadow.safetensors", "niwaki/shadow.json"
FORMAT = 1


@dataclass(frozen=True)
class Running:
    """Runtime settings of a predictor.

    `refresh_tokens`: tokens between two choices of the units; 0 means one choice, after the prompt. `min_prompt`: the
    tokens that a choice needs. `max_kept_frac`: the share of the weights above which a batch runs dense. `batch`:
    sequences run the `union` of their neurons, or `shared` ones. `mean_fill`: the share of a skipped neuron's mean
    activation in the prompt that replaces it. A prompt runs dense above `max_deviation` (0: no limit), or if the margin
    of its mask is below `min_margin`.
    """

    refresh_tokens: int = 0
    min_prompt: int = 16
    max_kept_frac: float = 0.85
    batch: str = "union"
    mean_fill: float = 0.5
    max_deviation: float = 0.0
    min_margin: float = 0.0


@dataclass(frozen=True)
class Shadow:
    """Predictor of a model with its units, selection rule and runtime settings."""

    predictor: Predictor
    layout: UnitLayout
    rule: Rule
    running: Running


def write_shadow(folder: Path, shadow: Shadow) -> str:
    """Write both files below `folder`; return the SHA-256 of the tensors."""
    write_about(folder, shadow)
    return write_shard(folder / TENSORS, shadow.predictor.tensors())


def write_about(folder: Path, shadow: Shadow) -> None:
    """Write the file of the settings."""
    about = {
        "format": FORMAT,
        "features": list(shadow.predictor.features),
        "layout": shadow.layout.describe(),
        "rule": asdict(shadow.rule),
        "running": asdict(shadow.running),
    }
    (folder / ABOUT).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def read_running(fields: Mapping[str, Any]) -> Running:
    """Return the running settings of a stored record, whose fields may have the names of an earlier version."""
    return Running(**{current_name(name): value for name, value in fields.items()})


def has_shadow(folder: Path) -> bool:
    """Return whether a predictor is beside the weights."""
    return (folder / ABOUT).is_file()


def read_shadow(folder: Path) -> Shadow:
    """Read what `write_shadow` wrote. Raises CheckpointError if it is incomplete or of another format."""
    try:
        about: Mapping[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if problem := format_problem(about["format"], (FORMAT,)):
            raise CheckpointError(f"{folder / ABOUT} {problem}")
        layout, rule, running = read_layout(about["layout"]), Rule(**about["rule"]), read_running(about["running"])
        heads = layout.blocks * layout.count("heads")
        predictor = Predictor(tuple(about["features"]), heads, **load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ABOUT} and its tensors are not complete ({error}): compress again") from error
    if len(predictor.prior_U) != layout.size:
        raise CheckpointError(f"{folder / TENSORS} scores {len(predictor.prior_U)} units, not {layout.size}")
    return Shadow(predictor, layout, rule, running)
