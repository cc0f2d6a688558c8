"""The walk backwards against autograd through the whole model, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.backward import Gradients, backprop_blocks
from niwaki.data.stream import Stream
from niwaki.errors import NumericalError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.families import build, families

CPU = torch.device("cpu")
IDS = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0))
# Grouped heads, layer norms with biases, norms of queries and keys, soft caps, tied ends, fused matrices, experts.
FAMILIES = ["llama", "llama-tied", "opt", "qwen3", "gemma2", "phi3", "gpt2", "falcon", "mixtral"]


def saved(family: str, folder: Path) -> Any:
    """A tiny model, saved in float32 and returned in float64."""
    model = build(families()[family].config)
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")  # grouped products know no float64
    return model.double()


def window_losses(model: Any, ids_BT: Tensor) -> Tensor:
    logits = model(ids_BT, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(2, ids_BT[:, 1:, None])[..., 0].mean(1)


def exact(model: Any, ids_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the windows, and the gradient of their sum for every parameter, through the whole graph."""
    model.requires_grad_(True)
    losses = window_losses(model, ids_BT)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(losses.sum(), list(named.values()))
    return losses.detach(), dict(zip(named, grads, strict=True))


def collected(model: Path, batch_tokens: int = 24, **asked: Any) -> tuple[Tensor, list[tuple[int, Gradients]]]:
    decoder = Decoder(Checkpoint.open(model), CPU, torch.float64)
    stream = Stream(decoder, IDS, batch_tokens=batch_tokens)
    found: list[tuple[int, Gradients]] = []

    def visit(block: Block, gradients: Gradients) -> None:
        found.append((block.index, gradients))

    return backprop_blocks(decoder, stream, visit, **asked), found


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    losses, wanted = exact(model, IDS)
    found_losses, visits = collected(tmp_path, weights=True)
    rtol, atol = (
        (1e-5, 1e-6) if family == "gemma2" else (1e-9, 1e-13)
    )  # it scales embeddings by a number rounded to float32
    torch.testing.assert_close(found_losses, losses, rtol=rtol, atol=0)
    assert [index for index, _ in visits] == [2, 2, 2, 1, 1, 1, 0, 0, 0]  # batches of 2, 2 and 1 windows
    decoder = Decoder(Checkpoint.open(tmp_path), CPU, torch.float64)
    for index, anatomy in enumerate(decoder.anatomy.blocks):
        for name, linear in anatomy.linears.items():
            found = sum(gradients.weights[name] for at, gradients in visits if at == index)
            whole = linear.view(wanted[decoder.anatomy.prefix(index) + linear.parameter])
            torch.testing.assert_close(found, whole, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "mlp.down_proj"), ("opt", "fc2"), ("qwen3", "self_attn.o_proj")]
)
def test_gradients_of_inputs_belong_to_each_window(family: str, name: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    _, visits = collected(tmp_path, inputs=[name])
    for index in range(3):
        met: list[Tensor] = []
        module = dict(model.named_modules())[f"{find_path(model)}.{index}.{name}"]
        hook = module.register_forward_pre_hook(lambda _, args, met=met: met.append(args[0].requires_grad_()))
        (grad,) = torch.autograd.grad(window_losses(model, IDS).sum(), met)
        hook.remove()
        found = [gradients.inputs[name] for at, gradients in visits if at == index]
        torch.testing.assert_close(torch.cat([x for x, _ in found]).view_as(met[0]), met[0].detach())
        torch.testing.assert_close(torch.cat([g for _, g in found]).view_as(grad), grad, rtol=1e-9, atol=1e-13)


def find_path(model: Any) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))


def test_mapped_files_and_batches_do_not_change_the_result(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    _, whole = collected(tmp_path / "model", 1000, weights=True)
    _, mapped = collected(tmp_path / "model", 1000, weights=True, activation_bytes=1, folder=tmp_path)
    assert len(list(tmp_path.glob("inputs-*.bin"))) == 3
    for (_, left), (_, right) in zip(whole, mapped, strict=True):
        assert all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)


def test_only_one_block_has_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block may be read meanwhile; all others are on the meta device, and none keeps a gradient."""
    build(families()["llama"].config).save_pretrained(tmp_path)
    decoder = Decoder(Checkpoint.open(tmp_path), CPU)

    def visit(block: Block, gradients: Gradients) -> None:
        for index in range(3):
            here = all(not p.is_meta for p in decoder._blocks[index].parameters())
            assert not here or index in (block.index, block.index - 1)
        assert all(p.grad is None and not p.requires_grad for p in block.module.parameters())

    backprop_blocks(decoder, Stream(decoder, IDS), visit, weights=True)


def test_infinite_gradients_are_refused(tmp_path: Path) -> None:
    model = build(families()["llama"].config)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match="gradient of the loss is not finite at the input of block 2"):
        decoder = Decoder(Checkpoint.open(tmp_path), CPU)
        backprop_blocks(decoder, Stream(decoder, IDS), lambda block, gradients: None)
