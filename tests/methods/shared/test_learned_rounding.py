"""Learned rounding on uniform grids: gradients against float64, masks, and errors on a trained block."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.cli.demo import sapling
from niwaki.compression.walk import collect
from niwaki.config.targets import Bits
from niwaki.data.stream import CalibrationData, Stream
from niwaki.data.texts import load_tokenizer
from niwaki.methods import gptq, rtn
from niwaki.methods.shared.block_training import Reconstruction
from niwaki.methods.shared.learned_rounding import KEPT_START, Latent
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.blocks import first_block
from support.models import CPU

GRIDS = ["affine", "symmetric"]
PUBLISHED: dict[str, Any] = {"clip": False, "act_order": False, "rounds": 0, "damping_frac": 0.01}


def latent(grid: str, bits: int = 2) -> tuple[Latent, Tensor]:
    """Return the latent form of a matrix of which some weights lie outside the levels, and its weights."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 1.5
    start = Latent.start(nearest(weight, groups_of(0, 32, bits, grid, 16), True).storable(), weight, torch.arange(32))
    start.weight_OI = weight * 1.5
    return start, weight


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_gradients_are_those_of_the_form_without_rounding(grid: str, bits: int) -> None:
    """Compare with float64: V straight through, scales for the codes as they are, zero codes where levels end."""
    start, _ = latent(grid, bits)
    gradient = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    levels = start.levels()
    start.set_gradients(gradient, levels)
    code = start.current().code_OI.double()
    scale = levels.scale_OG.double().requires_grad_(True)
    zero = (-levels.offset_OG / levels.scale_OG).double().requires_grad_(True)
    wide_scale, wide_zero = (t.repeat_interleave(16, 1) for t in (scale, zero))
    by_code = (gradient.double() * (code - wide_zero.detach()) * wide_scale).sum()
    torch.testing.assert_close(
        start.scale_OG.grad.double(), torch.autograd.grad(by_code, scale)[0], rtol=1e-4, atol=1e-4
    )
    assert torch.equal(start.weight_OI.grad, gradient)
    if grid == "affine":
        held = wide_scale.detach()
        exact = start.weight_OI.double() / held + wide_zero
        top = 2**bits - 1
        inside = (exact >= -0.5) & (exact <= top + 0.5)
        value = (torch.where(inside, exact, exact.clamp(0, top)) - wide_zero) * held
        expected = torch.autograd.grad((gradient.double() * value).sum(), zero)[0]
        assert expected.abs().max() > 0, "no weight lies outside the levels"
        torch.testing.assert_close(start.zero_OG.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_zero_codes_stay_whole_and_within_the_levels() -> None:
    start, _ = latent("affine")
    start.zero_OG = torch.linspace(-3, 7, 12).view(6, 2)
    (part,) = start.current().parts(torch.arange(32))
    assert part.zero_OG.unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(part.decode(), start.current().values_OI)


@pytest.mark.parametrize("grid", GRIDS)
def test_latent_weights_begin_at_the_codes_and_scales_that_were_found(grid: str) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    rounded = nearest(weight, groups_of(0, 32, 3, grid, 8), clip=True).storable()
    rounded.code_OI[:, ::5] = 7 - rounded.code_OI[:, ::5]  # codes that rounding would not choose
    found = Latent.start(rounded, weight, torch.arange(32)).current()
    assert torch.equal(found.code_OI, rounded.code_OI)
    torch.testing.assert_close(found.values_OI, rounded.values_OI)


def test_a_pruned_weight_stays_zero_at_any_scale() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(6, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    rounded = nearest(weight * keep, groups_of(0, 32, 2, "symmetric", 8), clip=True).storable()
    start = Latent.start(rounded, weight * keep, torch.arange(32), keep)
    start.set_gradients(torch.ones(6, 32), start.levels())
    assert (start.weight_OI.grad[~keep] == 0).all() and (start.weight_OI.grad[keep] == 1).all()
    start.scale_OG = start.scale_OG * 3.7
    assert (start.current().values_OI[~keep] == 0).all()


@cache
def trained() -> tuple[Block, CalibrationData, Reconstruction]:
    """Return the third block of the sapling, its calibration data, and the task on windows of other texts."""
    tokenizer = load_tokenizer(sapling())
    ids = torch.tensor([token for name in sorted(topics)[:12] for token in tokenizer(topics[name])["input_ids"]])
    windows = ids[: 22 * 64].view(22, 64)
    found = []
    for part in (windows[:16], windows[16:]):
        decoder = Decoder(Checkpoint.open(sapling()), CPU, dtype=torch.float32)
        stream = Stream(decoder, part, learn_batches=frozenset({1, 2}))
        with torch.no_grad():
            for index in range(2):
                stream.advance(decoder.load(index))
        block = decoder.load(2)
        needs = gptq.needs(gptq.Config(learn_rounds=1, target="block"))
        found.append((block, CalibrationData(collect(block, stream, needs)[0], stream)))
    others = Reconstruction(*found[1], "block", torch.Generator())
    others.held = list(range(6))
    return *found[0], others


def other_error(module: Any, bits: int, **options: Any) -> float:
    """Return the block error on other texts after a method."""
    block, calib, others = trained()
    config = module.Config(group=64, **options)
    targets = dict.fromkeys(block.linears, Bits(bits))
    records = module.compress(block, calib, targets, config, torch.Generator().manual_seed(0))
    return others.error({name: record.decode(torch.float32) for name, record in records.items()})


@pytest.mark.parametrize("symmetric", [False, True])
def test_methods_keep_their_order_on_a_trained_block(symmetric: bool) -> None:
    errors = [
        other_error(rtn, 2, symmetric=symmetric, clip=False),
        other_error(rtn, 2, symmetric=symmetric),
        other_error(gptq, 2, symmetric=symmetric),
        other_error(gptq, 2, symmetric=symmetric, learn_rounds=4, samples=20, target="block"),
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[2] < 0.8 * other_error(gptq, 2, symmetric=symmetric, **PUBLISHED)


@pytest.mark.parametrize(("bits", "rate_frac", "improves"), [(2.0, 0.005, True), (4.0, 50.0, False)])
def test_learning_never_ends_above_its_start(bits: float, rate_frac: float, improves: bool, tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=16)
    start_options = {"group": 0, **PUBLISHED}  # much can be gained
    config = gptq.Config(**start_options, learn_rounds=10, samples=14, rate_frac=rate_frac, target="block")
    calib = CalibrationData(collect(block, stream, gptq.needs(config))[0], stream)
    targets = dict.fromkeys(block.linears, Bits(bits))
    start = gptq.compress(block, calib, targets, gptq.Config(**start_options), torch.Generator())
    for name, record in gptq.compress(block, calib, targets, config, torch.Generator()).items():
        first, last = record.detail["heldout_error_start"], record.detail["heldout_error"]
        assert (last < first) if improves else (last == first)
        assert record.note == ("" if improves else KEPT_START)
        assert torch.equal(record.weight_OI, start[name].weight_OI) != improves
