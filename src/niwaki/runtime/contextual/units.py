"""Units that one input can skip: in every block, groups of heads that share a key and a value, and neurons.

All units of a decoder form one row: the heads of all blocks, then the neurons of all blocks, `width` neighbours to a
unit. Scores, statistics and masks use that row, and `split` cuts it into blocks again.

Legend: B sequences, L blocks, U units in all, G units of a kind in one block, T tokens, C channels of a matrix.

    layout = find_layout(decoder.anatomy, decoder.model, width=1)
    heads_BLG, neurons_BLG = layout.split(scores_BU)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from niwaki.config.targets import Kind, PrunableUnit
from niwaki.errors import ArchitectureError, InputError
from niwaki.model.anatomy import Anatomy
from niwaki.model.prunable import block_units

KINDS: tuple[Kind, ...] = ("heads", "neurons")


@dataclass(frozen=True)
class UnitLayout:
    """Units of a decoder of `blocks` equal blocks; `width` neurons make one unit."""

    blocks: int
    units: Mapping[Kind, PrunableUnit]
    width: int
    weights: Mapping[Kind, int]

    def count(self, kind: Kind) -> int:
        """Return the number of units of a kind in one block."""
        return self.units[kind].count // (self.width if kind == "neurons" else 1)

    @property
    def size(self) -> int:
        """Return the number of units of all kinds in all blocks."""
        return self.blocks * sum(self.count(kind) for kind in KINDS)

    def split(self, row_BU: Tensor) -> list[Tensor]:
        """Split a row into [B, L, G] of the heads and of the neurons."""
        heads = self.blocks * self.count("heads")
        parts = row_BU[:, :heads], row_BU[:, heads:]
        return [part.reshape(len(row_BU), self.blocks, -1) for part in parts]

    def join(self, heads_BLG: Tensor, neurons_BLG: Tensor) -> Tensor:
        """Join heads and neurons to the row [B, U]; the inverse of `split`."""
        return torch.cat([heads_BLG.flatten(1), neurons_BLG.flatten(1)], dim=1)

    def skipped_frac(self, kept_BU: Tensor) -> Tensor:
        """Return the share [B] of the weights of all units that a mask skips."""
        heads_BLG, neurons_BLG = self.split(kept_BU)
        per_head, per_neuron = (self.weights[kind] / self.count(kind) for kind in KINDS)
        left_B = heads_BLG.sum((1, 2)) * per_head + neurons_BLG.sum((1, 2)) * per_neuron
        return 1 - left_B / (self.blocks * sum(self.weights.values()))

    def describe(self) -> dict[str, Any]:
        """Return the layout for JSON; `read_layout` reads it."""
        units = {kind: vars(unit) | {"producers": list(unit.producers)} for kind, unit in self.units.items()}
        return {"blocks": self.blocks, "width": self.width, "weights": dict(self.weights), "units": units}


def read_layout(described: Mapping[str, Any]) -> UnitLayout:
    """Read what `UnitLayout.describe` returned."""
    units = {
        kind: PrunableUnit(about["kind"], about["consumer"], tuple(about["producers"]), about["count"])
        for kind, about in described["units"].items()
    }
    return UnitLayout(described["blocks"], units, described["width"], described["weights"])


def find_layout(anatomy: Anatomy, skeleton: Any, width: int) -> UnitLayout:
    """Return the units of a decoder.

    Raises ArchitectureError for blocks that differ or lack a unit, InputError for a width that does not divide.
    """
    if len(set(map(id, anatomy.blocks))) > 1:
        raise ArchitectureError("the blocks of this decoder differ: contextual sparsity needs blocks of one shape")
    block = anatomy.blocks[0]
    units = block_units(block, skeleton.config)
    if units["neurons"].count % width:
        raise InputError(f"neuron_width {width} does not divide the {units['neurons'].count} neurons of a block")
    weights: dict[Kind, int] = {}
    for kind, unit in units.items():
        matrices = [block.linears[name] for name in (*unit.producers, unit.consumer)]
        weights[kind] = sum(matrix.rows * matrix.columns for matrix in matrices)
    return UnitLayout(len(anatomy.blocks), units, width, weights)


def mean_square(x_BTC: Tensor, count: int, real_BT: Tensor | None = None) -> Tensor:
    """Return the mean squared activation [B, G] of `count` units over `real` tokens (no padding), float32."""
    square_BTC = x_BTC.float().square()
    if real_BT is not None:
        weight_BT1 = (real_BT / real_BT.sum(1, keepdim=True)).to(square_BTC)[..., None]
        mean_BC = (square_BTC * weight_BT1).sum(1)
    else:
        mean_BC = square_BTC.mean(1)
    return mean_BC.view(len(x_BTC), count, -1).mean(2)
