"""Every family: anatomy, streaming forward and writing back, on tiny random models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from niwaki.model.aux_files import aux_files
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.files import write_shard
from support.families import build, families

CPU = torch.device("cpu")
MIXTURES = {"mixtral", "qwen3_moe"}


@pytest.fixture(scope="module", params=sorted(families()))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    build(families()[request.param].config).save_pretrained(folder)
    return request.param, folder


def open_decoder(folder: Path) -> Decoder:
    return Decoder(Checkpoint.open(folder), CPU)


def test_groups_of_the_first_block(family: tuple[str, Path]) -> None:
    name, folder = family
    block = open_decoder(folder).anatomy.blocks[0]
    found = [[linear.name for linear in members] for members in block.groups.values()]
    assert found == families()[name].groups
    assert tuple(block.kept_dense) == families()[name].kept_dense


def test_every_decoder_matrix_is_found(family: tuple[str, Path]) -> None:
    """Weights in matrices plus weights kept dense are all block weights of two or more dimensions."""
    _, folder = family
    decoder = open_decoder(folder)
    _, blocks = decoder.anatomy, decoder._blocks
    for structure, module in zip(decoder.anatomy.blocks, blocks, strict=True):
        matrices = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
        kept = sum(module.get_parameter(name).numel() for name in structure.kept_dense)
        assert structure.weights + kept == matrices


def test_block_by_block_equals_the_models_own_forward(family: tuple[str, Path]) -> None:
    name, folder = family
    decoder = open_decoder(folder)
    ids_BT = torch.randint(1, 90, (3, 17), generator=torch.Generator().manual_seed(1))
    x_BTD, calls = decoder.embed(ids_BT)
    for index in range(len(decoder)):
        block = decoder.load(index)
        x_BTD = block.run(calls[index], x_BTD)
        block.release()
    logits_BTV = decoder.logits(ids_BT, x_BTD)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        wanted_BTV = model(ids_BT, use_cache=False).logits
    if name in MIXTURES:  # the model's own default sums experts with another kernel
        torch.testing.assert_close(logits_BTV, wanted_BTV, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits_BTV, wanted_BTV)


def test_changed_matrices_are_written_as_the_model_reads_them(family: tuple[str, Path], tmp_path: Path) -> None:
    """Assign distinct values everywhere, write, and load the result with plain transformers."""
    _, folder = family
    decoder = open_decoder(folder)
    tensors = decoder.checkpoint.read(decoder.disk_names(None))
    wanted = {}
    for index in range(len(decoder)):
        block = decoder.load(index)
        for number, name in enumerate(block.linears):
            block.assign(name, block.weight(name) * 0.5 + number)
        tensors |= decoder.disk_tensors(block)
        wanted |= {decoder.anatomy.prefix(index) + key: value.clone() for key, value in block.module.named_parameters()}
        block.release()
    assert set(tensors) == set(decoder.checkpoint.tensors)
    for companion in aux_files(decoder.checkpoint.folder):
        (tmp_path / companion.name).write_bytes(companion.read_bytes())
    write_shard(tmp_path / "model.safetensors", tensors)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key


def test_unchanged_blocks_are_written_bit_for_bit(family: tuple[str, Path]) -> None:
    _, folder = family
    decoder = open_decoder(folder)
    block = decoder.load(0)
    for name in block.linears:
        block.assign(name, block.weight(name).clone())
    written = decoder.disk_tensors(block)
    assert set(written) == set(block.stored)
    assert all(torch.equal(written[key], block.stored[key]) for key in written)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    build(families()["llama-tied"].config).save_pretrained(tmp_path)
    decoder = open_decoder(tmp_path)
    decoder.embed(torch.zeros(1, 4, dtype=torch.int64))
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight
    assert "lm_head.weight" not in decoder.checkpoint.tensors


def test_tap_reports_the_input_of_every_matrix(tmp_path: Path) -> None:
    build(families()["qwen3_moe"].config).save_pretrained(tmp_path)
    decoder = open_decoder(tmp_path)
    ids_BT = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    x_BTD, calls = decoder.embed(ids_BT)
    block = decoder.load(0)
    tokens: dict[str, int] = {}

    def seen(name: str, x: torch.Tensor) -> None:
        assert x.shape[-1] == block.linears[name].columns
        tokens[name] = tokens.get(name, 0) + x.reshape(-1, x.shape[-1]).shape[0]

    block.run(calls[0], x_BTD, seen)
    assert tokens["self_attn.q_proj"] == 32
    routed = sum(tokens.get(f"mlp.experts.{expert}.down_proj", 0) for expert in range(4))
    assert routed == 32 * 2  # every token visits two experts
