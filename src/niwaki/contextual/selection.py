"""From scores to the units that run: the lowest are skipped, in every block or over all blocks, with floors.

`local`: the same share of every block. `global`: the lowest of all blocks together, but every block keeps its best
`floor_frac` of units (one head at least). Heads and neurons are ranked apart and lose the same share. Counts do not
depend on the scores under `local`, so shapes are fixed.

Legend: B sequences, L blocks, U units in all, G units of a kind in one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.contextual.units import Layout

SCOPES = ("local", "global")


@dataclass(frozen=True)
class Rule:
    """How scores become a mask: the share of units that is skipped, and where."""

    skip_frac: float
    scope: str = "local"
    floor_frac: float = 0.1

    def select(self, scores_BU: Tensor, layout: Layout) -> Tensor:
        """The units [B, U] that run, as booleans."""
        heads_BLG, neurons_BLG = layout.split(scores_BU)
        return layout.join(self._keep(heads_BLG), self._keep(neurons_BLG))

    def _keep(self, scores_BLG: Tensor) -> Tensor:
        count, blocks, units = scores_BLG.shape
        if self.scope == "local":
            return highest(scores_BLG, self.kept(units))
        floor = max(1, round(units * min(self.floor_frac, 1 - self.skip_frac)))
        safe_BLG = highest(scores_BLG, floor)
        raised_BN = scores_BLG.masked_fill(safe_BLG, torch.inf).reshape(count, -1)
        return highest(raised_BN, max(self.kept(blocks * units), blocks * floor)).view(count, blocks, units)

    def kept(self, units: int) -> int:
        """How many of `units` stay."""
        return max(1, units - round(units * self.skip_frac))


@dataclass(frozen=True)
class Variant:
    """A way to run some sequences: the units [B, U] that do, and the share of its mean that stands in for a neuron."""

    kept_BU: Tensor
    stand_in: float


def highest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` highest along the last dimension, ties to the lower place."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def union(kept_BU: Tensor) -> Tensor:
    """One mask [1, U] with all that any sequence of a batch keeps: none loses what its own mask would run."""
    return kept_BU.any(0, keepdim=True)
