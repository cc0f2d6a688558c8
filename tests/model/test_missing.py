"""Weights that a checkpoint lacks are all counted, and named as the file should hold them, before any work."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.families import build
from support.models import CPU, add_tokenizer, tiny_llama, weights_of

Tensors = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[Tensors], Tensors], **config: object) -> Path:
    """Change the tensors and the config of a model, and return its folder."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def problem(folder: Path) -> str:
    """Return the message about a folder, which is the same wherever the model is opened."""
    with pytest.raises(CheckpointError) as refused:
        Decoder(Checkpoint.open(folder), CPU)
    with pytest.raises(CheckpointError) as elsewhere:
        niwaki.load(folder, device="cpu")
    assert str(refused.value) == str(elsewhere.value)
    return str(refused.value)


def test_an_untied_config_without_a_head(tmp_path: Path) -> None:
    folder = change(tiny_llama(tmp_path / "m", tie_word_embeddings=True), dict, tie_word_embeddings=False)
    assert problem(folder).endswith(
        "lacks 1 tensor of the model: lm_head.weight: set tie_word_embeddings to true in config.json if the "
        "embeddings are the head, or download the model again"
    )


def test_all_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    folder = change(tiny_llama(tmp_path / "m"), without("up_proj.weight", "norm.weight"))
    assert (
        "lacks 10 tensors of the model: model.layers.0.input_layernorm.weight, model.layers.0.mlp.up_proj.weight, "
        in (problem(folder))
    )
    assert "and 6 more" in problem(folder)


def test_one_expert_of_a_fused_stack(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    build(config).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert f"lacks 1 tensor of the model: {name}: " in problem(change(tmp_path, without(name)))


def test_a_file_that_leaves_out_the_prefix_of_the_model(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    build(config).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    change(tmp_path, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    Decoder(Checkpoint.open(tmp_path), CPU)
    assert "1 tensor of the model: h.1.mlp.c_fc.weight: " in problem(change(tmp_path, without("1.mlp.c_fc.weight")))


def test_tied_weights_that_are_stored_as_the_head_alone(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "whole", tie_word_embeddings=True)
    table = weights_of(whole)["model.embed_tokens.weight"]
    folder = change(
        tiny_llama(tmp_path / "m", tie_word_embeddings=True),
        lambda tensors: {**without("embed_tokens.weight")(tensors), "lm_head.weight": table},
    )
    decoder, wanted = (Decoder(Checkpoint.open(one), CPU) for one in (folder, whole))
    ids_BT = torch.arange(12).view(2, 6)
    assert torch.equal(decoder.embed(ids_BT)[0], wanted.embed(ids_BT)[0])
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight


def test_another_shape_than_the_config_asks_for(tmp_path: Path) -> None:
    folder = change(tiny_llama(tmp_path / "m"), dict, intermediate_size=64)
    assert "model.layers.0.mlp.down_proj.weight has the shape [32, 48], and config.json asks for [32, 64]" in (
        problem(folder)
    )
