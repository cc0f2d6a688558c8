"""ShortGPT, Wanda-sp, FLAP and 2SSP: scores and searches against plain formulas."""

from typing import Any

import pytest
import torch
import transformers

from niwaki.config.targets import KeepUnits, PrunableUnit
from niwaki.methods import flap, shortgpt, two_ssp, wanda_sp
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSpace
from support.families import GQA
from support.models import calibration_of, correlated_inputs, make_block

HEADS, NEURONS = PrunableUnit("heads", "m", (), 8), PrunableUnit("neurons", "m", (), 32)


def sizes() -> ShapeSpace:
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": 4})
    skeleton = build_skeleton(config, torch.float32)
    return ShapeSpace(discover(skeleton), skeleton, config.to_dict())


def result(search: Any, loss: Any = None) -> PrunedShape | None:
    try:
        shapes = next(search)
        while True:
            shapes = search.send([loss(shape) for shape in shapes])
    except StopIteration as stop:
        found: PrunedShape | None = stop.value
        return found


def chosen(module: Any, unit: PrunableUnit, count: int, x: torch.Tensor, weight: torch.Tensor) -> Any:
    block = make_block({"m": weight})
    config = module.Config()
    calib = calibration_of(block, x, module.needs(config))
    return module.compress(block, calib, {"m": KeepUnits(unit, count)}, config, torch.Generator())["m"]


WEIGHT = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
X = correlated_inputs(300, 32) + torch.linspace(-2, 2, 32)


@pytest.mark.parametrize(("unit", "count"), [(NEURONS, 20), (HEADS, 5)])
def test_wanda_scores_are_summed_over_a_group(unit: PrunableUnit, count: int) -> None:
    found = chosen(wanda_sp, unit, count, X, WEIGHT)
    scores = (WEIGHT.double().abs() * X.double().square().sum(0).sqrt()).mean(0).view(unit.count, -1).sum(1)
    assert found.detail["kept_groups"] == sorted(scores.argsort(descending=True)[:count].tolist())
    kept = found.weight_OI != 0
    assert torch.equal(found.weight_OI[kept], WEIGHT[kept])


@pytest.mark.parametrize(("unit", "count"), [(NEURONS, 20), (HEADS, 5)])
def test_flap_keeps_what_fluctuates_and_its_bias_makes_up_for_the_mean(unit: PrunableUnit, count: int) -> None:
    found = chosen(flap, unit, count, X, WEIGHT)
    x, w = X.double(), WEIGHT.double()
    scores = (x.var(0, correction=0) * w.square().sum(0)).view(unit.count, -1).sum(1)
    assert found.detail["kept_groups"] == sorted(scores.argsort(descending=True)[:count].tolist())
    torch.testing.assert_close(found.bias_O.double(), (w - found.weight_OI.double()) @ x.mean(0), rtol=1e-4, atol=1e-4)
    lost = x @ (found.weight_OI.double() - w).T + found.bias_O.double()
    assert float(lost.mean(0).abs().max()) < 1e-4


def test_flap_takes_the_lowest_standard_scores_of_all_blocks() -> None:
    generator = torch.Generator().manual_seed(3)
    looks = [
        BlockInfo(0.0, {"neurons": torch.randn(48, generator=generator).tolist(), "heads": [5.0, 6.0]})
        for _ in range(4)
    ]
    looks[1] = BlockInfo(0.0, {"neurons": [-9.0] * 48, "heads": [5.0, 6.0]})
    found = sizes()
    shape = result(flap.search(found, 0.3, looks, flap.Config()))
    assert shape is not None and shape.neurons[1] == 1 and shape.heads == (2, 2, 2, 2)
    smallest = 1 / (4 * found.block_parameters) * found.group_parameters["neurons"]
    assert 0.3 <= found.removed_frac(shape) < 0.3 + 2 * smallest
    assert result(flap.search(found, 0.99, looks, flap.Config())) is None


def test_flap_looks_at_standardised_scores() -> None:
    block = make_block({"m": WEIGHT})
    calib = calibration_of(block, X, flap.needs(flap.Config())).statistics
    scores = torch.tensor(flap.block_info(block, calib, {"neurons": NEURONS}, flap.Config())["neurons"])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6) and float(scores.std()) == pytest.approx(1, abs=1e-6)


def test_shortgpt_drops_the_least_influential_blocks() -> None:
    looks = [BlockInfo(influence) for influence in (0.9, 0.1, 0.3, 0.2)]
    for target, gone in ((0.25, (1,)), (0.4, (1, 3)), (0.05, (1,)), (0.99, (1, 2, 3))):
        shape = result(shortgpt.search(sizes(), target, looks, shortgpt.Config()))
        assert shape is not None and shape.dropped == gone


def test_2ssp_removes_attentions_greedily_and_neurons_for_the_rest() -> None:
    found = sizes()
    looks = [BlockInfo(0.0)] * 4
    # Attention has 3072 of 7744 weights a block, so of four round(4 · 0.5^((4608 / 3072) / 1.5)) = 2 go.
    worth = {0: 1.0, 1: 0.2, 2: 0.1, 3: 0.5}
    shape = result(
        two_ssp.search(found, 0.5, looks, two_ssp.Config()), lambda s: sum(worth[i] for i in range(4) if not s.heads[i])
    )
    assert shape is not None and shape.heads == (2, 0, 0, 2) and len(set(shape.neurons)) == 1
    assert found.removed_frac(shape) >= 0.5 and not shape.even


def test_2ssp_keeps_the_neurons_with_the_largest_norm() -> None:
    found = chosen(two_ssp, NEURONS, 20, X, WEIGHT)
    assert found.detail["kept_groups"] == sorted(X.square().sum(0).argsort(descending=True)[:20].tolist())
