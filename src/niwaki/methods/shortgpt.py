"""ShortGPT: whole blocks go, those that change the direction of the residual stream least; the others stay as they are.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect". Block influence
1 − mean cos(h_in, h_out), measured once in the dense model, over all tokens. A budget that is no whole number of blocks
is rounded to the nearest.

Cost: two forwards of the text.

    niwaki compress MODEL OUT --method shortgpt --target 0.25 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.config.recipe import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.record import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import Choice, unit_by_unit
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace


@dataclass(frozen=True, kw_only=True)
class Config:
    """ShortGPT has no options."""


def needs(config: Config) -> Needs:
    """Nothing of single matrices."""
    return Needs()


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """The least influential blocks out."""
    count = min(max(round(removed_frac * len(sizes)), 1), len(sizes) - 1)
    dropped = sorted(range(len(sizes)), key=lambda index: looks[index].influence)[:count]
    yield from ()
    return sizes.shape(sizes.neurons, sizes.heads, dropped)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """All or nothing."""

    def choose(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Choice:
        return Choice(range(keep.unit.count), weight_OI)

    return unit_by_unit(block, calib, targets, choose)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="ShortGPT (Men et al. 2024)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    search=search,
)
