"""Wanda-sp: Wanda's score summed over neurons and heads, the same ratio in every block, nothing refitted.

Source: the structured variant of Wanda (Sun et al. 2023) that An et al. 2023 (FLAP) compare with. The score of an input
of a matrix that writes to the residual stream is the mean over outputs of |W|·‖x‖. It is summed over a head (here: over
the heads that share a key and a value). The number of heads is rounded to one that a config can hold; neurons make up
for the difference.

Cost: three forwards of the text.

    niwaki compress MODEL OUT --method wanda_sp --target 0.3 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import compress_units_by_score
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Wanda-sp."""

    multiple: Annotated[int, "Divisor of the number of neurons; 0 for 8, or 256 in large models."] = 0


def needs(config: Config) -> Needs:
    """Ask for squared norms of the inputs."""
    return Needs(sqnorm=True)


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Return one shape: the number of heads nearest to the ratio, and neurons for the rest of the budget."""
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
    """Remove the groups with the lowest scores, unit by unit."""

    def score(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Tensor:
        scores_I = weight_OI.abs().mean(0)
        return scores_I * statistics.sqnorm_I.sqrt() if statistics.tokens else scores_I

    return compress_units_by_score(block, calib, targets, score)


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
