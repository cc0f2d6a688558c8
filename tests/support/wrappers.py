"""Tiny random models whose decoder is inside a wrapper, or lies on disk under other names than in the model."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from niwaki.model.hf import auto_class
from support.models import add_tokenizer

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
    "pad_token_id": 0,
}
# More layers than the text model has: the tower must not be taken for the decoder.
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 4, "num_heads": 2, "hidden_size": 64, "intermediate_size": 160, "patch_size": 14}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def wrappers() -> dict[str, Any]:
    """Return the configs of the wrappers by model type."""
    t = transformers
    llama, qwen = {**TEXT, "model_type": "llama"}, {**TEXT, "rope_parameters": ROPE}
    clip = {**VISION, "model_type": "clip_vision_model"}
    return {
        "gemma3": t.Gemma3Config(
            text_config={**TEXT, "sliding_window": 8},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=4000,
            boi_token_index=4001,
            eoi_token_index=4002,
        ),
        "llava": t.LlavaConfig(text_config=llama, vision_config=clip, image_token_index=4000),
        "mistral3": t.Mistral3Config(
            text_config={**TEXT, "model_type": "mistral", "sliding_window": 8},
            vision_config={**VISION, "model_type": "pixtral", "head_dim": 32},
            image_token_index=4000,
        ),
        "qwen2_vl": t.Qwen2VLConfig(text_config=qwen, vision_config={**QWEN_VISION, "embed_dim": 64}),
        "qwen2_5_vl": t.Qwen2_5_VLConfig(text_config=qwen, vision_config={**QWEN_VISION, "out_hidden_size": 64}),
        "qwen3_vl": t.Qwen3VLConfig(
            text_config=qwen,
            vision_config={**QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [1, 2]},
        ),
        "qwen3_vl_moe": t.Qwen3VLMoeConfig(
            text_config={**qwen, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            vision_config={**QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [1, 2]},
        ),
        "gemma4": t.Gemma4Config(
            text_config={
                **TEXT,
                "vocab_size_per_layer_input": 4096,
                "hidden_size_per_layer_input": 16,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
                "global_head_dim": 32,
            },
            vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32},
            audio_config=None,
        ),
        "qwen2_audio": t.Qwen2AudioConfig(
            text_config={**TEXT, "model_type": "qwen2"},
            audio_config={
                "d_model": 64, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 160,
                "model_type": "qwen2_audio_encoder",
            },
        ),
    }  # fmt: skip


def write(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of `config` as transformers writes it, with a tokenizer."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype))
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def rename(folder: Path, names: dict[str, str]) -> Path:
    """Replace prefixes of the names in the file of a model."""

    def new(name: str) -> str:
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        return names.get(old, "") + name.removeprefix(old)

    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {new(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder
