"""A GGUF read back: every tensor, every field, every byte, and what is refused. llama.cpp itself: test_llama_cpp.py."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.cli.app import main
from niwaki.cli.demo import sapling
from niwaki.compression.recover import recover
from niwaki.errors import ArchitectureError, CheckpointError, InputError, NumericalError, OutputError
from niwaki.exporters.gguf_file import TYPES
from support.families import build
from support.models import add_tokenizer, file_bytes, tiny_llama, weights_of, write_texts

SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "llama tied": transformers.LlamaConfig(**SHAPE | {"tie_word_embeddings": True}),
    "llama with biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(
        **SHAPE | {"num_attention_heads": 3, "num_key_value_heads": 1}, head_dim=16, sliding_window=None
    ),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32),
}
# What llama.cpp calls the modules of these families, written down here once more.
PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build(config, dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def read(dest: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(dest / "model.gguf")


def fields(dest: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in read(dest).fields.items() if not name.startswith("GGUF.")}


def tensors(dest: Path) -> dict[str, Tensor]:
    """Decoded tensors by name, as rows of float32."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *reversed(tensor.shape.tolist())
        )
        for tensor in read(dest).tensors
    }


def place(name: str) -> str:
    """The GGUF name of a tensor of a checkpoint."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, index, part = module.split(".", 3)
        return f"blk.{index}.{PLACES[part]}.{kind}"
    return f"{PLACES[module]}.{kind}"


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Row by row: values 2j and 2j+1 of a head in the file are values j and j + W/2 of it in the checkpoint."""
    width = len(rows) // heads
    found = torch.empty_like(rows)
    for row in range(len(rows)):
        head, inside = divmod(row, width)
        found[head * width + inside // 2 + (inside % 2) * (width // 2)] = rows[row]
    return found


def plain(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A tensor of the file in the order of rows that the checkpoint has."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    return unpaired(tensor, count) if count and config.model_type != "qwen3" else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_the_one_of_the_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = save(config, tmp_path / "model", dtype)
    record = niwaki.export(model, tmp_path / "dest", to="gguf")
    found, wanted = tensors(tmp_path / "dest"), weights_of(model)
    assert sorted(found) == sorted(map(place, wanted))
    for source, tensor in wanted.items():
        assert torch.equal(plain(source, found[place(source)], config), tensor.float()), source
    stored = Kind.F32 if dtype == torch.float32 else Kind.F16  # a float16 holds every bf16 that is not tiny or huge
    for tensor in read(tmp_path / "dest").tensors:
        assert tensor.tensor_type is (stored if len(tensor.shape) == 2 else Kind.F32), tensor.name
    assert record["export"]["bits"] == 8 * dtype.itemsize and not record["export"]["fallbacks"]
    assert sum(counts["bytes"] for counts in record["export"]["types"].values()) == sum(
        tensor.n_bytes for tensor in read(tmp_path / "dest").tensors
    )
    assert record["export"]["bytes"] == (tmp_path / "dest/model.gguf").stat().st_size


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


def test_the_types_are_those_that_the_library_writes() -> None:
    def writes(kind: Kind) -> bool:
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name.lower() for kind in Kind if writes(kind)} == set(TYPES)


@pytest.mark.parametrize("type", TYPES)
def test_types_and_bytes(type: str, tmp_path: Path) -> None:
    """512 columns are whole blocks for every type; 96 are for those of 32, and 16 for none."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None}
    config = transformers.MistralConfig(**SHAPE | {"hidden_size": 512, "intermediate_size": 16} | heads)
    model = save(config, tmp_path / "model")
    record = niwaki.export(model, tmp_path / "dest", to="gguf", type=type)["export"]
    kind = Kind[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    other = []
    for tensor in read(tmp_path / "dest").tensors:
        columns, rows = int(tensor.shape[0]), tensor.n_elements // int(tensor.shape[0])
        if len(tensor.shape) == 1:
            assert tensor.tensor_type is Kind.F32
        elif columns % block:
            assert tensor.tensor_type is Kind.F16
            other.append({"tensor": tensor.name, "row": columns, "type": "f16", "bytes": 2 * rows * columns})
        else:
            assert tensor.tensor_type is kind and tensor.n_bytes == rows * columns // block * size
    assert record["fallbacks"] == other
    assert len(other) == {1: 0, 32: 2, 256: 4}[block]
    assert bool(record["notes"]) == bool(other)
    assert fields(tmp_path / "dest")["general.file_type"] == {"f32": 0, "mxfp4": 38}.get(
        type, getattr(gguf.LlamaFileType, f"MOSTLY_{type.upper()}", None)
    )


def test_eight_bits_err_by_half_a_step_at_most(tmp_path: Path) -> None:
    model = save(CONFIGS["llama"], tmp_path / "model")
    niwaki.export(model, tmp_path / "dest", to="gguf", type="q8_0")
    found = tensors(tmp_path / "dest")
    for source, weight in weights_of(model).items():
        if weight.ndim == 2:
            error = (plain(source, found[place(source)], CONFIGS["llama"]) - weight).abs().view(-1, 32)
            step = weight.abs().view(-1, 32).amax(-1, keepdim=True) / 127
            assert (error <= 0.5 * step + 127 * 2**-11 * step).all(), source  # the scale is a float16


def test_positions_of_llama_3_and_linear_ones(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    niwaki.export(
        save(transformers.LlamaConfig(**SHAPE, rope_parameters=llama3), tmp_path / "3"), tmp_path / "dest", to="gguf"
    )
    factors = tensors(tmp_path / "dest")["rope_freqs.weight"]
    for pair in range(8):
        turns = 32 * 10000.0 ** (-pair / 8) / (2 * math.pi)  # within the context it was trained for
        blend = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        assert math.isclose(factors[pair], 1 / ((1 - blend) / 8.0 + blend), rel_tol=1e-5)
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    niwaki.export(
        save(transformers.Qwen3Config(**SHAPE, rope_parameters=linear), tmp_path / "q"), tmp_path / "again", to="gguf"
    )
    found = fields(tmp_path / "again")
    assert found["qwen3.rope.scaling.type"] == "linear" and found["qwen3.rope.scaling.factor"] == 4.0
    assert found["qwen3.rope.freq_base"] == 500.0
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = save(transformers.LlamaConfig(**SHAPE, rope_parameters=yarn), tmp_path / "yarn")
    with pytest.raises(InputError, match="rope_type yarn of a llama is not exported: default, linear or llama3"):
        niwaki.export(model, tmp_path / "none", to="gguf")


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    model = save(transformers.MistralConfig(**SHAPE, sliding_window=48), tmp_path / "model")
    record = niwaki.export(model, tmp_path / "dest", to="gguf")
    assert fields(tmp_path / "dest")["llama.context_length"] == 48
    assert record["export"]["notes"] == ["the context is the window of 48 tokens"]


def uneven(folder: Path, neurons: list[int], groups: list[int], config: Any) -> Path:
    """A model whose blocks are cut to these widths; neurons or groups of two heads that are none leave no tensors."""
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
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 3})
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
    qwen3 = uneven(tmp_path / "c", [96, 40], [2, 2], transformers.Qwen3Config(**SHAPE, head_dim=16))
    cases.append((qwen3, ArchitectureError, "differ in width, which llama.cpp can run for models that compute as a"))
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            niwaki.export(model, tmp_path / "dest", to="gguf")
    assert not list(tmp_path.glob("dest*"))


def without_heads(model: Path, out: Path) -> Path:
    """comp at 70 %, which the neurons of these models alone do not hold."""
    text = write_texts(out.with_suffix(".jsonl"))
    niwaki.compress(
        model, out, method="comp", target="0.7", device="cpu", options={"try_blocks": 0},
        calibration={"files": str(text), "samples": 4, "seq_len": 32},
    )  # fmt: skip
    return out


def test_a_llama_with_fewer_heads_is_a_llama_again(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 4})
    out = without_heads(save(config, tmp_path / "model", torch.bfloat16), tmp_path / "out")
    small = transformers.AutoConfig.from_pretrained(out)
    assert small.num_attention_heads < 8
    record = niwaki.export(out, tmp_path / "dest", to="gguf")
    found, stored = fields(tmp_path / "dest"), tensors(tmp_path / "dest")
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.head_count"] == small.num_attention_heads and found["llama.attention.key_length"] == 8
    for source, tensor in weights_of(out).items():
        assert torch.equal(plain(source, stored[place(source)], small), tensor.float()), source
    assert record["recipe"]["method"] == "comp" and record["export"]["to"] == "gguf"
    assert record == json.loads((tmp_path / "dest/niwaki/run.json").read_text())
    assert (tmp_path / "dest/niwaki/blocks.jsonl").read_bytes() == (out / "niwaki/blocks.jsonl").read_bytes()
    card = (tmp_path / "dest/README.md").read_text()
    assert "library_name: gguf" in card and "llama-cli -m model.gguf" in card and str(tmp_path) not in card
    assert "niwaki export OUT DEST --to gguf --type f16" in card
    assert not list((tmp_path / "dest").glob("*.safetensors")) and not list(tmp_path.glob("dest.*"))


def test_biases_of_flap_and_zeros_of_wanda_arrive(tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    model = save(CONFIGS["llama"], tmp_path / "model")
    for method in ("flap", "wanda"):
        out, dest = tmp_path / method, tmp_path / f"{method}-gguf"
        niwaki.compress(
            model, out, method=method, target="0.5", device="cpu",
            calibration={"files": text, "samples": 4, "seq_len": 32},
        )  # fmt: skip
        niwaki.export(out, dest, to="gguf", type="q8_0")
        found = tensors(dest)
        for source, tensor in weights_of(out).items():
            values = plain(source, found[place(source)], CONFIGS["llama"])
            assert not values[tensor == 0].any(), source
            assert tensor.ndim == 2 or torch.equal(values, tensor.float()), source
        assert any(name.endswith("ffn_down.bias") for name in found) == (method == "flap")


def test_codes_are_decoded_and_the_record_says_so(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=96)
    out = tmp_path / "four"
    niwaki.compress(model, out, method="rtn", target="4bit", options={"group": 32}, device="cpu")
    record = niwaki.export(out, tmp_path / "dest", to="gguf", type="f32")
    config, stored = transformers.AutoConfig.from_pretrained(model), tensors(tmp_path / "dest")
    for source, tensor in weights_of(out).items():
        assert torch.equal(plain(source, stored[place(source)], config), tensor.float()), source
    assert record["export"]["notes"] == ["21 matrices of codes are decoded, since GGUF has other codes"]
    assert "as codes, in the format" not in (tmp_path / "dest/README.md").read_text()


def test_a_model_that_niwaki_did_not_make(tmp_path: Path) -> None:
    record = niwaki.export(sapling(), tmp_path / "dest", to="gguf", type="f16")
    assert sorted(record) == ["export", "format", "model"]
    assert record["export"]["vocabulary"] == {"model": "gpt2", "pre": "gpt-2"}
    card = (tmp_path / "dest/README.md").read_text()
    assert "# sapling, gguf" in card and f"{record['export']['bytes']:,} bytes" in card
    before = file_bytes(tmp_path / "dest")
    niwaki.export(sapling(), tmp_path / "dest", to="gguf", type="f16", overwrite=True)
    assert file_bytes(tmp_path / "dest") == before
    with pytest.raises(OutputError, match="already exists"):
        niwaki.export(sapling(), tmp_path / "dest", to="gguf")


def test_a_recovered_model(tmp_path: Path) -> None:
    """Its record is not that of a compression, and travels all the same."""
    text, model = write_texts(tmp_path / "text.jsonl", count=20), tmp_path / "model"
    tiny_llama(model, dtype=torch.bfloat16)
    niwaki.compress(model, tmp_path / "pruned", method="magnitude", target="0.5", device="cpu")
    settings: dict[str, Any] = {"steps": 8, "samples": 32, "seq_len": 48, "rank": 4, "rate": 0.02, "device": "cpu"}
    recover(tmp_path / "pruned", tmp_path / "out", data=str(text), **settings)
    record = niwaki.export(tmp_path / "out", tmp_path / "dest", to="gguf")
    config, stored = transformers.AutoConfig.from_pretrained(model), tensors(tmp_path / "dest")
    for source, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(plain(source, stored[place(source)], config), tensor.float()), source
    assert record["result"]["zeros_frac"] == 0.5 and record["recover"]["steps"] == 8
    assert "# pruned, gguf" in (tmp_path / "dest/README.md").read_text()


def refused(kind: str, folder: Path) -> tuple[Path, list[str], str]:
    """A model that cannot be exported, further arguments, and what the error has to say."""
    if kind == "architecture":
        config = transformers.OPTConfig(vocab_size=4096, hidden_size=32, ffn_dim=48, num_hidden_layers=1)
        config.num_attention_heads, config.word_embed_proj_dim = 4, 32
        return save(config, folder), [], "is of type opt: niwaki writes GGUF for llama, mistral, qwen2, qwen3"
    if kind == "activation":
        return (
            save(transformers.LlamaConfig(**SHAPE, hidden_act="gelu"), folder),
            [],
            "with silu, config.json says gelu",
        )
    if kind == "bias":
        config = transformers.Qwen3Config(**SHAPE, attention_bias=True)
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


def test_the_command_line_prints_bytes_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")  # rows of 48
    command = ["niwaki", "export", str(model), str(tmp_path / "dest"), "--to", "gguf", "--type", "q8_0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert not stopped.value.code and "gguf llama q8_0, 8.621 true bits" in printed.out
    assert "note: 3 matrices whose rows do not divide into blocks of q8_0 are f16: 9,216 bytes" in printed.err


def test_a_missing_library_and_a_failure_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from niwaki.exporters import gguf_file

    model = tiny_llama(tmp_path / "model")
    encoded, calls = gguf_file._encoded, list[str]()

    def failing(name: str, *rest: Any) -> np.ndarray:
        calls.append(name)
        if len(calls) == 3:
            raise NumericalError("stop")
        return encoded(name, *rest)

    with monkeypatch.context() as patch, pytest.raises(NumericalError, match="stop"):
        patch.setattr(gguf_file, "_encoded", failing)
        niwaki.export(model, tmp_path / "dest", to="gguf")
    assert len(calls) == 3 and not list(tmp_path.glob("dest*"))
    monkeypatch.delitem(sys.modules, "niwaki.exporters.gguf_file")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"to gguf needs the package gguf: pip install gguf"):
        niwaki.export(model, tmp_path / "dest", to="gguf")
