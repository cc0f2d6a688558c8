"""Learning of attention apart from the rest of a block: gradients against an independent forward."""

from pathlib import Path

import pytest
import torch

from niwaki.config.targets import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import ArchitectureError
from niwaki.methods import wandapp
from niwaki.methods.shared.block_training import Reconstruction, relative_errors
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.blocks import calibration_with_gradients, first_block
from support.families import build, families
from support.models import CPU, calibration_of, correlated_inputs, make_block

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
    """Fused, transposed, stacked and parallel matrices: every one has a gradient, and the error falls."""
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
