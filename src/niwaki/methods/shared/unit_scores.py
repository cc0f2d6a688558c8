"""Choice of the groups of a matrix by the condition of what is left, or by principal components.

Candidates for the score that COMP (arXiv 2501.15255) calls "matrix condition-based"; its formula is not verified. The
condition of a positive definite matrix A of n rows is tr(A) · tr(A⁻¹), which lies between κ(A) and n² · κ(A). From A⁻¹
it follows exactly for the removal of each group, without a decomposition.

- `gram_condition_costs`: A is the Gram matrix of the inputs that stay. Each is scaled by the norm of its column of W:
  a factor that moves from one matrix of a neuron to the next changes nothing.
- `keep_conditioned`: A = W_S W_Sᵀ + λI, S the columns that stay. No data is needed.
- `principal_energy`: group g adds W_g x_g to the output. C holds the inner products of these parts over all tokens. The
  score is the energy Σ λ_i V_gi² of a group in the first K principal components of C, K the number of groups that stay.

Legend: O outputs, I inputs, G groups, S columns of a group.
"""

import torch
from torch import Tensor

from niwaki.config.targets import PrunableUnit
from niwaki.methods.shared.unit_pruning import Costs, lowest_groups, sum_by_group

MIN_SCALE = 1e-6  # of the largest norm of a column: one of zeros has none


def gram_condition_costs(weight_OI: Tensor, damped_II: Tensor, unit: PrunableUnit) -> Costs:
    """Return the costs for `remove_groups`: the log of the condition of the Gram matrix after a removal."""
    norm_I = torch.linalg.vector_norm(weight_OI, dim=0)
    scale_I = norm_I.clamp_min(MIN_SCALE * float(norm_I.max()) or 1.0)
    traces_G = sum_by_group(damped_II.diagonal() * scale_I.square(), unit)
    size = len(damped_II) // unit.count

    def costs(_: Tensor, inverse_II: Tensor, alive_G: Tensor) -> Tensor:
        scaled_II = inverse_II / scale_I[:, None] / scale_I  # rows of removed groups are zero but for the diagonal
        trace = (sum_by_group(scaled_II.diagonal(), unit) * alive_G).sum()
        if size == 1:
            lost_G = scaled_II.square().sum(0) / scaled_II.diagonal()
        else:
            rows_GSI = scaled_II.view(unit.count, size, -1)
            own_GSS = torch.stack([scaled_II[g : g + size, g : g + size] for g in range(0, len(scaled_II), size)])
            lost_G = (rows_GSI * torch.linalg.solve_ex(own_GSS, rows_GSI)[0]).sum((1, 2))
        condition_G: Tensor = ((traces_G * alive_G).sum() - traces_G) * (trace - lost_G)
        return condition_G.log()

    return costs


@torch.no_grad()
def keep_conditioned(weight_OI: Tensor, unit: PrunableUnit, count: int, at_once: int, damping_frac: float) -> list[int]:
    """Return the `count` groups, ascending, that greedy removal leaves with the lowest condition of W_S W_Sᵀ + λI."""
    left_GSO = weight_OI.T.reshape(unit.count, -1, weight_OI.shape[0]).clone()
    outer_OO = weight_OI @ weight_OI.T
    outer_OO.diagonal().add_(damping_frac * outer_OO.diagonal().mean())
    alive_G = torch.ones(unit.count, dtype=torch.bool, device=weight_OI.device)
    while (left := int(alive_G.sum()) - count) > 0:
        costs_G = _weight_condition(left_GSO, outer_OO)
        gone = lowest_groups(torch.where(alive_G, costs_G, torch.inf), min(at_once, left))
        rows_RO = left_GSO[gone].flatten(0, 1)
        outer_OO.addmm_(rows_RO.T, rows_RO, alpha=-1)
        left_GSO[gone] = 0
        alive_G[gone] = False
    return [int(g) for g in alive_G.nonzero().view(-1)]


def _weight_condition(left_GSO: Tensor, outer_OO: Tensor) -> Tensor:
    """Return the log of the condition of A without each group [G]: A⁻¹ grows by A⁻¹W_g (I − W_gᵀA⁻¹W_g)⁻¹ W_gᵀA⁻¹."""
    inverse_OO = torch.cholesky_inverse(torch.linalg.cholesky(outer_OO))
    solved_GSO = left_GSO @ inverse_OO
    inner_GSS = torch.eye(left_GSO.shape[1], device=left_GSO.device) - solved_GSO @ left_GSO.mT
    grown_G = (solved_GSO * torch.linalg.solve_ex(inner_GSS, solved_GSO)[0]).sum((1, 2))
    traces_G = outer_OO.diagonal().sum() - left_GSO.square().sum((1, 2))
    condition_G: Tensor = traces_G * (inverse_OO.diagonal().sum() + grown_G)
    return condition_G.log()


@torch.no_grad()
def principal_energy(weight_OI: Tensor, gram_II: Tensor, unit: PrunableUnit, count: int) -> Tensor:
    """Return the energy [G] of each group in the first `count` principal components of the parts of the output."""
    size = len(gram_II) // unit.count
    parts_II = gram_II * (weight_OI.T @ weight_OI)
    parts_GG = parts_II.view(unit.count, size, unit.count, size).sum((1, 3))
    energy_G, vectors_GG = torch.linalg.eigh(parts_GG)
    found_G: Tensor = vectors_GG[:, -count:].square() @ energy_G[-count:]
    return found_G
