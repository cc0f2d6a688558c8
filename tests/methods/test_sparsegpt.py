"""SparseGPT against a float64 optimal-brain-surgeon loop that inverts the remaining Hessian at every column."""

from typing import Any

import numpy as np
import pytest
import torch

from niwaki.config.targets import NM, Bits, Sparsity, Target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import NumericalError, TargetError
from niwaki.methods import sparsegpt
from niwaki.methods.shared.column_sweep import inverse_factor, pull_to_dense
from support.models import calibration_of, correlated_inputs, make_block, run_method, statistics_of


def reference(
    weight: np.ndarray, x: np.ndarray, target: Target, damping_frac: float, panel: int, until: int | None = None
) -> np.ndarray:
    """Prune from left to right; [H_{j:}]⁻¹ is computed from scratch at every column j."""
    w = weight.astype(np.float64).copy()
    h = x.astype(np.float64).T @ x.astype(np.float64)
    h += damping_frac * np.mean(np.diag(h)) * np.eye(len(h))
    rows, columns = w.shape
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    pruned = np.zeros_like(w, dtype=bool)
    total = round(rows * columns * target.zeros_frac) if isinstance(target, Sparsity) else 0
    for j in range(columns if until is None else until):
        if isinstance(target, Sparsity) and j % panel == 0:
            members = range(j, min(j + panel, columns))
            saliency = [(w[r, c] ** 2 / inverses[c][0, 0], c, r) for r in range(rows) for c in members]
            zeros = total * members.stop // columns - total * j // columns
            for _, c, r in sorted(saliency)[:zeros]:
                pruned[r, c] = True
        if isinstance(target, NM) and j % target.group == 0:
            for r in range(rows):
                order = sorted(range(j, j + target.group), key=lambda c, r=r: w[r, c] ** 2 / inverses[c][0, 0])
                pruned[r, order[: target.group - target.keep]] = True
        for r in range(rows):
            if pruned[r, j]:
                w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][0]
                w[r, j] = 0
    return w


@pytest.mark.parametrize("target", [Sparsity(0.5), Sparsity(0.7), NM(2, 4), NM(4, 8), NM(1, 4)])
@pytest.mark.parametrize("panel", [8, 128])
def test_equals_reference(target: Target, panel: int) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(96, 24)
    found = run_method(sparsegpt, weight, x, target, panel_columns=panel)
    wanted = reference(weight.numpy(), x.numpy(), target, 0.01, panel)
    np.testing.assert_array_equal(found.numpy() == 0, wanted == 0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("panel", [8, 128])
def test_a_part_equals_a_reference_whose_dense_columns_come_last(panel: int) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(96, 24)
    found = run_method(sparsegpt, weight, x, NM(2, 4, 0.25), panel_columns=panel)
    gram = x.double().numpy().T @ x.double().numpy()
    inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(24))
    saliency = weight.double().numpy() ** 2 / np.diag(inverse)
    lost = [np.sort(saliency[:, start : start + 4], axis=1)[:, :2].sum() for start in range(0, 24, 4)]
    first = sorted(sorted(range(6), key=lambda group: lost[group])[:3])
    columns = [4 * group + place for group in first for place in range(4)]
    order = columns + [column for column in range(24) if column not in columns]
    swept = reference(weight.numpy()[:, order], x.numpy()[:, order], NM(2, 4), 0.01, panel, until=12)
    np.testing.assert_array_equal(found.numpy()[:, order] == 0, swept == 0)
    np.testing.assert_allclose(found.numpy()[:, order], swept, rtol=2e-4, atol=2e-5)
    assert int((found == 0).sum()) == 6 * 6
    assert not torch.equal(found[:, order[12:]], weight[:, order[12:]]), "dense columns take up errors"


@pytest.mark.parametrize("options", [{}, {"exchanges": 4}, {"refit": True}])
def test_a_part_loses_less_than_the_whole_and_than_other_groups(options: dict[str, Any]) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    x = correlated_inputs(400, 64)
    errors = []
    for target in (NM(2, 4), NM(2, 4, 0.4)):
        found = run_method(sparsegpt, weight, x, target, **options)
        errors.append(float(((found - weight) @ x.T).square().sum()))
        assert int((found == 0).sum()) == target.zeros_in(16, 64)
    assert errors[1] < 0.75 * errors[0]


def test_width_that_no_panel_divides() -> None:
    weight = torch.randn(5, 29, generator=torch.Generator().manual_seed(4))
    x = correlated_inputs(80, 29)
    found = run_method(sparsegpt, weight, x, Sparsity(0.4), panel_columns=8)
    assert int((found == 0).sum()) == round(0.4 * 5 * 29)
    wanted = reference(weight.numpy(), x.numpy(), Sparsity(0.4), 0.01, 8)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-4, atol=2e-5)


def test_factor_equals_inverse_in_float64() -> None:
    x = correlated_inputs(200, 20).double()
    gram = x.T @ x
    upper, damping = inverse_factor(gram.float(), 0.01)
    assert damping == 0.01
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.double().T @ upper.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("target", [Sparsity(0.5), NM(2, 4)])
def test_fewer_tokens_than_columns_stay_finite(tokens: int, target: Target) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    found = run_method(sparsegpt, weight, correlated_inputs(tokens, 32) * 100, target)
    assert torch.isfinite(found).all()
    assert int((found == 0).sum()) == 64


