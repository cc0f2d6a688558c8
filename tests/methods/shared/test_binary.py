"""Binary weights against slow references: scales, residuals, both searches, compensation, what a target must allow."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from niwaki.config.recipe import Bits, parse_target
from niwaki.errors import TargetError
from niwaki.formats.record import Packed
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
from niwaki.methods.shared.rounding import groups_of, round_by_sweep
from support.models import calibration_of, correlated_inputs, make_block

Array = NDArray[np.float64]


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def wide() -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights with columns of different sizes, and a few dominant inputs, as in a language model."""
    weight = random(96, 256) * (1 + random(96, 256, seed=7).abs() * 50) * (25 * random(1, 256, seed=5)).exp()
    x = correlated_inputs(600, 256)
    x[:, torch.randperm(256, generator=torch.Generator().manual_seed(1))[:20]] *= 4
    return weight, x


def output_error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum())


def one_bit_error(weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the output error of the plain error-compensated sweep with one bit and a mean for 128 columns."""
    upper, _ = inverse_factor(x.T @ x, 0.01)
    return output_error(
        round_by_sweep(weight, upper, groups_of(0, weight.shape[1], 1, "free", 128), False).values_OI, weight, x
    )


def record(module: Any, weight: torch.Tensor, x: torch.Tensor, bits: float = 8, **options: Any) -> Packed:
    config = module.Config(**options)
    block = make_block({"m": weight})
    calib = calibration_of(block, x, module.needs(config))
    found: Packed = module.compress(block, calib, {"m": Bits(bits)}, config, torch.Generator())["m"]
    return found


def record_and_tensors(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, weight: torch.Tensor, x: torch.Tensor, **options: Any
) -> tuple[Packed, dict[str, Array]]:
    """Return a record, and the tensors that it was decoded from."""
    caught: dict[str, torch.Tensor] = {}
    with_true_size = module.with_true_size

    def catch(weight_OI: torch.Tensor, tensors: dict[str, torch.Tensor], *rest: Any) -> Packed:
        caught.update(tensors)
        found: Packed = with_true_size(weight_OI, tensors, *rest)
        return found

    monkeypatch.setattr(module, "with_true_size", catch)
    packed = record(module, weight, x, **options)
    assert packed.detail["method_bytes"] == sum(tensor.nbytes for tensor in caught.values())
    assert packed.detail["method_bits"] == 8 * packed.detail["method_bytes"] / weight.numel()
    return packed, {name: tensor.numpy() for name, tensor in caught.items()}


def bits_of(planes: NDArray[np.uint8], *shape: int) -> NDArray[np.bool_]:
    """Unpack one bit plane with numpy instead of niwaki."""
    found: NDArray[np.uint8] = np.unpackbits(planes.reshape(-1), bitorder="little")[: int(np.prod(shape))]
    return found.reshape(shape).astype(bool)


def binarised(values: list[float], mean: bool) -> tuple[float, float, list[float]]:
    """Return μ, α and the levels of one row, by the formulas."""
    mu = sum(values) / len(values) if mean and values else 0.0
    alpha = sum(abs(v - mu) for v in values) / len(values) if values else 0.0
    return mu, alpha, [mu + (alpha if v >= mu else -alpha) for v in values]


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
