"""The exact refit and the exchange of masks against closed forms in float64."""

from functools import partial

import numpy as np
import pytest
import torch

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.stream import CalibrationData
from niwaki.formats.packed import Packed
from niwaki.methods import sparsegpt
from niwaki.methods.shared.column_sweep import exchange, invert_lower, refit_kept
from niwaki.methods.shared.masks import keep_by_matrix
from support.models import calibration_of, correlated_inputs, make_block, run_method


def normal_equations(dense: np.ndarray, keep: np.ndarray, gram: np.ndarray, damping: float) -> np.ndarray:
    """Solve row by row: (H_SS + λI) v_S = (H_S: + λI_S:) w for the kept columns S."""
    h = gram.astype(np.float64) + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    result = np.zeros(dense.shape)
    for row in range(len(dense)):
        kept = np.flatnonzero(keep[row])
        result[row, kept] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ dense[row].astype(np.float64))
    return result


@pytest.mark.parametrize(("tokens", "damping"), [(200, 0.01), (10, 0.01), (200, 0.1)])
def test_refit_solves_the_normal_equations_of_every_row(tokens: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 24, generator=generator)
    keep = torch.rand(7, 24, generator=generator) > 0.5
    keep[3] = False  # an empty row stays empty
    x = correlated_inputs(tokens, 24)
    found = refit_kept(weight, weight, keep, x.T @ x, damping, iterations=80)
    wanted = normal_equations(weight.numpy(), keep.numpy(), (x.T @ x).numpy(), damping)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-3, atol=2e-4)
    assert (found[~keep] == 0).all()


def test_refit_of_silent_inputs_returns_the_dense_weights() -> None:
    weight = torch.randn(3, 8)
    keep = torch.tensor([True, False] * 4).expand(3, 8)
    found = refit_kept(weight, weight, keep, torch.zeros(8, 8), 0.01)
    torch.testing.assert_close(found, weight * keep)


@pytest.mark.parametrize("target", [Sparsity(0.6), NM(2, 4)])
def test_exchange_lowers_the_fitted_error_and_keeps_the_budget(target: Target) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(300, 32)
    gram = x.T @ x
    keep = keep_by_matrix(torch.rand(16, 32, generator=torch.Generator().manual_seed(2)), target)  # a poor mask
    fitted = refit_kept(weight, weight, keep, gram, 0.01)
    other, other_keep = exchange(weight, fitted, keep, gram, 0.01, partial(keep_by_matrix, target=target), 4)

    def error(v: torch.Tensor) -> float:
        return float((x @ (weight - v).T).square().sum())

    assert error(other) < 0.9 * error(fitted)
    assert int(other_keep.sum()) == int(keep.sum())
    assert (other[~other_keep] == 0).all()


def test_exchange_that_cannot_improve_returns_what_it_got() -> None:
    weight = torch.eye(4)
    keep = weight != 0
    fitted, found = exchange(weight, weight, keep, torch.eye(4), 0.01, lambda s: keep_by_matrix(s, Sparsity(0.75)), 3)
    assert torch.equal(found, keep) and torch.equal(fitted, weight)


@pytest.mark.parametrize("target", [Sparsity(0.5), NM(2, 4)])
def test_the_options_of_sparsegpt_improve_it_step_by_step(target: Target) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(4))
    x = correlated_inputs(400, 48)
    errors = []
    for options in ({}, {"refit": True}, {"exchanges": 3}):
        found = run_method(sparsegpt, weight, x, target, **options)
        assert int((found == 0).sum()) == target.zeros_in(24, 48)
        errors.append(float((x @ (weight - found).T).square().sum()))
    assert errors[2] < errors[1] < errors[0]


def test_in_a_chain_sparsegpt_keeps_the_mask_it_is_given() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(6, 16, generator=generator)
    keep = torch.rand(6, 16, generator=generator) > 0.4
    block = make_block({"m": weight})
    config = sparsegpt.Config(refit=True)
    calib = calibration_of(block, correlated_inputs(80, 16), sparsegpt.needs(config))
    calib = CalibrationData(calib.statistics, calib.stream, calib.dense, {"m": Packed.masked(weight, keep)})
    found = sparsegpt.compress(block, calib, {"m": Sparsity(0.5)}, config, generator)["m"].weight_OI
    assert torch.equal(found != 0, keep)
    wanted = normal_equations(weight.numpy(), keep.numpy(), calib.statistics["m"].gram_II.numpy(), 0.01)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-3, atol=2e-4)


def test_in_a_chain_a_matrix_without_tokens_keeps_the_record_it_is_given() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(7))
    keep = torch.rand(6, 16, generator=torch.Generator().manual_seed(8)) > 0.3
    block = make_block({"m": weight})
    calib = calibration_of(block, torch.empty(0, 16), sparsegpt.needs(sparsegpt.Config()))
    calib = CalibrationData(calib.statistics, start={"m": Packed.masked(weight, keep)})
    found = sparsegpt.compress(block, calib, {"m": Sparsity(0.5)}, sparsegpt.Config(), torch.Generator())["m"]
    assert torch.equal(found.weight_OI, weight * keep)


@pytest.mark.parametrize("width", [1, 700, 1024, 1025, 3001])
def test_a_triangle_is_inverted_by_halves(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    lower_II = torch.randn(width, width, generator=generator, dtype=torch.float64).tril_(-1) / width
    lower_II.diagonal().copy_(1 + torch.rand(width, generator=generator, dtype=torch.float64))
    inverse_II = invert_lower(lower_II.clone())
    assert torch.equal(inverse_II, inverse_II.tril())
    assert (inverse_II @ lower_II - torch.eye(width, dtype=torch.float64)).abs().max() < 1e-12
