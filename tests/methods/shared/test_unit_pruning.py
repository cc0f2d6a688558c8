"""Removing groups of columns: against least squares and brute force in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from niwaki.config.targets import PrunableUnit
from niwaki.methods.shared.unit_pruning import (
    fit_kept,
    fit_scales,
    highest_groups,
    removal_costs,
    remove_groups,
    sum_by_group,
)
from niwaki.model.prunable import group_indices
from support.models import correlated_inputs


def problem(columns: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, X and H = XᵀX + λI in float64."""
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)).double()
    x = correlated_inputs(60, columns).double()
    h = x.T @ x
    return weight, x, h + 0.01 * h.diagonal().mean() * torch.eye(columns).double()


def unit_of(count: int) -> PrunableUnit:
    return PrunableUnit("heads", "o", ("q",), count)


def least(weight: Tensor, h: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    """Return the best matrix on `columns` alone and its error, from the normal equations."""
    found = torch.zeros_like(weight)
    found[:, columns] = weight @ h[:, columns] @ torch.linalg.inv(h[columns][:, columns])
    lost = weight - found
    return found, float(((lost @ h) * lost).sum())


@pytest.mark.parametrize("count", [6, 24])
@pytest.mark.parametrize("at_once", [1, 3])
def test_what_is_left_is_the_least_squares_solution(count: int, at_once: int) -> None:
    weight, _, h = problem()
    unit = unit_of(count)
    kept, found = remove_groups(weight, torch.linalg.inv(h), unit, count // 2, at_once)
    assert kept == sorted(kept) and len(kept) == count // 2
    expected, _ = least(weight, h, group_indices(unit, kept, 24))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fit_kept(weight, h, kept, unit), expected)


@pytest.mark.parametrize("count", [6, 24])
def test_costs_are_the_errors_that_removal_makes(count: int) -> None:
    weight, _, h = problem()
    unit = unit_of(count)
    costs = removal_costs(weight, torch.linalg.inv(h), unit)
    for group in range(count):
        others = [g for g in range(count) if g != group]
        assert float(costs[group]) == pytest.approx(least(weight, h, group_indices(unit, others, 24))[1], rel=1e-9)


def test_one_at_a_time_takes_the_cheapest_of_what_is_left_and_nears_the_best_choice() -> None:
    weight, _, h = problem(8)
    unit = unit_of(8)
    kept, _ = remove_groups(weight, torch.linalg.inv(h), unit, 4, 1)
    left = list(range(8))
    for _ in range(4):
        left.remove(min(left, key=lambda g: least(weight, h, torch.tensor([o for o in left if o != g]))[1]))
    assert kept == left
    errors = sorted(least(weight, h, torch.tensor(choice))[1] for choice in itertools.combinations(range(8), 4))
    assert least(weight, h, torch.tensor(kept))[1] <= errors[len(errors) // 10]


def test_scales_are_the_least_squares_factors() -> None:
    weight, x, h = problem()
    unit = unit_of(6)
    kept = [0, 2, 3, 5]
    found = fit_scales(weight, h, kept, unit)
    # Outputs and the damping as rows of one system: a column a kept group, a row an output of a token.
    lower = torch.linalg.cholesky(h)
    design = torch.stack(
        [(weight[:, group_indices(unit, [g], 24)] @ lower[group_indices(unit, [g], 24)]).reshape(-1) for g in kept],
        dim=1,
    )
    factors = torch.linalg.lstsq(design, (weight @ lower).reshape(-1, 1)).solution.view(-1)
    expected = torch.zeros_like(weight)
    for group, factor in zip(kept, factors, strict=True):
        columns = group_indices(unit, [group], 24)
        expected[:, columns] = weight[:, columns] * factor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(x)


def test_ties_keep_the_higher_number_and_sums_go_by_group() -> None:
    assert highest_groups(torch.tensor([1.0, 1.0, 1.0, 2.0]), 2) == [2, 3]
    assert sum_by_group(torch.arange(6.0), unit_of(3)).tolist() == [1.0, 5.0, 9.0]
