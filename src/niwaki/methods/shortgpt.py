"""ShortGPT: whole blocks go, those that change the direction of the residual stream least; the others do not change.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect". The influence
of a block is 1 − mean cos(h_in, h_out) over all tokens, measured once in the dense model. A budget that is not a whole
number of blocks is rounded to the nearest one.

Cost: two forwards of the text.

    niwaki compress MODEL OUT --method shortgpt --target 0.25 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import PrunedUnit, compress_units
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, ShapeSearch, ShapeSpace


@dataclass(frozen=True, kw_only=True)
class Config:
    """ShortGPT has no options."""


def needs(config: Config) -> Needs:
    """Ask for no data of single matrices."""
    return Needs()


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Return one shape: that without the least influential blocks."""
    count = min(max(round(removed_frac * len(sizes)), 1), len(sizes) - 1)
    dropped = sorted(range(len(sizes)), key=lambda index: looks[index].influence)[:count]
    yield from ()
    if sizes.drop_problem:
        return None
    return sizes.shape(sizes.neurons, sizes.heads, dropped)


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Keep or remove the units of a block as a whole."""

    def keep_all(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> PrunedUnit:
        return PrunedUnit(range(keep.unit.count), weight_OI)

    return compress_units(block, calib, targets, keep_all)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="ShortGPT (Men et al. 2024)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    search=search,
)