def test_silent_features_are_cheapest_and_the_budget_holds() -> None:
    x = correlated_inputs(64, 16)
    x[:, 3] = x[:, 9] = 0
    found = run_method(sparsegpt, torch.ones(8, 16), x, Sparsity(0.25))
    assert (found[:, [3, 9]] == 0).all()
    assert int((found == 0).sum()) == 32


def test_all_inputs_zero_is_magnitude_like_and_finite() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    found = run_method(sparsegpt, weight, torch.zeros(10, 8), NM(2, 4))
    kept = found != 0
    assert torch.equal(found[kept], weight[kept])
    assert int(kept.sum()) == 16


def test_damping_that_had_to_be_raised_is_noted() -> None:
    x = torch.ones(2, 64) * 1e4
    block = make_block({"m": torch.randn(2, 64)})
    config = sparsegpt.Config(damping_frac=1e-9)
    calib = calibration_of(block, x, sparsegpt.needs(config))
    packed = sparsegpt.compress(block, calib, {"m": Sparsity(0.5)}, config, torch.Generator())["m"]
    assert "damping_frac raised to" in packed.note
    assert torch.isfinite(packed.weight_OI).all()


def test_non_finite_activations_are_a_named_error() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        run_method(sparsegpt, torch.ones(2, 4), torch.full((3, 4), float("nan")), Sparsity(0.5))


def test_compensation_beats_masking() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(7))
    x = correlated_inputs(256, 32)
    found = run_method(sparsegpt, weight, x, NM(2, 4))
    masked = weight * (found != 0)
    wanted = x @ weight.T
    assert (x @ found.T - wanted).square().sum() < 0.8 * (x @ masked.T - wanted).square().sum()


def test_one_factor_serves_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share one Gram matrix and one factor among matrices with the same inputs."""
    from dataclasses import replace

    calls = []

    def counting(gram: torch.Tensor, damping_frac: float) -> tuple[torch.Tensor, float]:
        calls.append(gram)
        return inverse_factor(gram, damping_frac)

    monkeypatch.setattr(sparsegpt, "inverse_factor", counting)
    block = make_block({"q": torch.randn(4, 8), "k": torch.randn(4, 8), "o": torch.randn(4, 8)})
    block.anatomy.linears["k"] = replace(block.anatomy.linears["k"], group="q")
    shared = statistics_of(correlated_inputs(40, 8), Needs(gram=True))
    other = statistics_of(correlated_inputs(40, 8, 1), Needs(gram=True))
    statistics = {"q": shared, "k": shared, "o": other}
    targets = dict.fromkeys(statistics, Sparsity(0.5))
    sparsegpt.compress(block, CalibrationData(statistics), targets, sparsegpt.Config(), torch.Generator())
    assert [gram is shared.gram_II for gram in calls] == [True, False]


def test_a_kind_of_target_that_the_sweep_cannot_meet_is_refused() -> None:
    with pytest.raises(TargetError, match="no mask of scores meets target 4bit"):
        run_method(sparsegpt, torch.randn(4, 8), torch.randn(16, 8), Bits(4))


def _paired() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs [N, I] in the dense model, and those of the same tokens in the compressed one."""
    full = correlated_inputs(300, 16)
    return full, 0.9 * full + 0.4 * torch.randn(full.shape, generator=torch.Generator().manual_seed(9))


def test_the_pull_solves_the_asymmetric_least_squares_in_float64() -> None:
    full, x = _paired()
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    gram, cross = x.T @ x, full.T @ x
    damped_II = gram + 3.0 * torch.eye(16)
    found = weight @ pull_to_dense(cross, gram, damped_II, 1.0)
    w, f, h = weight.double().numpy(), full.double().numpy(), x.double().numpy()
    rows = np.concatenate([h, np.sqrt(3.0) * np.eye(16)])
    goals = np.concatenate([f @ w.T, np.sqrt(3.0) * w.T])
    wanted = np.linalg.lstsq(rows, goals, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)
    half = weight @ pull_to_dense(cross, gram, damped_II, 0.5)
    torch.testing.assert_close(half, (found + weight) / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"refit": True}, {"exchanges": 2}])
def test_toward_dense_comes_nearer_to_the_outputs_of_the_dense_model(options: dict[str, object]) -> None:
    full, x = _paired()
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(Needs(gram=True, full=True))
    statistics.add(x, full)
    block, calib = make_block({"m": weight}), CalibrationData({"m": statistics})
    errors = []
    for share in (0.0, 0.5, 1.0):
        config = sparsegpt.Config(toward_dense=share, **options)
        assert sparsegpt.needs(config).full == (share > 0)
        found = sparsegpt.compress(block, calib, {"m": NM(2, 4)}, config, torch.Generator())["m"].weight_OI
        assert int((found == 0).sum()) == found.numel() // 2
        errors.append(float((x @ found.T - full @ weight.T).square().sum()))
    assert errors[2] < errors[1] < errors[0]
