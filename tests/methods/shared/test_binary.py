"""Binary weights against slow references: scales, residuals, both searches, compensation, what a target must allow."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from niwaki.config.targets import parse_target
from niwaki.errors import TargetError
from niwaki.methods.shared.binary import (
    SPLIT_FRACS,
    binarization_error,
    check_reach,
    choose_salient,
    fit_row,
    half,
    split_by_size,
    sweep_blocks,
)
from niwaki.methods.shared.column_sweep import inverse_factor
from support.binary_weights import Array, binarised, random
from support.models import correlated_inputs


def reference_error(weight: Array, keep: NDArray[np.bool_], mean: bool, orders: int = 1) -> float:
    total = 0.0
    for row, kept in zip(weight, keep, strict=True):
        values = row[kept].tolist()
        for _ in range(orders):
            levels = binarised(values, mean)[2]
            values = [v - level for v, level in zip(values, levels, strict=True)]
        total += sum(v * v for v in values)
    return total


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("orders", [1, 2, 3])
def test_scales_and_residuals_equal_the_formulas(mean: bool, orders: int) -> None:
    weight = random(6, 20)
    keep = random(6, 20, seed=1) > 0
    keep[2] = False
    mean_O, scale_O = fit_row(weight, keep, mean)
    for row in range(6):
        mu, alpha, _ = binarised(weight[row][keep[row]].double().tolist(), mean)
        assert float(mean_O[row]) == pytest.approx(mu, rel=1e-3, abs=1e-6)
        assert float(scale_O[row]) == pytest.approx(alpha, rel=1e-3, abs=1e-6)
    assert torch.equal(half(scale_O), scale_O)
    expected = reference_error(weight.double().numpy(), keep.numpy(), mean, orders)
    assert float(binarization_error(weight, keep, mean, orders)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mean", [False, True])
def test_salient_columns_are_the_prefix_of_least_error(mean: bool) -> None:
    weight = random(12, 24)
    weight[:, [3, 9, 17]] *= 6
    score = weight.square().sum(0)
    found = choose_salient(weight, score, 10, mean)
    order = np.argsort(-score.numpy(), kind="stable")
    errors = []
    for count in range(1, 11):
        keep = np.zeros((12, 24), dtype=bool)
        keep[:, order[:count]] = True
        array = weight.double().numpy()
        errors.append(reference_error(array, keep, mean) + reference_error(array, ~keep, mean))
    best = int(np.argmin(errors)) + 1
    assert set(found.nonzero().view(-1).tolist()) == set(order[:best].tolist())
    assert not choose_salient(weight, score, 0, mean).any()
    assert int(choose_salient(weight, score, 1, mean).sum()) == 1


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("orders", [1, 2])
def test_the_split_is_the_best_of_all_thresholds(mean: bool, orders: int) -> None:
    weight, keep = random(10, 30), random(10, 30, seed=3) > -0.02
    large = split_by_size(weight, keep, mean, orders)
    assert not (large & ~keep).any() and large.any() and (keep & ~large).any()
    array, kept = weight.double().numpy(), keep.numpy()
    sizes = np.sort(np.abs(array[kept]))
    errors = []
    for share in SPLIT_FRACS.tolist():
        above = kept & (np.abs(array) > sizes[round(share * (len(sizes) - 1))])
        errors.append(reference_error(array, above, mean, orders) + reference_error(array, kept & ~above, mean, orders))
    mine = reference_error(array, large.numpy(), mean, orders)
    mine += reference_error(array, (keep & ~large).numpy(), mean, orders)
    assert mine == pytest.approx(min(errors), rel=1e-3)  # a tie within float16 may go either way
    assert not split_by_size(weight, torch.zeros_like(keep), mean).any()


def test_compensation_is_the_exact_least_squares_answer() -> None:
    """Check that the later columns minimize the error of the outputs for the coded block."""
    weight, x = random(5, 12), correlated_inputs(80, 12)
    upper, damping = inverse_factor(x.T @ x, 0.01)
    seen = []

    def encode(block_OC: torch.Tensor, upper_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(block_OC.clone())
        values = block_OC.sign() * 0.02
        return values, values

    found = torch.cat(sweep_blocks(weight, upper, 4, encode), 1)
    h = (x.T @ x).double().numpy()
    h += damping * h.diagonal().mean() * np.eye(12)
    w, q = weight.double().numpy(), found.double().numpy()
    for end in (4, 8):
        error = w[:, :end] - q[:, :end]
        rest = w[:, end:] + error @ h[:end, end:] @ np.linalg.inv(h[end:, end:])
        np.testing.assert_allclose(seen[end // 4].numpy(), rest[:, :4], rtol=1e-3, atol=1e-6)


def test_columns_one_by_one_are_the_sweep_of_gptq() -> None:
    weight, x = random(6, 16), correlated_inputs(100, 16)
    upper, _ = inverse_factor(x.T @ x, 0.01)

    def encode(block_OC: torch.Tensor, upper_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.where(block_OC >= 0, 0.02, -0.02)
        return values, values

    found = torch.cat(sweep_blocks(weight, upper, 1, encode), 1).double().numpy()
    left, factor = weight.double().numpy().copy(), upper.double().numpy()
    for column in range(16):
        error = (left[:, column] - found[:, column]) / factor[column, column]
        assert ((left[:, column] >= 0) == (found[:, column] > 0)).all()
        left[:, column + 1 :] -= np.outer(error, factor[column, column + 1 :])


def test_a_target_below_reach_names_bits_that_are_enough() -> None:
    with pytest.raises(TargetError, match=r"m, 3×7, needs 3\.048 bits with this method: ask for 3\.048bit or more"):
        check_reach("m", 3, 7, 8, parse_target("3.04bit"))
    check_reach("m", 3, 7, 8, parse_target("3.048bit"))
    with pytest.raises(TargetError, match="too small for this method"):
        check_reach("m", 3, 7, 30, parse_target("8bit"))
