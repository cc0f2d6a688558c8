"""Learning of attention apart from the rest of a block, and with blocks ahead: gradients against own forwards."""

import json
from pathlib import Path

import pytest
import torch

import niwaki
from niwaki.config.targets import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import ArchitectureError
from niwaki.methods import wandapp
from niwaki.methods.cost import Scope
from niwaki.methods.shared.block_training import Reconstruction, relative_errors
from niwaki.methods.shared.learning_options import learning_cost
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.blocks import calibration_with_gradients, first_block
from support.families import build, families
from support.models import CPU, calibration_of, correlated_inputs, make_block, tiny_llama, write_texts

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def _task(block: Block, stream: Stream, reconstruct: str) -> Reconstruction:
    calib = calibration_with_gradients(block, stream)
    return Reconstruction(block, calib, "block", torch.Generator().manual_seed(0), reconstruct)


def _family(folder: Path, name: str) -> tuple[Block, Stream]:
    build(families()[name].config).save_pretrained(folder / name)
    decoder = Decoder(Checkpoint.open(folder / name), CPU)
    stream = Stream(decoder, torch.randint(0, 96, (9, 16)), learn_batches=frozenset({1, 2}))
    return decoder.load(0), stream


@pytest.mark.parametrize("reconstruct", ["parts", "both"])
def test_attention_learns_its_own_output_and_the_rest_that_of_the_block(tmp_path: Path, reconstruct: str) -> None:
    block, stream = first_block(tmp_path)
    task = _task(block, stream, reconstruct)
    x_BTD, call = stream.hidden.take([3, 5]), stream.call([3, 5], 0)

    def attention() -> torch.Tensor:
        return block.module.self_attn(block.module.input_layernorm(x_BTD), *call.args, **call.kwargs)[0]

    wanted = attention().detach()
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    found = task.gradients(half, [3, 5])
    for name, weight in half.items():
        block.assign(name, weight)
    block.module.requires_grad_(True)
    of_attention = relative_errors(attention(), wanted).sum()
    of_block = relative_errors(call(block.module, x_BTD), task.outputs.take([3, 5])).sum()
    names = {name: block.module.get_parameter(linear.parameter) for name, linear in block.linears.items()}
    own = torch.autograd.grad(of_attention, [names[name] for name in ATTENTION])
    whole = dict(zip(names, torch.autograd.grad(of_block, list(names.values())), strict=True))
    for name, gradient in zip(ATTENTION, own, strict=True):
        wanted_OI = gradient if reconstruct == "parts" else gradient + whole[name]
        torch.testing.assert_close(found.pop(name), wanted_OI, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wanted_OI, whole[name], rtol=1e-2)
    assert found.keys() == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    for name, gradient_OI in found.items():
        torch.testing.assert_close(gradient_OI, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_neox", "falcon"])
def test_parts_of_other_layouts_learn(tmp_path: Path, family: str) -> None:
    """Check that fused, transposed, stacked and parallel matrices have a gradient, and that the error falls."""
    block, stream = _family(tmp_path, family)
    task = _task(block, stream, "parts")
    gradients = task.gradients({name: block.weight(name) * 0.5 for name in block.linears}, task.train)
    assert all(gradient_OI.any() for gradient_OI in gradients.values())
    config = wandapp.Config(rounds=2, samples=8, reconstruct="parts")
    targets = dict.fromkeys(block.linears, Sparsity(0.5))
    calib = calibration_with_gradients(block, stream)
    for record in wandapp.compress(block, calib, targets, config, torch.Generator()).values():
        assert record.detail["heldout_error"] < record.detail["heldout_error_start"]


def test_a_block_without_attention_apart_is_refused() -> None:
    block = make_block({"m": torch.randn(8, 8)})
    calib = calibration_of(block, correlated_inputs(64, 8), wandapp.needs(wandapp.Config()))
    with pytest.raises(ArchitectureError, match="use reconstruct=block"):
        Reconstruction(block, calib, "block", torch.Generator(), "parts")


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_outputs_of_following_blocks_count(tmp_path: Path, ahead: int) -> None:
    """Compare with the gradient of the mean error after this block and each dense one that follows, if it exists."""
    decoder = Decoder(Checkpoint.open(tiny_llama(tmp_path / "model", blocks=3)), CPU)
    stream = Stream(decoder, torch.randint(0, 4096, (9, 16)), learn_batches=frozenset({1, 2}))
    block = decoder.load(0)
    block.following = [decoder.load(1), decoder.load(2)]
    calib = calibration_with_gradients(block, stream)
    task = Reconstruction(block, calib, "block", torch.Generator().manual_seed(0), ahead=ahead)
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    found, error = task.gradients(half, [3, 5]), task.error(half)
    for name, weight in half.items():
        block.assign(name, weight)
    block.module.requires_grad_(True)

    def mean_error(windows: list[int]) -> torch.Tensor:
        modules = [block.module, *(one.module for one in block.following[:ahead])]
        y_BTD, t_BTD = stream.hidden.take(windows), task.outputs.take(windows)
        errors = []
        for place, module in enumerate(modules):
            call = stream.call(windows, place)
            y_BTD = call(module, y_BTD)
            t_BTD = call(module, t_BTD).detach() if place else t_BTD
            errors.append(((y_BTD - t_BTD).square().sum(-1) / t_BTD.square().sum(-1)).sum())
        return torch.stack(errors).mean()

    parameters = [block.module.get_parameter(linear.parameter) for linear in block.linears.values()]
    wanted = torch.autograd.grad(mean_error([3, 5]), parameters)
    for gradient_OI, wanted_OI in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(gradient_OI, wanted_OI, rtol=1e-4, atol=1e-6)
    by_window = [float(mean_error([window]).detach()) / 16 for window in task.held]
    assert error == pytest.approx(sum(by_window) / len(by_window), rel=1e-5)


@pytest.mark.parametrize("method, target", [("wandapp", "0.5"), ("gptq", "2bit"), ("squeeze10", "3bit")])
def test_blocks_ahead_change_the_error_of_the_first_block(tmp_path: Path, method: str, target: str) -> None:
    model = tiny_llama(tmp_path / "model", blocks=3)
    rounds = "rounds" if method == "wandapp" else "learn_rounds"
    text = {"files": (str(write_texts(tmp_path / "text.jsonl")),), "samples": 9, "seq_len": 16}
    given = {"method": method, "target": target, "calibration": text, "device": "cpu", "pack": "none"}
    errors = []
    for ahead in (0, 2):
        options = {rounds: 2, "samples": 8, "ahead": ahead} | ({"group": 16} if method == "gptq" else {})
        niwaki.compress(model, tmp_path / str(ahead), options=options, **given)
        lines = (tmp_path / str(ahead) / "niwaki/blocks.jsonl").read_text().splitlines()
        errors.append(json.loads(lines[0])["heldout_error_start"])
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)


