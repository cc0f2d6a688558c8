"""Arguments of blocks that differ between windows, and what blocks hand to later ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from niwaki.compression.backward import backprop_blocks
from niwaki.compression.walk import WalkPlan, collect, compress_blocks, forward, loaded_blocks
from niwaki.config.events import silent
from niwaki.config.targets import Sparsity
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData, Stream
from niwaki.errors import ArchitectureError
from niwaki.methods import wandapp
from niwaki.methods.registry import Step, get_method
from niwaki.methods.shared.block_training import Reconstruction
from niwaki.model.anatomy import SMALL
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.logits import FinalStates, logits_of_part
from support.families import COMMON, build, sharing_families
from support.models import CPU
from support.odd_models import REFUSED, WALKED, OddConfig

IDS = torch.randint(1, 96, (5, 12), generator=torch.Generator().manual_seed(0))
# Blocks that return lists, and stacks of experts in attention.
OTHERS = {
    "openai-gpt": transformers.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "jetmoe": transformers.JetMoeConfig(
        **COMMON, num_key_value_heads=4, kv_channels=8, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    ),
}
KINDS = ["gemma4", "gemma3n", *WALKED]
COEFFICIENTS = ("modality_router", "prediction_coefs", "correction_coefs")
BATCHES = (12, 24, 60)  # tokens: windows alone, in batches of 2, 2 and 1, and all together


def saved(kind: str, folder: Path) -> Any:
    """Save a tiny model and return it."""
    configs = sharing_families() | OTHERS
    model = build(configs[kind] if kind in configs else OddConfig(kind=kind))
    model.save_pretrained(folder)
    return model


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(Checkpoint.open(folder), CPU, dtype)


def final(decoder: Decoder, **options: Any) -> tuple[Stream, Tensor]:
    """Return the windows after the last block, and their logits."""
    stream = Stream(decoder, IDS, **options)
    forward(decoder, [stream])
    return stream, decoder.logits(IDS, stream.hidden.read(slice(0, 5)))


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_one_batch_and_many_give_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = saved(kind, tmp_path)(input_ids=IDS, use_cache=False).logits
    decoder = opened(tmp_path)
    for batch_tokens in BATCHES:
        found = final(decoder, batch_tokens=batch_tokens)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma4", *WALKED])
def test_arguments_of_all_windows_lie_where_the_hidden_states_do(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "model")
    decoder = opened(tmp_path / "model")
    in_memory = final(decoder, batch_tokens=24)[1]
    on_disk = final(decoder, batch_tokens=24, activation_bytes=1, folder=tmp_path)[1]
    assert torch.equal(on_disk, in_memory)
    assert bool(list(tmp_path.glob("*-arguments-*.bin"))) == (kind != "stacked")


@pytest.mark.parametrize("kind", ["gemma4", *WALKED])
def test_drawn_windows_get_their_own_arguments(kind: str, tmp_path: Path) -> None:
    """Draw windows in any order, as learning methods do: their outputs are those of the whole batches."""
    saved(kind, tmp_path)
    decoder = opened(tmp_path)
    stream = Stream(decoder, IDS, batch_tokens=24, learn_batches=frozenset({2}))
    for block in loaded_blocks(decoder):
        statistics, _ = collect(block, stream, wandapp.needs(wandapp.Config()))
        assert stream.outputs is not None
        for windows in ([3, 0], [4], [1, 2, 4]):
            y = block.run(stream.call(windows, block.index), stream.hidden.take(windows))
            torch.testing.assert_close(y, stream.outputs.take(windows), rtol=1e-4, atol=1e-5)
        task = Reconstruction(block, CalibrationData(statistics, stream), "block", torch.Generator().manual_seed(0))
        assert task.error({name: block.weight(name) for name in block.linears}) < 1e-9
        stream.advance(block)
        block.release()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_what_blocks_hand_on(kind: str, tmp_path: Path) -> None:
    """Compare the walk backwards with autograd through the whole model, in batches of any size."""
    saved(kind, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).requires_grad_(True)
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
    loss_S = -logits.gather(2, IDS[:, 1:, None])[..., 0].mean(1)
    named = dict(model.named_parameters())
    wanted = dict(zip(named, torch.autograd.grad(loss_S.sum(), list(named.values()), allow_unused=True), strict=True))
    decoder = opened(tmp_path, torch.float64)
    for batch_tokens in BATCHES[1:]:
        found: dict[str, Tensor] = {}

        def visit(block: Any, gradients: Any, found: dict[str, Tensor] = found) -> None:
            for name, grad_OI in gradients.weights.items():
                parameter = decoder.anatomy.prefix(block.index) + block.linears[name].parameter
                found[parameter] = found.get(parameter, 0) + grad_OI

        losses_S = backprop_blocks(decoder, Stream(decoder, IDS, batch_tokens=batch_tokens), visit, weights=True)
        torch.testing.assert_close(losses_S, loss_S.detach(), rtol=1e-9, atol=0)
        for parameter, grad in found.items():
            torch.testing.assert_close(grad, wanted[parameter], rtol=1e-4, atol=1e-6)  # norms count in float32


@pytest.mark.parametrize(
    ("kind", "method"),
    [("gemma4", "wandapp"), ("gemma3n", "sparsegpt"), ("token", "wandapp"), ("flat", "wandapp"), ("handed", "wandapp")],
)
def test_batches_do_not_change_what_is_compressed(kind: str, method: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    results = []
    decoder, module = opened(tmp_path), get_method(method)
    for batch_tokens in (12, 60):
        config = module.config(rounds=1, samples=4, batch=2) if method == "wandapp" else module.config()
        step = Step(method, module, config)
        stream = Stream(decoder, IDS, batch_tokens=batch_tokens, learn_batches=step.method.needs(config).learn_batches)
        weights: dict[str, Tensor] = {}
        compress_blocks(
            decoder,
            WalkPlan([step], _halves(decoder), 0),
            stream,
            None,
            save=lambda block, lines, weights=weights: weights.update(decoder.disk_tensors(block)),
            report=silent,
        )
        results.append(weights)
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(results[1][name] == 0, weight == 0)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_walk_can_give_is_refused_by_the_block(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    if kind == "batch":  # its values are only known with the weights, before the first block all the same
        decoder = opened(tmp_path)
        with pytest.raises(ArchitectureError, match=r"block 0 receives argument given .* depends on the batch"):
            Stream(decoder, IDS, batch_tokens=24)
        return
    with pytest.raises(
        ArchitectureError, match=r"block 1 \(OddBlock\).*" + ("changes" if kind == "changed" else "given")
    ):
        opened(tmp_path)


def test_a_dense_stream_has_states_of_its_own(tmp_path: Path) -> None:
    """Keep what a compressed block hands on away from the dense model."""
    saved("gemma4", tmp_path)
    decoder = opened(tmp_path)
    wanted = final(decoder)[0].hidden.store_STD
    module = get_method("magnitude")
    dense = Stream(decoder, IDS)
    compress_blocks(
        decoder,
        WalkPlan([Step("magnitude", module, module.config())], _halves(decoder), 0),
        Stream(decoder, IDS),
        dense,
        save=lambda block, lines: None,
        report=silent,
    )
    assert torch.equal(dense.hidden.store_STD, wanted)


def _halves(decoder: Decoder) -> list[dict[str, Any]]:
    return [dict.fromkeys(block.linears, Sparsity(0.5)) for block in decoder.anatomy.blocks]


def test_needs_nothing_where_nothing_differs(tmp_path: Path) -> None:
    """Pass on what all windows share as the model made it."""
    saved("stacked", tmp_path)
    decoder = opened(tmp_path)
    stream = Stream(decoder, IDS, batch_tokens=24)
    assert stream.call([0, 1], 0) is stream.call([3, 2], 0)
    assert collect(decoder.load(0), stream, Needs(sqnorm=True))[1].shape == (2, 12, 2, 16)


def test_a_whole_model_with_stacked_states_gives_logits_of_any_positions(tmp_path: Path) -> None:
    """Make logits of chosen positions from hidden states that a whole model stacks before its windows."""
    model = saved("stacked", tmp_path)
    states = FinalStates(model)
    with torch.no_grad():
        x = states.run(IDS)
        wanted = model(input_ids=IDS).logits.flatten(0, 1)
        torch.testing.assert_close(states.logits(IDS, x).flatten(0, 1), wanted)
        torch.testing.assert_close(logits_of_part(states.logits, IDS, x, slice(7, 31)), wanted[7:31])
        decoder = opened(tmp_path)
        torch.testing.assert_close(logits_of_part(decoder.logits, IDS, x, slice(7, 31)), wanted[7:31])


def test_coefficients_of_a_few_inputs_stay_dense(tmp_path: Path) -> None:
    """Keep dense what mixes two stacked states: codes of it take more room, and no group of codes fits."""
    saved("gemma3n", tmp_path)
    kept = opened(tmp_path).anatomy.blocks[0].kept_dense
    assert kept == dict.fromkeys((f"altup.{name}.weight" for name in COEFFICIENTS), SMALL)
