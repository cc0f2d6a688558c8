"""BESA: the straight-through gradient against brute-force autograd, exact budgets, and learning that never hurts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.config.targets import Sparsity
from niwaki.data.statistics import Needs
from niwaki.methods import besa
from niwaki.methods.besa import Config, Rates
from support.blocks import calibration_with_gradients, first_block
from support.models import calibration_of, correlated_inputs, make_block, run_method


def rates_of(weights: dict[str, Tensor], share: float, **options: Any) -> Rates:
    block = make_block(weights)
    columns = next(iter(weights.values())).shape[1]
    calib = calibration_of(block, correlated_inputs(64, columns), Needs(sqnorm=True))
    zeros = round(share * sum(weight.numel() for weight in weights.values()))
    return Rates(weights, calib.statistics, zeros, Config(**options))


def randomize(rates: Rates, scale: float = 2.0) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        rates.logits_GD.add_(scale * torch.randn(rates.logits_GD.shape, generator=generator))


def soft_masks(rates: Rates, name: str, columns: int) -> Tensor:
    """Keep value 1 − Σ_d β_d·[rank < ⌊C·p_d⌋], written out for every row, candidate and column."""
    beta = torch.softmax(rates.logits_GD, dim=1)
    cuts = (rates.candidates_D * columns + 1e-4).floor()
    dropped = rates.rank[name][:, None, :] < cuts[None, :, None]
    return 1 - (beta[:, :, None] * dropped).sum(1)


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_the_straight_through_gradient_equals_brute_force_autograd(granularity: str) -> None:
    """Build every candidate's dense mask, hard forward, soft backward; then compare ∂L/∂θ by autograd."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    rates = rates_of({"m": weight}, 0.5, granularity=granularity, candidates=12, balance="penalty")
    randomize(rates)
    x = correlated_inputs(30, 24)
    wanted_output = x @ weight.T

    logits = rates.logits_GD
    hard = rates.keep("m", rates.current_zeros()["m"]).float()
    soft = soft_masks(rates, "m", 24)
    mask = soft + (hard - soft).detach()  # straight through
    loss = (x @ (weight * mask).T - wanted_output).square().sum()
    _, mean = rates.rates()
    penalty = 5 * ((mean - rates.share) / rates.share).square()
    (wanted,) = torch.autograd.grad(loss / 30 + penalty, logits)

    leaf = (weight * hard).requires_grad_(True)
    (g,) = torch.autograd.grad((x @ leaf.T - wanted_output).square().sum(), leaf)
    rates.backward({"m": g}, {"m": weight}, tokens=30)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-5)


def test_shift_takes_the_mean_rate_out_of_the_gradient() -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    rates = rates_of({"m": weight}, 0.5, balance="shift")
    randomize(rates)
    rates.backward({"m": torch.randn(5, 24)}, {"m": weight}, tokens=1)
    _, mean = rates.rates()
    (towards_mean,) = torch.autograd.grad(mean, rates.logits_GD)
    gradient = rates.logits_GD.grad
    assert gradient is not None and gradient.abs().sum() > 0
    assert (gradient * towards_mean).sum().abs() < 1e-5 * gradient.norm() * towards_mean.norm()


@pytest.mark.parametrize("share", [0.05, 0.37, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("granularity", ["row", "layer"])
@pytest.mark.parametrize("segments", [1, 4])
def test_any_target_is_met_exactly_across_the_block(share: float, granularity: str, segments: int) -> None:
    """Check rates far from the target, and matrices of different shapes."""
    weights = {"a": torch.randn(7, 24), "b": torch.randn(3, 24)}
    rates = rates_of(weights, share, granularity=granularity, segments=segments)
    randomize(rates, 5.0)
    with torch.no_grad():
        counts = rates.exact_counts()
    zeros = sum(int((~rates.keep(name, counts[name])).sum()) for name in weights)
    assert zeros == round(share * 10 * 24)


def test_the_first_rates_are_at_the_target_even_where_the_released_form_cannot_go() -> None:
    """Reach rates outside [0.38, 0.62], the range of softmax∘sigmoid."""
    for share in (0.2, 0.7, 0.8):
        rates = rates_of({"m": torch.randn(4, 100)}, share)
        _, mean = rates.rates()
        assert mean.item() == pytest.approx(share, abs=0.06)
        with torch.no_grad():
            rates.logits_GD.copy_(-(rates.candidates_D - 0.95).square() * 1e4)
        assert rates.rates()[1].item() == pytest.approx(0.95, abs=0.01)


def test_learning_moves_zeros_between_rows_and_lowers_the_heldout_error(tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=17)
    with torch.no_grad():  # some rows matter more than others
        block.weight("mlp.down_proj")[:8] *= 3
    targets = dict.fromkeys(block.linears, Sparsity(0.3))
    config = Config(steps=50, batch=2)
    packed = besa.compress(block, calibration_with_gradients(block, stream), targets, config, torch.Generator())
    zeros = 0
    for name, record in packed.items():
        assert record.detail["heldout_error"] < 0.9 * record.detail["heldout_error_start"]
        row_zeros = (record.weight_OI == 0).sum(1).tolist()
        assert record.detail["row_zeros"] == row_zeros
        kept = record.weight_OI != 0
        assert torch.equal(record.weight_OI[kept], block.weight(name)[kept])
        zeros += sum(row_zeros)
    assert zeros == sum(target.zeros_in(*block.weight(name).shape) for name, target in targets.items())
    down = packed["mlp.down_proj"].detail["row_zeros"]
    assert sum(down[:8]) / 8 < sum(down[8:]) / len(down[8:])


def test_uniform_rates_are_kept_when_learning_does_not_help() -> None:
    """Learn with a rate that is far too high: the held-out error decides."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    block = make_block({"m": weight})
    config = Config(steps=8, rate=80.0)
    calib = calibration_of(block, correlated_inputs(80, 40), besa.needs(config))
    record = besa.compress(block, calib, {"m": Sparsity(0.5)}, config, torch.Generator())["m"]
    assert record.detail["heldout_error"] <= record.detail["heldout_error_start"]
    if record.detail["heldout_error"] == record.detail["heldout_error_start"]:
        assert record.note == besa.KEPT_START and set(record.detail["row_zeros"]) == {20}


def test_quantization_stays_on_its_levels_and_learns_its_clipping() -> None:
    """Quantize weights with outliers: learned clipping lowers the held-out error."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 0] = 12.0
    x = correlated_inputs(256, 64)
    x[:, 0] *= 0.01
    errors = {}
    for steps in (1, 200):
        config = Config(quant_bits=4, steps=steps, rate=0.1)
        block = make_block({"m": weight})
        calib = calibration_of(block, x, besa.needs(config))
        record = besa.compress(block, calib, {"m": Sparsity(0.5)}, config, torch.Generator())["m"]
        assert all(len(row.unique()) <= 17 for row in record.weight_OI)  # 16 levels, and the pruned zeros
        errors[steps] = record.detail["heldout_error"]
        assert record.detail["heldout_error_start"] == pytest.approx(errors.get(1, errors[steps]), rel=0.2)
    assert errors[200] < 0.7 * errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "column"}, "granularity"),
        ({"balance": "x"}, "balance"),
        ({"quant_bits": 5}, "quant_bits"),
        ({"steps": 0}, "steps"),
        ({"segments": 0}, "segments"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_one_row_that_does_not_divide_into_segments_stays_whole() -> None:
    found = run_method(besa, torch.randn(3, 10), correlated_inputs(40, 10), Sparsity(0.5), segments=4, steps=2)
    assert int((found == 0).sum()) == 15