def test_blocks_ahead_cost_as_much_as_the_block() -> None:
    scope = Scope((((64, 32), (64, 32)), ((32, 64),)), 16, 128)
    own, three = (learning_cost(scope, 4, 8, 2, ahead=ahead) for ahead in (0, 2))
    assert three.learned_tokens == 3 * own.learned_tokens
    assert three.held_values > 3 * own.held_values  # the graph of every block, and the weights of the following


def test_blocks_ahead_need_the_output_of_the_block() -> None:
    with pytest.raises(ValueError, match="expected ahead ≥ 0, and reconstruct=block with it, got 1 and parts"):
        wandapp.Config(ahead=1, reconstruct="parts")


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="reconstruct must be one of block, parts, both"):
        wandapp.Config(reconstruct="halves")


def test_products_are_rounded_while_gradients_are_made_and_never_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, stream = first_block(tmp_path)
    task = _task(block, stream, "block")
    matrices = {name: block.weight(name) for name in block.linears}
    seen = []
    errors = task._token_errors
    monkeypatch.setattr(
        task, "_token_errors", lambda *given: seen.append(torch.backends.cuda.matmul.allow_tf32) or errors(*given)
    )
    task.gradients(matrices, [3, 5])
    task.error(matrices)
    assert seen[0] and not any(seen[1:]) and len(seen) > 1
    assert not torch.backends.cuda.matmul.allow_tf32
