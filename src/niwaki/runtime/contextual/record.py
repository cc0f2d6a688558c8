"""A learned predictor beside the weights it was learned from.

    OUT/niwaki/shadow.safetensors     its tensors
    OUT/niwaki/shadow.json            units, rule, features, how it runs

The weights themselves are not touched: without niwaki the folder is the dense model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from niwaki.config.recipe import current_name
from niwaki.errors import CheckpointError
from niwaki.model.files import write_shard, write_text
from niwaki.runtime.contextual.predictor import Predictor
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.contextual.units import Layout, read_layout

TENSORS, ABOUT = "niwaki/shadow.safetensors", "niwaki/shadow.json"
FORMAT = 1


@dataclass(frozen=True)
class Running:
    """How a predictor is used: tokens between two looks at the input (0: one look, after the prompt), prompts that are
    too short for one, the share of the weights above which a batch runs dense, whether its sequences run the union of
    their neurons or a shared choice, the share of a skipped neuron's mean activation in the prompt that stands in for
    it, the deviation of a prompt above which it runs dense (0: none), and the margin of its mask below which it does.
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
    """All that a model needs to skip what an input does not."""

    predictor: Predictor
    layout: Layout
    rule: Rule
    running: Running


def write_shadow(folder: Path, shadow: Shadow) -> str:
    """Writes both files below `folder`; returns the SHA-256 of the tensors."""
    write_about(folder, shadow)
    return write_shard(folder / TENSORS, shadow.predictor.tensors())


def write_about(folder: Path, shadow: Shadow) -> None:
    """Writes the file that says how the predictor runs."""
    about = {
        "format": FORMAT,
        "features": list(shadow.predictor.features),
        "layout": shadow.layout.describe(),
        "rule": asdict(shadow.rule),
        "running": asdict(shadow.running),
    }
    write_text(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def read_running(fields: Mapping[str, Any]) -> Running:
    """Return the running settings of a stored record, whose fields may have the names of an earlier version."""
    return Running(**{current_name(name): value for name, value in fields.items()})


def has_shadow(folder: Path) -> bool:
    """Whether a predictor lies beside the weights."""
    return (folder / ABOUT).is_file()


def read_shadow(folder: Path) -> Shadow:
    """What `write_shadow` wrote. Raises CheckpointError if it is not whole, or of a newer format."""
    try:
        about: Mapping[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / ABOUT} has format {about['format']}, this niwaki reads {FORMAT}: install a newer one"
            )
        layout, rule, running = read_layout(about["layout"]), Rule(**about["rule"]), read_running(about["running"])
        heads = layout.blocks * layout.count("heads")
        predictor = Predictor(tuple(about["features"]), heads, **load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ABOUT} and its tensors are not complete ({error}): compress again") from error
    if len(predictor.prior_U) != layout.size:
        raise CheckpointError(f"{folder / TENSORS} scores {len(predictor.prior_U)} units, not {layout.size}")
    return Shadow(predictor, layout, rule, running)
