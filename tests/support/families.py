"""Tiny random models of every supported family, and the anatomy that must be found in each."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@dataclass(frozen=True)
class Family:
    """Config, the matrices of its first block by shared input, and those left dense on purpose."""

    config: Any
    groups: list[list[str]]
    kept_dense: tuple[str, ...] = ()


def _experts(attention: list[list[str]], stack: str, count: int) -> list[list[str]]:
    return attention + [
        [f"{stack}.{expert}.{leaf}"] for leaf in ("gate_up_proj", "down_proj") for expert in range(count)
    ]


def families() -> dict[str, Family]:
    """Return the families by name."""
    moe_attention = LLAMA_GROUPS[:2]
    return {
        "llama": Family(transformers.LlamaConfig(**GQA), LLAMA_GROUPS),
        "llama-tied": Family(transformers.LlamaConfig(**GQA, tie_word_embeddings=True), LLAMA_GROUPS),
        "mistral": Family(transformers.MistralConfig(**GQA, sliding_window=6), LLAMA_GROUPS),
        "qwen2": Family(transformers.Qwen2Config(**GQA), LLAMA_GROUPS),
        "qwen3": Family(transformers.Qwen3Config(**GQA), LLAMA_GROUPS),
        "gemma2": Family(transformers.Gemma2Config(**GQA, sliding_window=6), LLAMA_GROUPS),
        "gemma3": Family(transformers.Gemma3TextConfig(**GQA, sliding_window=6), LLAMA_GROUPS),
        "phi3": Family(
            transformers.Phi3Config(**{k: v for k, v in GQA.items() if k != "head_dim"}),
            [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        ),
        "opt": Family(
            transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.out_proj"],
                ["fc1"],
                ["fc2"],
            ],
        ),
        "gpt_neox": Family(
            transformers.GPTNeoXConfig(**COMMON, intermediate_size=48),
            [
                ["attention.query_key_value"],
                ["attention.dense"],
                ["mlp.dense_h_to_4h"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
        "gpt2": Family(
            transformers.GPT2Config(
                vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
            ),
            [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
        ),
        "falcon": Family(
            transformers.FalconConfig(**COMMON, new_decoder_architecture=False, multi_query=True, parallel_attn=True),
            [
                ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
                ["self_attention.dense"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
        "falcon-alibi": Family(
            transformers.FalconConfig(**COMMON, alibi=True, parallel_attn=False, multi_query=False),
            [
                ["self_attention.query_key_value"],
                ["self_attention.dense"],
                ["mlp.dense_h_to_4h"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
        "bloom": Family(
            transformers.BloomConfig(
                vocab_size=96, hidden_size=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
            ),
            [
                ["self_attention.query_key_value"],
                ["self_attention.dense"],
                ["mlp.dense_h_to_4h"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
        "mixtral": Family(
            transformers.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
            _experts(moe_attention, "mlp.experts", 4),
            ("mlp.gate.weight",),
        ),
        "qwen3_moe": Family(
            transformers.Qwen3MoeConfig(
                **GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[2]
            ),
            _experts(moe_attention, "mlp.experts", 4),
            ("mlp.gate.weight",),
        ),
    }


def sharing_families() -> dict[str, Any]:
    """Return configs whose later blocks read keys and values of earlier ones, and inputs of every token."""
    sharing = {
        **GQA,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    }
    return {
        "gemma4": transformers.Gemma4TextConfig(**sharing, global_head_dim=16),
        "gemma3n": transformers.Gemma3nTextConfig(
            **sharing, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0]
        ),
    }


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a model with weights so large that compression changes its outputs."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.add_(noise.to(dtype))
    return model.eval()
