"""Wanda-sp: Wanda's score summed over neurons and heads, the same ratio in every block, nothing refitted.

Source: the structured variant of Wanda (Sun et al. 2023) that An et al. 2023 (FLAP) compare with: mean over outputs of
|W|·‖x‖ for every input of the matrices that write to the residual stream, summed over a head (here: over the heads that
share a key and a value). Heads are rounded to what a config can hold, neurons make up for it.

Cost: three forwards of the text.

    niwaki compress MODEL OUT --method wanda_sp --target 0.3 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.recipe import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.record import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import Choice, by_group, kept_of, unit_by_unit, without
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Wanda-sp."""

    multiple: Annotated[int, "Divisor of the number of neurons; 0 for 8, or 256 in large models."] = 0


def needs(config: Config) -> Needs:
    """Squared norms of the inputs."""
    return Needs(sqnorm=True)


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """One ratio: heads as near to it as a config can hold, neurons make up for the rest."""
    heads = min(sizes.legal_heads(), key=lambda count: abs(count - sizes.heads * (1 - removed_frac)))
    yield from ()
    return sizes.fitting(removed_frac, heads, (), config.multiple)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Chooses groups unit by unit."""

    def choose(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Choice:
        scores_I = weight_OI.abs().mean(0)
        if statistics.tokens:
            scores_I = scores_I * statistics.sqnorm_I.sqrt()
        kept = kept_of(by_group(scores_I, keep.unit), keep.count)
        return Choice(kept, without(weight_OI, keep, kept))

    return unit_by_unit(block, calib, targets, choose)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="Wanda-sp (An et al. 2023)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    search=search,
    multiple=lambda config: config.multiple,
)
