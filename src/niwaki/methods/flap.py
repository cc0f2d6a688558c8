"""FLAP: inputs that fluctuate least go, wherever they are, and a bias makes up for their mean.

Source: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models". Score of an input j
of a matrix that writes to the residual stream: Var(x_j) · ‖W_:j‖², summed over a group; standardised within every block
and kind; then one threshold for all (a group of heads counts as many parameters as it has). Compensation: the bias
gains W_:gone · mean(x_gone). Numbers of groups come from the dense model, as published; which groups of a block go,
and the means, from its inputs in the pruned model.

Widths differ between blocks, which no config can say: the result is stored at full size, with zeros and biases.

Cost: three forwards of the text.

    niwaki compress MODEL OUT --method flap --target 0.3 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.recipe import KeepUnits, Kind, Sparsity, Target, Unit
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.record import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import Choice, by_group, kept_of, unit_by_unit, unreached, without
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSearch, ShapeSpace


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of FLAP."""

    compensate: Annotated[bool, "Add the mean output of the removed inputs to the bias."] = True


def needs(config: Config) -> Needs:
    """Means and squared norms of the inputs."""
    return Needs(sqnorm=True, mean=True)


def block_info(
    block: Block, statistics: Mapping[str, Statistics], units: Mapping[Kind, Unit], config: Config
) -> dict[Kind, list]:
    """Scores of all groups by kind, standardised."""
    found = {}
    for kind, unit in units.items():
        scores_G = by_group(_fluctuation(block.weight(unit.consumer).float(), statistics[unit.consumer]), unit).double()
        spread = float(scores_G.std()) or 1.0
        found[kind] = ((scores_G - scores_G.mean()) / spread).tolist()
    return found


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """The lowest scores of all out, until enough parameters are gone; one group of each kind stays in every block."""
    counts: dict[Kind, list[int]] = {"neurons": [sizes.neurons] * len(sizes), "heads": [sizes.heads] * len(sizes)}
    order = sorted(
        (score, kind, index) for index, info in enumerate(looks) for kind in counts for score in info.found[kind]
    )
    left = removed_frac * len(sizes) * sizes.block_parameters
    for _, kind, index in order:
        if left <= 0:
            break
        if counts[kind][index] > 1:
            counts[kind][index] -= 1
            left -= sizes.group_parameters[kind]
    yield from ()
    return None if left > 0 else PrunedShape(tuple(counts["neurons"]), tuple(counts["heads"]))


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Chooses groups unit by unit."""

    def choose(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> Choice:
        if not statistics.tokens:
            return unreached(keep, weight_OI)
        kept = kept_of(by_group(_fluctuation(weight_OI, statistics), keep.unit), keep.count)
        left_OI = without(weight_OI, keep, kept)
        bias_O = (weight_OI - left_OI) @ statistics.mean_I if config.compensate else None
        return Choice(kept, left_OI, bias_O=bias_O)

    return unit_by_unit(block, calib, targets, choose)


def _fluctuation(weight_OI: Tensor, statistics: Statistics) -> Tensor:
    """Var(x_j) · ‖W_:j‖² of every input [I]; zero if no token came."""
    if not statistics.tokens:
        return torch.zeros_like(weight_OI[0])
    variance_I = (statistics.sqnorm_I / statistics.tokens - statistics.mean_I.square()).clamp_min(0)
    return variance_I * weight_OI.square().sum(0)


METHOD = ShapeMethod(
    doc=__doc__,
    paper="FLAP (An et al. 2023)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    compress=compress,
    search=search,
    info_needs=needs,
    info=block_info,
)
