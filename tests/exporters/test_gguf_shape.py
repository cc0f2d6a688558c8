"""Names, fields, positions and widths of the models that a GGUF can hold, and refusals of others."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.cli.app import main
from niwaki.errors import ArchitectureError, CheckpointError, InputError
from support.gguf_files import (
    CONFIGS,
    GGUF_SHAPE,
    fields,
    gguf_name,
    in_checkpoint_order,
    save,
    tensors,
    unpaired,
)
from support.models import weights_of, write_texts


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_say_what_the_config_says(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    niwaki.export(save(config, tmp_path / "model"), tmp_path / "dest", to="gguf")
    found = fields(tmp_path / "dest")
    arch = found["general.architecture"]
    assert arch == ("qwen3" if name == "qwen3" else "llama")
    wanted = {
        "context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "vocab_size": 4096,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 32 if name == "qwen3" else 16, "attention.value_length": 32 if name == "qwen3" else 16,
        "rope.dimension_count": 32 if name == "qwen3" else 16, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {key: found[f"{arch}.{key}"] for key in wanted} == wanted
    assert math.isclose(found[f"{arch}.attention.layer_norm_rms_epsilon"], config.rms_norm_eps, rel_tol=1e-6)
    assert found["general.file_type"] == gguf.LlamaFileType.ALL_F32 and found["general.type"] == "model"


def test_positions_of_llama_3_and_linear_ones(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    niwaki.export(
        save(transformers.LlamaConfig(**GGUF_SHAPE, rope_parameters=llama3), tmp_path / "3"),
        tmp_path / "dest",
        to="gguf",
    )
    factors = tensors(tmp_path / "dest")["rope_freqs.weight"]
    for pair in range(8):
        turns = 32 * 10000.0 ** (-pair / 8) / (2 * math.pi)  # within the context it was trained for
        blend = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        assert math.isclose(factors[pair], 1 / ((1 - blend) / 8.0 + blend), rel_tol=1e-5)
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    niwaki.export(
        save(transformers.Qwen3Config(**GGUF_SHAPE, rope_parameters=linear), tmp_path / "q"),
        tmp_path / "again",
        to="gguf",
    )
    found = fields(tmp_path / "again")
    assert found["qwen3.rope.scaling.type"] == "linear" and found["qwen3.rope.scaling.factor"] == 4.0
    assert found["qwen3.rope.freq_base"] == 500.0
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = save(transformers.LlamaConfig(**GGUF_SHAPE, rope_parameters=yarn), tmp_path / "yarn")
    with pytest.raises(InputError, match="rope_type yarn of a llama is not exported: default, linear or llama3"):
        niwaki.export(model, tmp_path / "none", to="gguf")


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    model = save(transformers.MistralConfig(**GGUF_SHAPE, sliding_window=48), tmp_path / "model")
    record = niwaki.export(model, tmp_path / "dest", to="gguf")
    assert fields(tmp_path / "dest")["llama.context_length"] == 48
    assert record["export"]["notes"] == ["the context is the window of 48 tokens"]


def uneven(folder: Path, neurons: list[int], groups: list[int], config: Any) -> Path:
    """Save a model with blocks cut to these widths. Zero neurons or groups of two heads leave no tensors."""
    model = save(config, folder)
    stored = load_file(model / "model.safetensors")
    for name in list(stored):
        if ".layers." not in name or "norm" in name:
            continue
        index = int(name.split(".")[2])
        wide = 16 * groups[index] * (2 if "q_proj" in name or "o_proj" in name else 1)
        kept = neurons[index] if ".mlp." in name else wide
        tensor = stored.pop(name)
        if kept:
            stored[name] = (tensor[:, :kept] if "down_proj" in name or "o_proj" in name else tensor[:kept]).clone()
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    return model


def test_blocks_of_different_widths(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GGUF_SHAPE | {"num_hidden_layers": 3})
    model = uneven(tmp_path / "model", [96, 40, 8], [2, 0, 1], config)
    record = niwaki.export(model, tmp_path / "dest", to="gguf")
    found, stored = fields(tmp_path / "dest"), tensors(tmp_path / "dest")
    assert record["export"]["format"] == "deci f32" and found["general.architecture"] == "deci"
    assert found["deci.feed_forward_length"] == [96, 40, 8]
    assert found["deci.attention.head_count"] == [4, 0, 2]
    assert found["deci.attention.head_count_kv"] == [2, 0, 1]
    assert "blk.1.attn_norm.weight" not in stored and stored["blk.2.attn_q.weight"].shape == (32, 64)
    last = weights_of(model)["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(unpaired(stored["blk.2.attn_k.weight"], 1), last)


def test_different_widths_that_llama_cpp_would_get_wrong_are_refused(tmp_path: Path) -> None:
    llama = CONFIGS["llama"]
    cases = [
        (uneven(tmp_path / "a", [96, 0], [2, 2], llama), CheckpointError, r"no tensor for blk\.1\.ffn_up\.weight"),
        (uneven(tmp_path / "b", [96, 96], [0, 2], llama), ArchitectureError, "reads the width of heads from the first"),
        (uneven(tmp_path / "d", [96, 96], [0, 0], llama), ArchitectureError, "reads the width of heads from the first"),
    ]
    qwen3 = uneven(tmp_path / "c", [96, 40], [2, 2], transformers.Qwen3Config(**GGUF_SHAPE, head_dim=16))
    cases.append((qwen3, ArchitectureError, "differ in width, which llama.cpp can run for models that compute as a"))
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            niwaki.export(model, tmp_path / "dest", to="gguf")
    assert not list(tmp_path.glob("dest*"))


def without_heads(model: Path, out: Path) -> Path:
    """Compress by comp at 70 %, more than the neurons of these models alone allow."""
    text = write_texts(out.with_suffix(".jsonl"))
    niwaki.compress(
        model, out, method="comp", target="0.7", device="cpu", options={"try_blocks": 0},
        calibration={"files": str(text), "samples": 4, "seq_len": 32},
    )  # fmt: skip
    return out


def test_a_llama_with_fewer_heads_is_a_llama_again(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GGUF_SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 4})
    out = without_heads(save(config, tmp_path / "model", torch.bfloat16), tmp_path / "out")
    small = transformers.AutoConfig.from_pretrained(out)
    assert small.num_attention_heads < 8
    record = niwaki.export(out, tmp_path / "dest", to="gguf")
    found, stored = fields(tmp_path / "dest"), tensors(tmp_path / "dest")
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.head_count"] == small.num_attention_heads and found["llama.attention.key_length"] == 8
    for source, tensor in weights_of(out).items():
        assert torch.equal(in_checkpoint_order(source, stored[gguf_name(source)], small), tensor.float()), source
    assert record["recipe"]["method"] == "comp" and record["export"]["to"] == "gguf"
    assert record == json.loads((tmp_path / "dest/niwaki/run.json").read_text())
    assert (tmp_path / "dest/niwaki/blocks.jsonl").read_bytes() == (out / "niwaki/blocks.jsonl").read_bytes()
    card = (tmp_path / "dest/README.md").read_text()
    assert "library_name: gguf" in card and "llama-cli -m model.gguf" in card and str(tmp_path) not in card
    assert "niwaki export OUT DEST --to gguf --type f16" in card
    assert not list((tmp_path / "dest").glob("*.safetensors")) and not list(tmp_path.glob("dest.*"))


def refused(kind: str, folder: Path) -> tuple[Path, list[str], str]:
    """Return a model that cannot be exported, further arguments, and the message of the error."""
    if kind == "architecture":
        config = transformers.OPTConfig(vocab_size=4096, hidden_size=32, ffn_dim=48, num_hidden_layers=1)
        config.num_attention_heads, config.word_embed_proj_dim = 4, 32
        return save(config, folder), [], "is of type opt: niwaki writes GGUF for llama, mistral, qwen2, qwen3"
    if kind == "activation":
        return (
            save(transformers.LlamaConfig(**GGUF_SHAPE, hidden_act="gelu"), folder),
            [],
            "with silu, config.json says gelu",
        )
    if kind == "bias":
        config = transformers.Qwen3Config(**GGUF_SHAPE, attention_bias=True)
        return save(config, folder), [], "llama.cpp's qwen3 has no place for model.layers.0.self_attn.o_proj.bias"
    model = save(CONFIGS["llama"], folder)
    if kind == "type":
        return model, ["--type", "q8"], "unknown type 'q8': did you mean 'q8_0'? choose from bf16, f16, f32"
    if kind == "tokenizer":
        (model / "tokenizer.json").unlink()
        return model, [], "has no tokenizer.json"
    if kind == "bias shape":
        save(CONFIGS["llama with biases"], folder)
    stored = load_file(model / "model.safetensors")
    cut = {
        "shape": "model.layers.1.mlp.gate_proj.weight",
        "bias shape": "model.layers.1.self_attn.k_proj.bias",
        "head": "lm_head.weight",
    }
    if kind == "missing":
        del stored["model.layers.1.mlp.gate_proj.weight"]
    elif kind in cut:
        stored[cut[kind]] = stored[cut[kind]][:-6].clone()
    else:
        stored["model.layers.1.mlp.gate_proj.weight"][0, 0] = 1e6
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    return {
        "missing": (model, [], "has no tensor for blk.1.ffn_gate.weight"),
        "shape": (model, [], "model.layers.1.mlp.gate_proj.weight has the shape (90, 64), expected (96, 64)"),
        "bias shape": (model, [], "model.layers.1.self_attn.k_proj.bias has the shape (26,), expected (32,)"),
        "head": (model, [], "lm_head.weight has the shape (4090, 64), expected (4096, 64)"),
        "too large": (model, ["--type", "f16"], "blk.1.ffn_gate.weight holds values beyond float16: export with"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["architecture", "activation", "bias", "type", "tokenizer", "missing", "shape", "bias shape", "head", "too large"],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more, message = refused(kind, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["niwaki", "export", str(model), str(tmp_path / "dest"), "--to", "gguf", *more])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("exporting:")]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.glob("dest*"))
