"""BESA: the straight-through gradient against brute-force autograd, exact budgets, and learning that never hurts."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.config.targets import Sparsity
from niwaki.data.statistics import Needs
from niwaki.methods import besa
from niwaki.methods.besa import Config, Rates
from niwaki.methods.shared.block_training import Reconstruction
from support.blocks import calibration_with_gradients, first_block
from support.models import calibration_of, correlated_inputs, make_block, run_method


def rates_of(weights: dict[str, Tensor], share: float, **options: Any) -> Rates:
    block = make_block(weights)
    columns = next(iter(weights.values())).shape[1]
    calib = calibration_of(block, correlated_inputs(64, columns), Needs(sqnorm=True))
    zeros = round(share * sum(weight.numel() for weight in weights.values()))
    scores = partial(besa._scores, weights, calib.statistics, "wanda")
    return Rates(weights, scores, zeros, Config(**options))


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
        ({"normalize": "row"}, "normalize must be one of token, channel, released"),
        ({"normalize": "released", "reconstruct": "parts"}, "it needs reconstruct=block"),
        ({"score": "taylor"}, "score must be one of wanda, surgeon, magnitude"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_rank": 4, "quant_bits": 4}, "both change the weights"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_one_row_that_does_not_divide_into_segments_stays_whole() -> None:
    found = run_method(besa, torch.randn(3, 10), correlated_inputs(40, 10), Sparsity(0.5), segments=4, steps=2)
    assert int((found == 0).sum()) == 15


@pytest.mark.parametrize("normalize", ["token", "channel", "released"])
def test_the_loss_divides_by_what_its_name_says(normalize: str) -> None:
    """Compare gradients with those of the loss written out in float64 for one matrix."""
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    weight[0] *= 30  # one channel with large outputs
    block, x = make_block({"m": weight}), correlated_inputs(64, 10)
    calib = calibration_of(block, x, besa.needs(Config()))
    task = Reconstruction(block, calib, "block", torch.Generator(), normalize=normalize)
    pruned = weight * (torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) > 0.5)
    found = task.gradients({"m": pruned}, [1, 4])["m"]
    leaf = pruned.double().requires_grad_(True)
    inputs = x.double().view(8, 8, 10)[[1, 4]].reshape(16, 10)
    wanted = inputs @ weight.double().T
    lost = (inputs @ leaf.T - wanted).square()
    loss = {
        "token": (lost.sum(1) / wanted.square().sum(1)).mean(),
        "channel": (lost.sum(0) / wanted.square().sum(0)).mean(),
        "released": (lost.sum(0) / wanted.norm(dim=0)).mean(),
    }[normalize]
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found.double() / 16, leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["surgeon", "magnitude"])
def test_rows_lose_the_lowest_of_the_named_score(score: str) -> None:
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(2))
    x = correlated_inputs(200, 24)
    found = run_method(besa, weight, x, Sparsity(0.5), score=score, steps=2)
    gram = (x.double().T @ x.double()) + 0.01 * x.double().square().sum(0).mean() * torch.eye(24, dtype=torch.float64)
    of_surgeon = weight.double().square() / torch.linalg.inv(gram).diagonal()
    scores = of_surgeon if score == "surgeon" else weight.double().abs()
    for row in range(9):
        dropped = found[row] == 0
        assert scores[row][dropped].max() < scores[row][~dropped].min()


def test_a_low_rank_update_learns_with_the_rates_and_keeps_the_mask(tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=17)
    targets = dict.fromkeys(block.linears, Sparsity(0.5))
    errors = {}
    for rank in (0, 4):
        config = Config(steps=40, lora_rank=rank)
        packed = besa.compress(block, calibration_with_gradients(block, stream), targets, config, torch.Generator())
        errors[rank] = packed["mlp.down_proj"].detail["heldout_error"]
        zeros = 0
        for name, record in packed.items():
            kept = record.weight_OI != 0
            change = (record.weight_OI - block.weight(name))[kept].abs().max()
            assert (change > 0) == (rank > 0)
            assert record.detail["row_zeros"] == (~kept).sum(1).tolist()
            zeros += int((~kept).sum())
        assert zeros == sum(target.zeros_in(*block.weight(name).shape) for name, target in targets.items())
    assert errors[4] < 0.9 * errors[0]


def test_gradients_of_a_low_rank_update_equal_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"m": torch.randn(5, 12, generator=generator)}
    change = besa.LowRank(weights, 3, 0.01, generator)
    with torch.no_grad():
        change.up["m"].normal_(generator=generator)
    gradient = torch.randn(5, 12, generator=generator)
    values = change.applied(weights)
    torch.testing.assert_close(values["m"], weights["m"] + change.up["m"] @ change.down["m"])
    change.backward(values, {"m": gradient})
    torch.testing.assert_close(change.up["m"].grad, gradient @ change.down["m"].detach().T)
    torch.testing.assert_close(change.down["m"].grad, change.up["m"].detach().T @ gradient)
