"""Selection of the units that run: the lowest scores are skipped, per block or over all blocks, with floors.

`local`: the same share of every block. `global`: the lowest of all blocks together, but every block keeps its best
`floor_frac` of units (at least one). Heads and neurons are ranked separately and lose the same share. Under `local` the
counts do not depend on the scores, so shapes are fixed.

Legend: B sequences, L blocks, U units in all, G units of a kind in one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.runtime.contextual.units import UnitLayout

SCOPES = ("local", "global")
SHARING = ("union", "shared")


@dataclass(frozen=True)
class Rule:
    """Rule from scores to a mask: the share of units that is skipped, per block or over all blocks."""

    skip_frac: float
    scope: str = "local"
    floor_frac: float = 0.1

    def select(self, scores_BU: Tensor, layout: UnitLayout) -> Tensor:
        """Return the units [B, U] that run, as booleans."""
        heads_BLG, neurons_BLG = layout.split(scores_BU)
        return layout.join(self.keep(heads_BLG), self.keep(neurons_BLG))

    def keep(self, scores_BLG: Tensor) -> Tensor:
        """Return the units of one kind [B, L, G] that run."""
        count, blocks, units = scores_BLG.shape
        if self.scope == "local":
            return highest(scores_BLG, self.kept(units))
        floor = max(1, round(units * min(self.floor_frac, 1 - self.skip_frac)))
        safe_BLG = highest(scores_BLG, floor)
        raised_BN = scores_BLG.masked_fill(safe_BLG, torch.inf).reshape(count, -1)
        return highest(raised_BN, max(self.kept(blocks * units), blocks * floor)).view(count, blocks, units)

    def kept(self, units: int) -> int:
        """Return how many of `units` stay."""
        return max(1, units - round(units * self.skip_frac))


@dataclass(frozen=True)
class Variant:
    """Mask [B, U] of some sequences, and the share of its mean activation that replaces a skipped neuron."""

    kept_BU: Tensor
    mean_fill: float


def highest(scores: Tensor, count: int) -> Tensor:
    """Return true at the `count` highest along the last dimension; ties go to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def margin(scores_BU: Tensor, kept_BU: Tensor, layout: UnitLayout) -> Tensor:
    """Return the share [B] of the predicted squared importance that a mask holds, mean over blocks and kinds.

    It is small if all units seem to matter alike: the skipped units are then as good as those that run.
    """
    shares = []
    for scores_BLG, kept_BLG in zip(layout.split(scores_BU.clamp_min(0)), layout.split(kept_BU), strict=True):
        square_BLG = scores_BLG.double().square()
        total_BL = square_BLG.sum(2).clamp_min(torch.finfo(torch.float64).tiny)
        shares.append(((square_BLG * kept_BLG).sum(2) / total_BL).mean(1))
    mean_B: Tensor = torch.stack(shares).mean(0)
    return mean_B


def for_batch(rule: Rule, scores_BU: Tensor, layout: UnitLayout, neurons: str = "union") -> tuple[Tensor, Tensor]:
    """Return the units that a batch runs: heads [B, L, G] of each sequence, and neurons [L, G] of all sequences.

    `neurons`: `union` keeps all that any sequence would keep alone. `shared` keeps the number that one sequence keeps,
    by the mean of the scores, in which all sequences have the same weight per block. The order of the sequences has no
    influence. If sequences keep different numbers of heads (`global`), all run the union. `padded` adds neurons up to a
    number that matrix products run fast with.
    """
    heads_BLG, neurons_BLG = layout.split(rule.select(scores_BU, layout))
    counts_BL = heads_BLG.sum(2)
    uneven_L = (counts_BL != counts_BL[:1]).any(0)
    heads_BLG = torch.where(uneven_L[None, :, None], heads_BLG.any(0, keepdim=True), heads_BLG)
    if neurons == "shared" and len(scores_BU) > 1:
        scores_BLG = layout.split(scores_BU)[1].double().clamp_min(0)
        share_BLG = scores_BLG / scores_BLG.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        neurons_BLG = rule.keep(share_BLG.mean(0, keepdim=True))
    return heads_BLG, padded(neurons_BLG.any(0))


def padded(kept_LG: Tensor) -> Tensor:
    """Add the first skipped units to kept ones [L, G], up to a multiple of 64 in every block.

    In small blocks it is a smaller power of two, so that a block has at least 128 such steps. Libraries multiply odd
    sizes slowly.
    """
    units = kept_LG.shape[1]
    step = min(64, 1 << max((units // 128).bit_length() - 1, 0))
    missing_L1 = -kept_LG.sum(1, keepdim=True) % step
    return kept_LG | ((~kept_LG).cumsum(1) <= missing_L1) & ~kept_LG
