"""Removal of groups of inputs of a matrix so that its outputs survive: neurons one by one, heads by their columns.

Everything minimizes ‖WX − VX‖² + λ‖W − V‖² over V that is zero in the columns of removed groups, H = XᵀX + λI:

- `remove_groups` is the optimal brain surgeon for groups. The removal of group g costs tr(W_g [H⁻¹]_gg⁻¹ W_gᵀ) and
  changes all other columns by −W_g [H⁻¹]_gg⁻¹ [H⁻¹]_g: . The cheapest groups go first, some at a time; after each step
  the costs are computed again.
- `fit_kept` solves for all kept columns at once: V = W H_:S H_SS⁻¹. `remove_groups` ends at the same V.

Cost of the removal of R of I columns: I³·2/3 for the factor, 2·R·I² for the updates.

Legend: O outputs, I inputs, G groups, R columns removed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, PrunableUnit, Target
from niwaki.data.statistics import Statistics
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.model.decoder import Block
from niwaki.model.pruned_config import group_indices

UNREACHED = "no calibration token reached this matrix: groups chosen by their weights"


def units_to_keep(targets: Mapping[str, Target]) -> list[KeepUnits]:
    """Return every unit of a block with the number of groups it keeps, in the order of the forward pass."""
    units: dict[str, KeepUnits] = {}
    for target in targets.values():
        assert isinstance(target, KeepUnits)
        units[target.unit.consumer] = target
    return list(units.values())


class PrunedUnit(NamedTuple):
    """Groups of a unit that stay, the new matrix of its consumer, and what is added to the bias of that matrix."""

    kept: Sequence[int]
    weight_OI: Tensor
    note: str = ""
    bias_O: Tensor | None = None


# (unit, consumer [O, I] float32, its statistics) → the pruned unit
PruneUnit = Callable[[KeepUnits, Tensor, Statistics], PrunedUnit]


def compress_units(
    block: Block, calib: CalibrationData, targets: Mapping[str, Target], prune: PruneUnit
) -> dict[str, Packed]:
    """Return the records of all matrices of a block; `prune` decides for every unit that keeps at least one group."""
    packed: dict[str, Packed] = {}
    for keep in units_to_keep(targets):
        weight_OI = block.weight(keep.unit.consumer).float()
        if keep.count:
            pruned = prune(keep, weight_OI, calib.statistics[keep.unit.consumer])
        else:
            pruned = PrunedUnit([], torch.zeros_like(weight_OI))  # the walk removes the bias too
        packed |= unit_records(block, keep, pruned)
    return packed


# (unit, consumer [O, I] float32, its statistics) → score of every input [I]
ScoreInputs = Callable[[KeepUnits, Tensor, Statistics], Tensor]


def compress_units_by_score(
    block: Block, calib: CalibrationData, targets: Mapping[str, Target], score: ScoreInputs
) -> dict[str, Packed]:
    """Return the records of a block without the groups whose inputs have the lowest scores; nothing is refitted."""

    def prune(keep: KeepUnits, weight_OI: Tensor, statistics: Statistics) -> PrunedUnit:
        scores_G = sum_by_group(score(keep, weight_OI, statistics), keep.unit)
        kept = highest_groups(scores_G, keep.count)
        return PrunedUnit(kept, zero_other_groups(weight_OI, keep, kept))

    return compress_units(block, calib, targets, prune)


def prune_by_weights(keep: KeepUnits, weight_OI: Tensor) -> PrunedUnit:
    """Prune a unit that no token reached: its groups are ranked by their weights alone."""
    kept = highest_groups(sum_by_group(weight_OI.square().sum(0), keep.unit), keep.count)
    return PrunedUnit(kept, zero_other_groups(weight_OI, keep, kept), UNREACHED)


def lowest_groups(scores_G: Tensor, count: int) -> Tensor:
    """Return the `count` groups with the lowest scores; ties fall to the lower number."""
    return scores_G.argsort(stable=True)[:count]


def highest_groups(scores_G: Tensor, count: int) -> list[int]:
    """Return the `count` groups with the highest scores, ascending."""
    removed = lowest_groups(scores_G, len(scores_G) - count)
    kept_G = torch.ones(len(scores_G), dtype=torch.bool, device=scores_G.device)
    kept_G[removed] = False
    return [int(g) for g in kept_G.nonzero().view(-1)]


def sum_by_group(scores_I: Tensor, unit: PrunableUnit) -> Tensor:
    """Return the sums [G] of the scores of every group's columns."""
    return scores_I.view(unit.count, -1).sum(1)


