"""Models that are exported to GGUF, and the files read back with the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor

from support.families import build
from support.models import add_tokenizer

GGUF_SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**GGUF_SHAPE),
    "llama tied": transformers.LlamaConfig(**GGUF_SHAPE | {"tie_word_embeddings": True}),
    "llama with biases": transformers.LlamaConfig(**GGUF_SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(
        **GGUF_SHAPE | {"num_attention_heads": 3, "num_key_value_heads": 1}, head_dim=16, sliding_window=None
    ),
    "qwen2": transformers.Qwen2Config(**GGUF_SHAPE),
    "qwen3": transformers.Qwen3Config(**GGUF_SHAPE, head_dim=32),
}
# Names of llama.cpp for the modules of these families, independent of the exporter.
NAMES = {
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
    """Save a random model of a config with the sapling's tokenizer."""
    build(config, dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def read(dest: Path) -> gguf.GGUFReader:
    """Open the GGUF of an export."""
    return gguf.GGUFReader(dest / "model.gguf")


def fields(dest: Path) -> dict[str, Any]:
    """Return the fields of a GGUF by name."""
    return {name: field.contents() for name, field in read(dest).fields.items() if not name.startswith("GGUF.")}


def tensors(dest: Path) -> dict[str, Tensor]:
    """Return decoded tensors by name, as rows of float32."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *reversed(tensor.shape.tolist())
        )
        for tensor in read(dest).tensors
    }


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of a checkpoint."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, index, part = module.split(".", 3)
        return f"blk.{index}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows: rows 2j and 2j+1 of a head in the file are rows j and j + W/2 in the checkpoint."""
    width = len(rows) // heads
    found = torch.empty_like(rows)
    for row in range(len(rows)):
        head, inside = divmod(row, width)
        found[head * width + inside // 2 + (inside % 2) * (width // 2)] = rows[row]
    return found


def in_checkpoint_order(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a tensor of the file with its rows in the order of the checkpoint."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    return unpaired(tensor, count) if count and config.model_type != "qwen3" else tensor
