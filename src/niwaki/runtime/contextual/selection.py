"""From scores to the units that run: the lowest are skipped, in every block or over all blocks, with floors.

`local`: the same share of every block. `global`: the lowest of all blocks together, but every block keeps its best
`floor_frac` of units (one head at least). Heads and neurons are ranked apart and lose the same share. Counts do not
depend on the scores under `local`, so shapes are fixed.

Legend: B sequences, L blocks, U units in all, G units of a kind in one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.runtime.contextual.units import Layout

SCOPES = ("local", "global")
SHARING = ("union", "shared")


@dataclass(frozen=True)
class Rule:
    """How scores become a mask: the share of units that is skipped, and where."""

    skip_frac: float
    scope: str = "local"
    floor_frac: float = 0.1

    def select(self, scores_BU: Tensor, layout: Layout) -> Tensor:
        """The units [B, U] that run, as booleans."""
        heads_BLG, neurons_BLG = layout.split(scores_BU)
        return layout.join(self.keep(heads_BLG), self.keep(neurons_BLG))

    def keep(self, scores_BLG: Tensor) -> Tensor:
        """The units of one kind [B, L, G] that run."""
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
    mean_fill: float


def highest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` highest along the last dimension, ties to the lower place."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def margin(scores_BU: Tensor, kept_BU: Tensor, layout: Layout) -> Tensor:
    """How much of the squared importance that is predicted a mask holds [B], mean over blocks and kinds.

    Little where all units seem to matter alike: what is skipped is then as good as what runs.
    """
    shares = []
    for found_BLG, kept_BLG in zip(layout.split(scores_BU.clamp_min(0)), layout.split(kept_BU), strict=True):
        square_BLG = found_BLG.double().square()
        total_BL = square_BLG.sum(2).clamp_min(torch.finfo(torch.float64).tiny)
        shares.append(((square_BLG * kept_BLG).sum(2) / total_BL).mean(1))
    mean_B: Tensor = torch.stack(shares).mean(0)
    return mean_B


def for_batch(rule: Rule, scores_BU: Tensor, layout: Layout, neurons: str = "union") -> tuple[Tensor, Tensor]:
    """What the sequences of a batch run: heads [B, L, G], each sequence its own, and neurons [L, G], all the same.

    `neurons`: `union`, all that any sequence would keep alone; `shared`, as many as one sequence keeps, by the mean of
    the scores, of which every sequence has equal shares in a block. Neither depends on the order of the sequences.
    Where sequences keep different numbers of heads (`global`) all run the union. Neurons are filled up to a number that
    matrix products take well.
    """
    heads_BLG, neurons_BLG = layout.split(rule.select(scores_BU, layout))
    counts_BL = heads_BLG.sum(2)
    uneven_L = (counts_BL != counts_BL[:1]).any(0)
    heads_BLG = torch.where(uneven_L[None, :, None], heads_BLG.any(0, keepdim=True), heads_BLG)
    if neurons == "shared" and len(scores_BU) > 1:
        found_BLG = layout.split(scores_BU)[1].double().clamp_min(0)
        share_BLG = found_BLG / found_BLG.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        neurons_BLG = rule.keep(share_BLG.mean(0, keepdim=True))
    return heads_BLG, filled_up(neurons_BLG.any(0))


def filled_up(kept_LG: Tensor) -> Tensor:
    """Kept units [L, G] and the first skipped ones that it takes for their number in every block to be a multiple of
    64, or of less where blocks are small (128 steps at least from none to all): libraries multiply odd sizes slowly.
    """
    units = kept_LG.shape[1]
    step = min(64, 1 << max((units // 128).bit_length() - 1, 0))
    missing_L1 = -kept_LG.sum(1, keepdim=True) % step
    return kept_LG | ((~kept_LG).cumsum(1) <= missing_L1) & ~kept_LG
