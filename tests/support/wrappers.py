"""Tiny random models whose decoder is inside a wrapper, or lies on disk under other names than in the model."""

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from support.families import build

TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def gemma3() -> Any:
    """Return the config of a Gemma 3 with a vision tower, whose file has `language_model.model.` first."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=4000,
        boi_token_index=4001,
        eoi_token_index=4002,
    )


def write(config: Any, folder: Path) -> Path:
    """Save a random model of `config` as transformers writes it."""
    build(config).save_pretrained(folder)
    return folder


def write_without_prefix(config: Any, folder: Path) -> Path:
    """Save a random model whose file has no `model.` before the names, as a base model is saved."""
    file = write(config, folder) / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder
