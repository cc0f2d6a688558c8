"""The walk: statistics on the compressed prefix, streams in any place, experts, drift, and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki.compression.run_record import MatrixRecord
from niwaki.compression.walk import WalkPlan, collect, compress_blocks, forward, loaded_blocks
from niwaki.config.events import silent
from niwaki.config.targets import Sparsity
from niwaki.data.statistics import Needs
from niwaki.data.stream import CalibrationData, HeldOut, Stream
from niwaki.errors import ArchitectureError, NumericalError
from niwaki.methods.registry import Step, get_method
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.families import build, families
from support.models import CPU, tiny_llama

IDS = torch.randint(1, 90, (5, 12), generator=torch.Generator().manual_seed(0))


def open_decoder(folder: Path) -> Decoder:
    return Decoder(Checkpoint.open(folder), CPU)


def walk(decoder: Decoder, method: str, *, dense: bool = False, **stream: Any) -> tuple[Stream, list[MatrixRecord]]:
    """Compress to 50 % in memory; return the final stream and all report lines."""
    lines: list[MatrixRecord] = []
    module = get_method(method)
    targets = [dict.fromkeys(block.linears, Sparsity(0.5)) for block in decoder.anatomy.blocks]
    main = Stream(decoder, IDS, **stream)
    compress_blocks(
        decoder,
        WalkPlan([Step(method, module, module.config())], targets, 0),
        main,
        Stream(decoder, IDS, **stream) if dense else None,
        save=lambda block, found: lines.extend(found),
        report=silent,
    )
    return main, lines


def test_statistics_see_the_compressed_prefix(tmp_path: Path) -> None:
    """Compare the norms of block 1 with those of its input from the compressed block 0."""
    folder = tiny_llama(tmp_path, blocks=2)
    seen: list[torch.Tensor] = []
    module = get_method("wanda")

    def spying(block: Block, calib: CalibrationData, *rest: Any) -> Any:
        seen.append(calib.statistics["mlp.down_proj"].sqnorm_I.clone())
        return module.compress(block, calib, *rest)

    decoder = open_decoder(folder)
    targets = [dict.fromkeys(block.linears, Sparsity(0.5)) for block in decoder.anatomy.blocks]
    kept: dict[str, torch.Tensor] = {}
    compress_blocks(
        decoder,
        WalkPlan([Step("spy", replace(module, compress=spying), module.config())], targets, 0),
        Stream(decoder, IDS),
        None,
        save=lambda block, lines: kept.update(decoder.disk_tensors(block)),
        report=silent,
    )
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor for name, tensor in kept.items() if ".layers.0." in name}
    model.load_state_dict(state, strict=False)  # block 0 compressed, block 1 dense
    found: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(IDS)
    wanted = found[0].reshape(-1, 48).double().square().sum(0)
    torch.testing.assert_close(seen[1].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_stream_ends_where_the_compressed_model_does(tmp_path: Path, method: str) -> None:
    folder = tiny_llama(tmp_path)
    decoder = open_decoder(folder)
    tensors = decoder.checkpoint.read(decoder.disk_names(None))
    main = Stream(decoder, IDS)
    module = get_method(method)
    targets = [dict.fromkeys(block.linears, Sparsity(0.5)) for block in decoder.anatomy.blocks]
    compress_blocks(
        decoder,
        WalkPlan([Step(method, module, module.config())], targets, 0),
        main,
        None,
        save=lambda block, lines: tensors.update(decoder.disk_tensors(block)),
        report=silent,
    )
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(tensors)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
    torch.testing.assert_close(decoder.logits(IDS, main.hidden.read(slice(0, 5))), wanted, rtol=1e-5, atol=1e-5)


def test_place_and_batch_do_not_change_the_result(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    whole, _ = walk(open_decoder(folder), "sparsegpt")
    mapped, _ = walk(open_decoder(folder), "sparsegpt", activation_bytes=1, folder=tmp_path)
    assert mapped.hidden.place == "disk"
    assert torch.equal(whole.hidden.store_STD, mapped.hidden.store_STD)
    # Batches of 2, 2 and 1 windows: the last one has its own call arguments.
    small, _ = walk(open_decoder(folder), "sparsegpt", batch_tokens=24)
    assert small.batch == 2
    torch.testing.assert_close(whole.hidden.store_STD, small.hidden.store_STD, rtol=1e-4, atol=1e-4)


def test_dense_stream_reports_drift_that_starts_with_the_first_block(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    main, lines = walk(open_decoder(folder), "wanda", dense=True)
    decoder = open_decoder(folder)
    dense = Stream(decoder, IDS)
    forward(decoder, [dense])
    wanted_STD = dense.hidden.store_STD.double()
    drift = (main.hidden.store_STD.double() - wanted_STD).square().sum() / wanted_STD.square().sum()
    assert lines[-1].drift == pytest.approx(float(drift), rel=1e-4)
    assert lines[0].drift > 0


def test_errors_are_relative_output_errors(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    _, updated = walk(open_decoder(folder), "sparsegpt")
    _, masked = walk(open_decoder(folder), "magnitude")
    for line in masked:
        assert line.error == line.error_before_update > 0
    assert sum(line.error for line in updated) < sum(line.error_before_update for line in updated)
    assert all(line.block_error > 0 for line in updated)


def test_experts_see_only_the_tokens_routed_to_them(tmp_path: Path) -> None:
    build(families()["mixtral"].config).save_pretrained(tmp_path)
    decoder = open_decoder(tmp_path)
    stream = Stream(decoder, IDS)
    block = next(loaded_blocks(decoder))
    statistics, _ = collect(block, stream, Needs(sqnorm=True))
    tokens = [statistics[f"mlp.experts.{expert}.down_proj"].tokens for expert in range(4)]
    assert sum(tokens) == IDS.numel() * 2
    assert len(set(tokens)) > 1
    assert statistics["self_attn.q_proj"].tokens == IDS.numel()


def test_full_inputs_are_those_of_the_dense_model_and_move_it_on(tmp_path: Path) -> None:
    """Change the first block in the compressed model only, and read the inputs of the second."""
    folder = tiny_llama(tmp_path)
    decoder = open_decoder(folder)
    stream, dense = Stream(decoder, IDS, batch_tokens=16), Stream(decoder, IDS, batch_tokens=16)
    first = decoder.load(0)
    dense.advance(first)
    first.assign("mlp.down_proj", first.weight("mlp.down_proj") * 0.5)
    stream.advance(first)
    block = decoder.load(1)
    inputs: dict[str, list[torch.Tensor]] = {"stream": [], "dense": []}
    for name, where in (("stream", stream), ("dense", dense)):
        where.observe(block, lambda matrix, x, name=name: inputs[name].append(x) if matrix == "mlp.gate_proj" else None)
    wanted = Stream(decoder, IDS)
    wanted.hidden.store_STD.copy_(dense.hidden.store_STD)
    wanted.advance(block)
    statistics, _ = collect(block, stream, Needs(gram=True, full=True), dense)
    x, full = (torch.cat(inputs[name]).flatten(0, 1).double() for name in ("stream", "dense"))
    own, cross = statistics["mlp.up_proj"].full_II
    torch.testing.assert_close(own.double(), full.T @ full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross.double(), full.T @ x, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, cross)
    torch.testing.assert_close(dense.hidden.store_STD, wanted.hidden.store_STD)


@pytest.mark.parametrize("toward_dense", [0.0, 1.0])
def test_held_out_windows_pass_both_models_as_the_others_do(tmp_path: Path, toward_dense: float) -> None:
    """Hold out the calibration windows themselves: their streams end where the others do."""
    decoder = open_decoder(tiny_llama(tmp_path / "model"))
    method = get_method("sparsegpt")
    steps = [
        Step("sparsegpt", method, method.config(toward_dense=toward_dense)),
        Step("wandapp", get_method("wandapp"), get_method("wandapp").config(rounds=1, samples=2, target="both")),
    ]
    ids = torch.randint(0, 4096, (4, 16))
    stream, dense, judge, judge_dense = (Stream(decoder, ids, learn_batches=frozenset({1})) for _ in range(4))
    targets = [dict.fromkeys(block.linears, Sparsity(0.5)) for block in decoder.anatomy.blocks]
    compress_blocks(
        decoder, WalkPlan(steps, targets, 0), stream, dense, save=lambda block, lines: None,
        report=silent, held=HeldOut(judge, judge_dense),
    )  # fmt: skip
    for found, wanted in ((judge, stream), (judge_dense, dense)):
        assert torch.equal(found.hidden.store_STD, wanted.hidden.store_STD)
    assert not torch.equal(judge.hidden.store_STD, judge_dense.hidden.store_STD)


def test_full_inputs_of_routed_experts_are_refused(tmp_path: Path) -> None:
    build(families()["mixtral"].config).save_pretrained(tmp_path)
    decoder = open_decoder(tmp_path)
    stream, dense = Stream(decoder, IDS), Stream(decoder, IDS)
    stream.hidden.store_STD.copy_(torch.randn_like(stream.hidden.store_STD))
    with pytest.raises(ArchitectureError, match="other tokens reach it in the dense model"):
        collect(next(loaded_blocks(decoder)), stream, Needs(gram=True, full=True), dense)


def test_non_finite_activations_name_the_block(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    decoder = open_decoder(folder)
    stream = Stream(decoder, IDS)
    stream.hidden.store_STD.fill_(float("inf"))
    with pytest.raises(NumericalError, match="block 0 puts out NaN or infinite"):
        collect(next(loaded_blocks(decoder)), stream, Needs(sqnorm=True))
