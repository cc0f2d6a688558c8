"""Scores by condition and by principal components: against explicit inverses and decompositions in float64."""

import pytest
import torch
from torch import Tensor

from niwaki.config.targets import PrunableUnit
from niwaki.methods.shared.unit_pruning import fit_kept, remove_groups
from niwaki.methods.shared.unit_scores import gram_condition_costs, keep_conditioned, principal_energy
from niwaki.model.prunable import group_indices
from support.models import correlated_inputs

COLUMNS = 24


def problem(columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, X and H = XᵀX + λI in float64."""
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)).double()
    x = correlated_inputs(60, columns).double()
    h = x.T @ x
    return weight, x, h + 0.01 * h.diagonal().mean() * torch.eye(columns).double()


def unit_of(count: int) -> PrunableUnit:
    return PrunableUnit("heads", "o", ("q",), count)


def condition(a: Tensor) -> float:
    values = torch.linalg.eigvalsh(a)
    return float(values.sum() * (1 / values).sum())


def greedy(count: int, keep: int, of_columns: object) -> list[int]:
    """Return the groups that stay if the one whose removal leaves the lowest condition goes, one after another."""
    left = list(range(count))
    while len(left) > keep:
        left.remove(min(left, key=lambda g: of_columns([o for o in left if o != g])))
    return left


@pytest.mark.parametrize("count", [6, COLUMNS])
def test_greedy_removal_leaves_the_gram_matrix_with_the_lowest_condition(count: int) -> None:
    weight, _, h = problem()
    unit, scale = unit_of(count), weight.norm(dim=0)

    def of_groups(groups: list[int]) -> float:
        columns = group_indices(unit, groups, COLUMNS)
        return condition((h * scale[:, None] * scale)[columns][:, columns])

    costs = gram_condition_costs(weight, h, unit)
    first = costs(weight, torch.linalg.inv(h), torch.ones(count, dtype=torch.bool)).exp()
    wanted = [of_groups([o for o in range(count) if o != g]) for g in range(count)]
    torch.testing.assert_close(first, torch.tensor(wanted).double())
    kept, found = remove_groups(weight, torch.linalg.inv(h), unit, count // 2, 1, costs)
    assert kept == greedy(count, count // 2, of_groups)
    torch.testing.assert_close(found, fit_kept(weight, h, kept, unit))


@pytest.mark.parametrize("count", [6, COLUMNS])
def test_greedy_removal_leaves_the_weights_with_the_lowest_condition(count: int) -> None:
    weight, _, _ = problem()
    unit, outer = unit_of(count), weight @ weight.T
    added = 0.1 * outer.diagonal().mean() * torch.eye(len(outer)).double()

    def of_groups(groups: list[int]) -> float:
        left = weight[:, group_indices(unit, groups, COLUMNS)]
        return condition(left @ left.T + added)

    assert keep_conditioned(weight, unit, count // 2, 1, 0.1) == greedy(count, count // 2, of_groups)


def test_a_factor_between_the_matrices_of_a_neuron_changes_no_condition() -> None:
    weight, x, _ = problem()
    unit = unit_of(COLUMNS)
    factor = torch.linspace(0.1, 10, COLUMNS).double()
    alive = torch.ones(COLUMNS, dtype=torch.bool)
    plain = gram_condition_costs(weight, x.T @ x, unit)(weight, torch.linalg.inv(x.T @ x), alive)
    moved = x * factor
    scaled = gram_condition_costs(weight / factor, moved.T @ moved, unit)(
        weight, torch.linalg.inv(moved.T @ moved), alive
    )
    torch.testing.assert_close(scaled, plain)


def test_a_column_of_zeros_has_a_condition_too() -> None:
    weight, _, h = problem()
    weight[:, 3] = 0
    unit = unit_of(COLUMNS)
    kept, _ = remove_groups(
        weight.float(), torch.linalg.inv(h).float(), unit, 20, 1, gram_condition_costs(weight.float(), h.float(), unit)
    )
    assert 3 not in kept and len(kept) == 20
    zeros = torch.zeros_like(weight)
    costs = gram_condition_costs(zeros, h, unit)(zeros, torch.linalg.inv(h), torch.ones(COLUMNS, dtype=torch.bool))
    assert bool(costs.isfinite().all())


@pytest.mark.parametrize("count", [6, COLUMNS])
def test_principal_energy_is_that_of_the_parts_of_the_output(count: int) -> None:
    weight, x, _ = problem()
    size = COLUMNS // count
    parts = torch.stack([(x[:, g : g + size] @ weight[:, g : g + size].T).flatten() for g in range(0, COLUMNS, size)])
    vectors, values, _ = torch.linalg.svd(parts, full_matrices=False)  # parts [G, N·O]
    wanted = (vectors[:, :4] * values[:4]).square().sum(1)
    torch.testing.assert_close(principal_energy(weight, x.T @ x, unit_of(count), 4), wanted)
