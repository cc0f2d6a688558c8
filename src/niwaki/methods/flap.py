"""FLAP: inputs that fluctuate least go, wherever they are, and a bias makes up for their mean.

Source: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models". The score of an input
j of a matrix that writes to the residual stream is Var(x_j) · ‖W_:j‖². It is summed over a group, and standardized
within every block and kind. Then one threshold holds for all; a group of heads counts with the parameters that it has.
Compensation: the bias gains W_:gone · mean(x_gone). The numbers of groups come from the dense model, as published. The
choice of groups in a block, and the means, come from its inputs in the pruned model.

Widths differ between blocks, and no config can state that: niwaki stores the shape of each matrix. Heads or neurons
that a block cannot lose (a norm goes over all of them) stay. Biases need fields of the config that give the matrices
one. Where there are none, `bias` says what happens.

Cost: three forwards of the text.

    niwaki compress MODEL OUT --method flap --target 0.3 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Kind, PrunableUnit, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import InputError
from niwaki.formats.packed import Packed
from niwaki.methods.method import ShapeMethod
from niwaki.methods.shared.unit_pruning import (
    PrunedUnit,
    compress_units,
    highest_groups,
    prune_by_weights,
    sum_by_group,
    zero_other_groups,
)
from niwaki.model.decoder import Block
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSearch, ShapeSpace

BIASES = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of FLAP."""

    compensate: Annotated[bool, "Add the mean output of the removed inputs to the bias."] = True
    bias: Annotated[
        str,
        "Where the config has no place for these biases: leave them out and say so (auto), or refuse (on). "
        "off never adds any.",
    ] = "auto"

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")


def needs(config: Config) -> Needs:
    """Ask for means and squared norms of the inputs."""
    return Needs(sqnorm=True, mean=True)


def block_info(
    block: Block, statistics: Mapping[str, Statistics], units: Mapping[Kind, PrunableUnit], config: Config
) -> dict[Kind, list]:
    """Return the standardized scores of all groups by kind."""
    scores: dict[Kind, list] = {}
    for kind, unit in units.items():
        scores_G = sum_by_group(
            _fluctuation(block.weight(unit.consumer).float(), statistics[unit.consumer]), unit
        ).double()
        spread = float(scores_G.std()) or 1.0
        scores[kind] = ((scores_G - scores_G.mean()) / spread).tolist()
    return scores


def settle(config: Config, sizes: ShapeSpace) -> tuple[Config, str]:
    """Return the config with `bias` decided for a model, and a line if its biases are left out.

    Raises InputError if they are asked for and the config cannot hold them.
    """
    if not config.compensate or config.bias == "off":
        return replace(config, bias="off"), ""
    *_, problem = sizes.configs.biases
    if problem and config.bias == "on":
        raise InputError(f"flap cannot store its biases: {problem}. Use --set bias=off, or a method without biases")
    if problem:
        return replace(config, bias="off"), (
            f"flap leaves out the biases that make up for removed parts: {problem} (--set bias=on refuses instead)"
        )
    return replace(config, bias="on"), ""


def search(sizes: ShapeSpace, removed_frac: float, looks: Sequence[BlockInfo], config: Config) -> ShapeSearch:
    """Return one shape: the lowest scores go until the budget is met; every block keeps one step of each kind."""
    counts: dict[Kind, list[int]] = {"neurons": [sizes.neurons] * len(sizes), "heads": [sizes.heads] * len(sizes)}
    steps: dict[Kind, int] = {"neurons": sizes.columns_multiple, "heads": sizes.heads_multiple}
    order = sorted(
        (score, kind, index)
        for index, info in enumerate(looks)
        for kind in sizes.movable_kinds
        for score in info.found[kind]
    )
    wanted = {kind: list(own) for kind, own in counts.items()}
    left = removed_frac * len(sizes) * sizes.block_parameters
    for _, kind, index in order:
        if left <= 0:
            break
        step, own = steps[kind], counts[kind]
        wanted[kind][index] -= 1
        kept = max(-(-wanted[kind][index] // step) * step, step)  # the next methods need multiples of the step
        if kept < own[index]:
            left -= (own[index] - kept) * sizes.group_parameters[kind]
            own[index] = kept
    yield from ()
    return None if left > 0 else PrunedShape(tuple(counts["neurons"]), tuple(counts["heads"]))


def compress(
    block: Block,
    calib: CalibrationData,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """Remove the groups that fluctuate least, unit by unit, and compensate their mean."""

    def prune(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> PrunedUnit:
        if not statistics.tokens:
            return prune_by_weights(keep, weight_OI)
        kept = highest_groups(sum_by_group(_fluctuation(weight_OI, statistics), keep.unit), keep.count)
        pruned_OI = zero_other_groups(weight_OI, keep, kept)
        bias_O = (weight_OI - pruned_OI) @ statistics.mean_I if config.compensate and config.bias != "off" else None
        return PrunedUnit(kept, pruned_OI, bias_O=bias_O)

    return compress_units(block, calib, targets, prune)


def _fluctuation(weight_OI: Tensor, statistics: Statistics) -> Tensor:
    """Return Var(x_j) · ‖W_:j‖² of every input [I]; zero if no token reached the matrix."""
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
    settle=settle,
    biased=lambda config: config.bias == "on",
)
