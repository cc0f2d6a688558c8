"""Divergence of logits in the error of the last blocks: values and gradients against a whole model in float64."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import niwaki
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData, HeldOut, Stream
from niwaki.errors import InputError
from niwaki.methods import wandapp
from niwaki.methods.cost import Scope
from niwaki.methods.shared.block_training import Reconstruction
from niwaki.methods.shared.divergence import logit_divergences
from niwaki.methods.shared.learning_options import learning_cost, learning_needs
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.families import build, families
from support.models import CPU, tiny_llama, write_texts

WINDOWS = [3, 5]


def _ids(windows: int = 9, vocabulary: int = 4096) -> Tensor:
    return torch.randint(0, vocabulary, (windows, 12), generator=torch.Generator().manual_seed(1))


def _at(folder: Path, index: int, ahead: int = 0, logit_bytes: int | None = None) -> tuple[Block, CalibrationData]:
    """Return block `index` of a model with `ahead` following blocks, on inputs that differ from the dense ones."""
    decoder = Decoder(Checkpoint.open(folder), CPU, torch.float64, logit_bytes=logit_bytes)
    vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
    streams = [Stream(decoder, _ids(vocabulary=vocabulary), learn_batches=frozenset({1, 2})) for _ in range(2)]
    stream, dense = streams
    for place in range(index):
        block = decoder.load(place)
        for one in streams:
            one.advance(block)
    store = stream.hidden.store_STD
    store += 0.1 * torch.randn(store.shape, generator=torch.Generator().manual_seed(2), dtype=store.dtype)
    block = decoder.load(index)
    block.following = [decoder.load(index + 1 + place) for place in range(ahead)]
    stream.observe(block, None, outputs=stream.outputs)
    dense.advance(block)
    return block, CalibrationData({}, stream, dense)


def _reference(
    folder: Path, index: int, half: dict[str, Tensor], calib: CalibrationData, ids_BT: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Σ KL(dense ‖ student) of whole models in float64, one position after another, and its gradients."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2)]
    student = models[1]
    for name, weight_OI in half.items():
        student.get_parameter(f"model.layers.{index}.{name}.weight").data = weight_OI
    assert calib.stream is not None
    inputs = calib.stream.hidden.take(WINDOWS)
    student.model.layers[index].register_forward_pre_hook(lambda _, args: (inputs, *args[1:]))
    p, q = (model(ids_BT, use_cache=False).logits.softmax(-1) for model in models)
    total = torch.zeros((), dtype=torch.float64)
    for window in range(len(ids_BT)):
        for token in range(ids_BT.shape[1]):
            total = total + (p[window, token] * (p[window, token] / q[window, token]).log()).sum()
    names = [student.get_parameter(f"model.layers.{index}.{name}.weight") for name in half]
    gradients = torch.autograd.grad(total, names)
    return total.detach(), dict(zip(half, gradients, strict=True))


@pytest.mark.parametrize(
    "index, ahead, logit_bytes", [(2, 0, None), (2, 0, 5 * 4096 * 4), (1, 1, 5 * 4096 * 4), (0, 2, None)]
)
def test_the_error_ends_in_the_logits_of_the_dense_model(
    tmp_path: Path, index: int, ahead: int, logit_bytes: int | None
) -> None:
    model = tiny_llama(tmp_path / "model", blocks=3)
    block, calib = _at(model, index, ahead, logit_bytes)
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    tasks = [
        Reconstruction(block, calib, "block", torch.Generator().manual_seed(0), ahead=ahead, kl=kl) for kl in (0, 3)
    ]
    plain, ended = (task.gradients(half, WINDOWS) for task in tasks)
    wanted, gradients = _reference(model, index, half, calib, _ids()[WINDOWS])
    found = logit_divergences(
        calib.stream.decoder, calib.dense.decoder, _ids()[WINDOWS], *_final_states(block, calib, half)
    )
    torch.testing.assert_close(found.sum(), wanted, rtol=1e-9, atol=0)
    for name in half:
        assert gradients[name].abs().max() > 1e-2  # norms of the model are float32
        torch.testing.assert_close(ended[name] - plain[name], 3 * gradients[name], rtol=1e-4, atol=1e-6)
    assert tasks[1].error(half) > tasks[0].error(half)


def _final_states(block: Block, calib: CalibrationData, half: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    kept = {name: block.weight(name).clone() for name in half}
    y_BTD, dense_BTD = calib.stream.hidden.take(WINDOWS), calib.dense.hidden.take(WINDOWS)
    for name, weight_OI in half.items():
        block.weight(name).copy_(weight_OI)
    y_BTD = block.run(calib.stream.call(WINDOWS, block.index), y_BTD)
    for name, weight_OI in kept.items():
        block.weight(name).copy_(weight_OI)
    for other in block.following:
        y_BTD, dense_BTD = (
            other.run(s.call(WINDOWS, other.index), x) for s, x in ((calib.stream, y_BTD), (calib.dense, dense_BTD))
        )
    return y_BTD, dense_BTD


def test_blocks_whose_error_does_not_reach_the_end_have_none(tmp_path: Path) -> None:
    block, calib = _at(tiny_llama(tmp_path / "model", blocks=3), 0, ahead=1)
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    errors = [
        Reconstruction(block, calib, "block", torch.Generator().manual_seed(0), ahead=1, kl=kl).error(half)
        for kl in (0, 5)
    ]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3"])
def test_heads_of_other_families_are_differentiable(tmp_path: Path, family: str) -> None:
    """Compare a gradient with finite differences, through norms, tied heads and soft caps of each family."""
    build(families()[family].config).save_pretrained(tmp_path / family)
    last = len(Decoder(Checkpoint.open(tmp_path / family), CPU)) - 1
    block, calib = _at(tmp_path / family, last)
    y_BTD, dense_BTD = _final_states(block, calib, {name: block.weight(name) * 0.5 for name in block.linears})
    direction = torch.randn(y_BTD.shape, generator=torch.Generator().manual_seed(3), dtype=y_BTD.dtype)

    def value(shift: float) -> Tensor:
        given = (y_BTD + shift * direction).requires_grad_(True)
        decoders = calib.stream.decoder, calib.dense.decoder
        weights_BT = torch.arange(24.0, dtype=torch.float64).view(2, 12)
        total = (logit_divergences(*decoders, calib.stream.ids_ST[WINDOWS], given, dense_BTD) * weights_BT).sum()
        return total, torch.autograd.grad(total, given)[0]

    slope = (value(2e-3)[0] - value(-2e-3)[0]) / 4e-3
    torch.testing.assert_close((value(0.0)[1] * direction).sum(), slope.detach(), rtol=2e-3, atol=0)


def test_held_out_windows_judge_and_all_calibration_windows_are_learned(tmp_path: Path) -> None:
    block, calib = _at(tiny_llama(tmp_path / "model", blocks=3), 2)
    other = Stream(calib.stream.decoder, _ids(3) + 1, learn_batches=frozenset({1}))
    other.observe(block, None, outputs=other.outputs)
    calib = CalibrationData(calib.statistics, calib.stream, calib.dense, held=HeldOut(other, calib.dense))
    task = Reconstruction(block, calib, "block", torch.Generator().manual_seed(0))
    assert sorted(task.train) == list(range(9)) and task.held == [0, 1, 2]
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    for name, weight_OI in half.items():
        block.weight(name).copy_(weight_OI)
    y_STD, t_STD = block.run(other.call([0, 1, 2], 2), other.hidden.take([0, 1, 2])), other.outputs.take([0, 1, 2])
    wanted = ((y_STD - t_STD).square().sum(-1) / t_STD.square().sum(-1)).mean()
    assert task.error(half) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    "method, target, rounds", [("wandapp", "0.5", "rounds"), ("gptq", "2bit", "learn_rounds"),
                               ("squeeze10", "3bit", "learn_rounds"), ("trellis", "8bit", "learn_rounds"),
                               ("comp", "0.2", "learn_rounds")]
)  # fmt: skip
def test_the_last_block_of_every_learning_method_has_the_divergence(
    tmp_path: Path, method: str, target: str, rounds: str
) -> None:
    model = tiny_llama(tmp_path / "model", blocks=1)
    text = {"files": (str(write_texts(tmp_path / "text.jsonl")),), "samples": 9, "seq_len": 16}
    options = {rounds: 1, "samples": 4} | ({"group": 16} if method == "gptq" else {})
    options |= {"try_blocks": 0, "try_heads": 0} if method == "comp" else {}
    starts = []
    for kl in (0.0, 2.0):
        given = {"target": target, "calibration": text, "options": options | {"kl": kl}, "device": "cpu"}
        niwaki.compress(model, tmp_path / str(kl), method=method, **given)
        line = json.loads((tmp_path / str(kl) / "niwaki/blocks.jsonl").read_text().splitlines()[-1])
        starts.append(line["heldout_error_start"])
    assert starts[1] > starts[0] + 1e-4


def test_the_divergence_needs_the_dense_stream_and_counts_where_it_reaches_the_end() -> None:
    assert learning_needs(2, "block", kl=1.0).dense and not learning_needs(2, "block").dense
    scope = Scope((((64, 32),),), 16, 128)
    own, more = (learning_cost(scope, 4, 8, 2, kl=kl) for kl in (0.0, 1.0))
    assert own.logit_tokens == 0 and more.logit_tokens == (4 * 8 + 5 * 2) * 128
    assert wandapp.needs(wandapp.Config(kl=0.5)) == Needs(sqnorm=True, learn_batches=frozenset({1, 2}), dense=True)
    with pytest.raises(ValueError, match="expected kl ≥ 0, got -1"):
        wandapp.Config(kl=-1)


def test_a_plan_counts_the_head(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=3)
    given = {"method": "wandapp", "target": "0.5", "calibration": {"samples": 16, "seq_len": 64}, "gpu": "cpu"}
    plans = [
        niwaki.plan(model, options=options, **given)
        for options in ({"target": "both"}, {"target": "both", "kl": 1}, {"target": "both", "kl": 1, "ahead": 1})
    ]
    seconds = [plan["seconds_by_phase"]["walk"] for plan in plans]
    assert seconds[0] < seconds[1] < seconds[2]
    assert plans[0]["peak_rss_bytes"] < plans[1]["peak_rss_bytes"]


def test_named_blocks_that_do_not_reach_the_logits_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=4)
    given = {"method": "wandapp", "target": "0.5", "gpu": "cpu", "calibration": {"samples": 8, "seq_len": 16}}
    for blocks, ahead in (("2", 1), ("0,3", 0)):
        niwaki.plan(model, blocks=blocks, options={"kl": 1, "ahead": ahead}, **given)
    with pytest.raises(InputError, match=r"wandapp\.kl counts logits .* 3, and that of blocks 0-1 ends at 2"):
        niwaki.plan(model, blocks="0-1", options={"kl": 1, "ahead": 1}, **given)
