"""Wanda against a float64 loop written from the formula S = |W|·‖X‖₂."""

import numpy as np
import pytest
import torch

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.methods import wanda
from support.models import correlated_inputs, run_method


def reference(weight: np.ndarray, x: np.ndarray, target: Target) -> np.ndarray:
    result = weight.astype(np.float64).copy()
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(axis=0))
    rows, columns = result.shape
    for row in range(rows):
        scores = np.abs(result[row]) * norms
        if isinstance(target, NM):
            for start in range(0, columns, target.group):
                lowest = np.argsort(scores[start : start + target.group])[: target.group - target.keep]
                result[row, start + lowest] = 0
        else:
            result[row, np.argsort(scores)[: round(columns * target.zeros_frac)]] = 0
    return result


@pytest.mark.parametrize("target", [Sparsity(0.5), Sparsity(0.75), NM(2, 4), NM(4, 8), NM(1, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_reference(target: Target, seed: int) -> None:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))
    x = correlated_inputs(40, 16, seed)
    found = run_method(wanda, weight, x, target)
    np.testing.assert_array_equal(found.numpy(), reference(weight.numpy(), x.numpy(), target).astype(np.float32))


def test_activations_decide_not_magnitude_alone() -> None:
    weight = torch.tensor([[1.0, 0.5]])
    x = torch.tensor([[1.0, 10.0]])
    assert run_method(wanda, weight, x, Sparsity(0.5)).tolist() == [[0.0, 0.5]]


def test_silent_features_go_first() -> None:
    x = correlated_inputs(30, 8)
    x[:, [1, 5]] = 0
    found = run_method(wanda, torch.ones(3, 8), x, Sparsity(0.25))
    assert (found[:, [1, 5]] == 0).all()
    assert int((found == 0).sum()) == 6


def test_unreached_matrix_falls_back_by_magnitude_and_says_so() -> None:
    from support.models import calibration_of, make_block

    weight = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    block = make_block({"m": weight})
    calib = calibration_of(block, torch.empty(0, 4), wanda.needs(wanda.Config()))
    packed = wanda.compress(block, calib, {"m": Sparsity(0.5)}, wanda.Config(), torch.Generator())["m"]
    assert packed.weight_OI.tolist() == [[3.0, 0.0, 0.0, 4.0]]
    assert "no calibration token" in packed.note


def test_all_zero_rows_stay_zero() -> None:
    found = run_method(wanda, torch.zeros(2, 8), correlated_inputs(20, 8), NM(2, 4))
    assert torch.equal(found, torch.zeros(2, 8))
