"""Llamas with numbers in them, dense or with a quarter removed, and their times of decoding and prompts on a CPU."""

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton, materialize_buffers
from niwaki.model.prunable import PrunedShape, ShapeSpace

PROMPT_TOKENS = 8
REMOVED_FRAC = 0.25
FIELDS = ("model_type", "num_hidden_layers", "intermediate_size", "num_attention_heads")


def dense_config() -> transformers.LlamaConfig:
    """Return the config of BENCH's 1B shape."""
    return transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def shapes(config: Any = None) -> dict[str, tuple[dict[str, Any], float]]:
    """Return config and removed share by name: neurons alone, heads with them, whole blocks, and some of each."""
    config = config or dense_config()
    skeleton = build_skeleton(config, torch.bfloat16)
    sizes = ShapeSpace(discover(skeleton), skeleton, config.to_dict())
    middle, multiple = len(sizes) // 2, min(256, sizes.neurons // 32)
    quarter, eighth = (tuple(range(middle, middle + len(sizes) // parts)) for parts in (4, 8))
    wanted: dict[str, PrunedShape | None] = {
        "dense": sizes.shape(sizes.neurons, sizes.heads),
        "neurons": sizes.fitting(REMOVED_FRAC, sizes.heads, (), multiple),
        "heads and neurons": sizes.fitting(REMOVED_FRAC, sizes.heads * 3 // 4, (), multiple),
        "blocks": sizes.shape(sizes.neurons, sizes.heads, quarter),
        "blocks and neurons": sizes.fitting(REMOVED_FRAC, sizes.heads, eighth, multiple),
    }
    configs = {}
    for name, shape in wanted.items():
        assert shape is not None
        configs[name] = sizes.config_for(shape), sizes.removed_frac(shape)
    return configs


def build(config: dict[str, Any]) -> Any:
    """Return a bf16 model of a config."""
    values = dict(config)
    return filled(build_skeleton(AutoConfig.for_model(values.pop("model_type"), **values), torch.bfloat16))


def filled(model: Any) -> Any:
    """Fill a skeleton with numbers and return it, ready to run."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.fill_(0.01)  # the time of a dense product does not depend on its numbers
    materialize_buffers(model, model, "cpu")
    model.config.use_cache = True
    return model


@torch.inference_mode()
def prompt(model: Any, tokens: int) -> float:
    """Return the seconds of a prompt of `tokens` tokens."""
    begin = time.perf_counter()
    model(torch.arange(1, tokens + 1)[None], logits_to_keep=1)
    return time.perf_counter() - begin


@torch.inference_mode()
def decode(model: Any, tokens: int, begun: Callable[[], None] = lambda: None) -> float:
    """Return the seconds of decoding `tokens` greedily after a short prompt. Call `begun` between the two."""
    out = model(torch.arange(1, PROMPT_TOKENS + 1)[None], use_cache=True)
    begun()
    begin = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - begin
