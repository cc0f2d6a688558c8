"""SparseGPT: prune column by column and let the remaining weights make up for each loss.

Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (ICML
2023), Algorithm 1. Saliency W²/diag(U)² with U from `_solver.inverse_factor`; unstructured masks are chosen
for 128 columns at a time across all rows, N:M masks when the sweep reaches a group.

Deviations: the number of zeros is exact, spread evenly over the panels. Features that never fired are the
cheapest to prune but not zeroed beyond the target (the released code zeroes them all, which overshoots the
budget). A matrix that no token reached is pruned by magnitude; its line in blocks.jsonl notes it.

Cost: two forwards, one Gram matrix and one factor per group of matrices, one sweep per matrix. Memory: the
block plus I² float32 for each group (and its factor while it is used).

    niwaki compress MODEL OUT --method sparsegpt --target 2:4 --calibration mine.txt --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from niwaki.block import Block
from niwaki.config import Grouped, Target
from niwaki.methods._masks import keep_by_matrix, keep_highest, zeros_up_to
from niwaki.methods._solver import inverse_factor, sweep
from niwaki.packed import Packed
from niwaki.statistics import UNREACHED, Needs, Statistics

PAPER = "Frantar & Alistarh 2023, SparseGPT"
NEEDS = Needs(gram=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`damping_frac`: λ as a share of the Gram's mean diagonal. `panel_columns`: columns per mask choice."""

    damping_frac: float = 0.01
    panel_columns: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping_frac <= 1:
            raise ValueError(f"damping_frac must lie in (0, 1], got {self.damping_frac}")
        if self.panel_columns < 1:
            raise ValueError(f"panel_columns must be positive, got {self.panel_columns}")


def compress(
    block: Block,
    statistics: Mapping[str, Statistics],
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """One factor per group of matrices that read the same input, one sweep per matrix."""
    packed: dict[str, Packed] = {}
    for members in block.anatomy.groups.values():
        names = [linear.name for linear in members if linear.name in targets]
        if not names:
            continue
        group = statistics[names[0]]
        if not group.tokens:
            packed |= {name: _by_magnitude(block.weight(name).float(), targets[name]) for name in names}
            continue
        upper_II, damping_frac = inverse_factor(group.gram_II, config.damping_frac)
        raised = damping_frac != config.damping_frac
        note = f"XᵀX was singular in float32: damping_frac raised to {damping_frac:g}" if raised else ""
        for name in names:
            weight_OI = block.weight(name).float().clone()
            keep_OI = _prune(weight_OI, upper_II, targets[name], config.panel_columns)
            packed[name] = Packed.masked(weight_OI, keep_OI, note)
    return packed


def _by_magnitude(weight_OI: Tensor, target: Target) -> Packed:
    return Packed.masked(weight_OI, keep_by_matrix(weight_OI.abs(), target), UNREACHED)


def _prune(weight_OI: Tensor, upper_II: Tensor, target: Target, panel_columns: int) -> Tensor:
    """Updates `weight_OI` in place and returns the keep mask."""
    rows, columns = weight_OI.shape
    target.zeros_in(rows, columns)
    if isinstance(target, Grouped):
        whole_groups = max(panel_columns // target.group, 1) * target.group
        return sweep(weight_OI, upper_II, target, None, whole_groups)

    def choose(panel_OP: Tensor, diagonal_P: Tensor, start: int) -> Tensor:
        end = start + panel_OP.shape[1]
        zeros = zeros_up_to(target, rows, columns, end) - zeros_up_to(target, rows, columns, start)
        return keep_highest((panel_OP / diagonal_P).square(), zeros)

    return sweep(weight_OI, upper_II, None, choose, panel_columns)