# (matrix [O, I], H⁻¹ of what is left [I, I], groups that are left [G]) → cost of the removal of each group [G]
Costs = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def remove_groups(
    weight_OI: Tensor, inverse_II: Tensor, unit: PrunableUnit, count: int, at_once: int, costs: Costs | None = None
) -> tuple[list[int], Tensor]:
    """Remove groups until `count` are left. Return those and the matrix, zero in the others.

    `inverse_II` = H⁻¹ is changed in place. `at_once` groups go between two computations of the costs, which are
    `removal_costs` unless `costs` are given.
    """
    weight_OI = weight_OI.clone()
    costs = costs or (lambda now_OI, now_II, _: removal_costs(now_OI, now_II, unit))
    alive_G = torch.ones(unit.count, dtype=torch.bool, device=weight_OI.device)
    left = unit.count - count
    within_S = torch.arange(weight_OI.shape[1] // unit.count, device=weight_OI.device)
    while left > 0:  # nothing in this loop waits for the device
        scores_G = torch.where(alive_G, costs(weight_OI, inverse_II, alive_G), torch.inf)
        gone = lowest_groups(scores_G, min(at_once, left))
        columns_R = (gone[:, None] * len(within_S) + within_S).view(-1)
        rows_RI = inverse_II[columns_R]
        spread_RI = torch.linalg.solve_ex(rows_RI[:, columns_R], rows_RI)[0]
        weight_OI.addmm_(weight_OI[:, columns_R], spread_RI, alpha=-1)
        inverse_II.addmm_(rows_RI.T, spread_RI, alpha=-1)
        alive_G[gone] = False
        weight_OI.index_fill_(1, columns_R, 0)
        inverse_II.index_fill_(0, columns_R, 0).index_fill_(1, columns_R, 0)  # these rows stay zero from here on
        inverse_II.diagonal()[columns_R] = 1
        left -= len(gone)
    return [int(g) for g in alive_G.nonzero().view(-1)], weight_OI


def removal_costs(weight_OI: Tensor, inverse_II: Tensor, unit: PrunableUnit) -> Tensor:
    """Return the cost of the removal of each group alone [G]."""
    size = weight_OI.shape[1] // unit.count
    if size == 1:
        return weight_OI.square().sum(0) / inverse_II.diagonal()
    own_GSS = torch.stack([inverse_II[g : g + size, g : g + size] for g in range(0, len(inverse_II), size)])
    weight_GSO = weight_OI.T.reshape(unit.count, size, -1)
    solved_GSO: Tensor = torch.linalg.solve_ex(own_GSS, weight_GSO)[0]
    return (weight_GSO * solved_GSO).sum((1, 2))


@torch.no_grad()
def fit_kept(weight_OI: Tensor, damped_II: Tensor, kept: Sequence[int], unit: PrunableUnit) -> Tensor:
    """Return the matrix [O, I], zero in removed groups, whose outputs are nearest to those of `weight_OI`."""
    columns_S = group_indices(unit, kept, weight_OI.shape[1]).to(weight_OI.device)
    cross_OS = weight_OI @ damped_II[:, columns_S]
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, columns_S] = torch.linalg.solve(damped_II[columns_S][:, columns_S], cross_OS.T).T
    return found_OI


@torch.no_grad()
def fit_scales(weight_OI: Tensor, damped_II: Tensor, kept: Sequence[int], unit: PrunableUnit) -> Tensor:
    """Return the matrix as `fit_kept` does, with one factor per kept group as the only unknowns.

    The K unknowns have the Gram matrix (VᵀV) ∘ H, summed by group.
    """
    columns_S = group_indices(unit, kept, weight_OI.shape[1]).to(weight_OI.device)
    size = weight_OI.shape[1] // unit.count
    own_OS = weight_OI[:, columns_S]
    normal_SS = (own_OS.T @ own_OS) * damped_II[columns_S][:, columns_S]
    right_S = (own_OS * (weight_OI @ damped_II[:, columns_S])).sum(0)
    normal_KK = normal_SS.view(len(kept), size, len(kept), size).sum((1, 3))
    right_K = right_S.view(-1, size).sum(1)
    normal_KK.diagonal().add_(1e-6 * normal_KK.diagonal().mean())
    factor_K = torch.linalg.solve(normal_KK, right_K)
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, columns_S] = own_OS * factor_K.repeat_interleave(size)
    return found_OI


def unit_records(block: Block, keep: KeepUnits, pruned: PrunedUnit) -> dict[str, Packed]:
    """Return the records of all matrices of a unit: the new consumer, and producers without the removed rows."""
    kept, weight_OI, note, bias_O = pruned
    packed = {}
    for name in keep.unit.producers:
        own_OI = block.weight(name).float()
        rows = group_indices(keep.unit, kept, own_OI.shape[0]).to(own_OI.device)
        left_OI = torch.zeros_like(own_OI)
        left_OI[rows] = own_OI[rows]
        shape = (len(rows), own_OI.shape[1])
        packed[name] = Packed("sliced", left_OI, note, cut=shape if keep.cut else None)
    shape = (weight_OI.shape[0], weight_OI.shape[1] // keep.unit.count * len(kept))
    detail = {"kept_groups": list(kept)}
    cut = shape if keep.cut else None
    packed[keep.unit.consumer] = Packed("sliced", weight_OI, note, detail, cut=cut, bias_O=bias_O)
    return packed


def zero_other_groups(weight_OI: Tensor, keep: KeepUnits, kept: Sequence[int]) -> Tensor:
    """Return the matrix with zeros in the columns of all groups but `kept`."""
    alive_G = torch.zeros(keep.unit.count, dtype=torch.bool, device=weight_OI.device)
    alive_G[list(kept)] = True
    return weight_OI * alive_G.repeat_interleave(weight_OI.shape[1] // keep.unit.count)
