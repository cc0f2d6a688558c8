"""Decoding on a GPU: a step of a Llama as one CUDA graph, models in turns.

Keys and values lie in tensors of fixed size, and attention sees what the mask lets it see.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from niwaki.measure.bench.models import random_model


class FixedCache:
    """Keys and values [1, heads, length, head size] of every block. The position to write is a tensor."""

    def __init__(self, config: LlamaConfig, length: int, like: Tensor) -> None:
        size = (1, config.num_key_value_heads, length, config.head_dim)
        self.keys = [like.new_zeros(size) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(size) for _ in range(config.num_hidden_layers)]
        self.position_1 = torch.zeros(1, dtype=torch.long, device=like.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values at the position, and return all. The attention of transformers calls this."""
        self.keys[layer_idx].index_copy_(2, self.position_1, keys)
        self.values[layer_idx].index_copy_(2, self.position_1, values)
        return self.keys[layer_idx], self.values[layer_idx]


def make_model(config: Any, device: str) -> Any:
    """Build a decoder as transformers does, weights normal, in bf16."""
    return random_model(config, torch.bfloat16, torch.device(device))


def make_step(model: LlamaForCausalLM, cache: FixedCache, token_11: Tensor) -> Callable[[], Tensor]:
    """Return a step by one token, which reads and overwrites the token and returns the logits."""
    body = model.model
    place_L = torch.arange(cache.keys[0].shape[2], device=token_11.device)

    def step() -> Tensor:
        hidden = body.embed_tokens(token_11)
        position_11 = cache.position_1.view(1, 1)
        turns = body.rotary_emb(hidden, position_ids=position_11)
        mask_111L = (place_L <= cache.position_1).view(1, 1, 1, -1)
        for block in body.layers:
            hidden = block(
                hidden, attention_mask=mask_111L, position_ids=position_11, past_key_values=cache,
                position_embeddings=turns,
            )  # fmt: skip
        logits = model.lm_head(body.norm(hidden))
        token_11.copy_(logits[:, -1:].argmax(-1))
        cache.position_1.add_(1)
        return logits

    return step


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a step reads: all but the embeddings."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values()) - model.model.embed_tokens.weight.nbytes


def decode_in_turns(models: dict[str, LlamaForCausalLM], tokens: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of decoding `tokens` tokens, in turns."""
    graphs, caches = {}, {}
    for name, model in models.items():
        cache = FixedCache(model.config, tokens + 8, model.lm_head.weight)
        token_11 = torch.ones(1, 1, dtype=torch.long, device="cuda")
        step = make_step(model, cache, token_11)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.synchronize()
        graphs[name], caches[name] = torch.cuda.CUDAGraph(), cache
        with torch.cuda.graph(graphs[name]):
            step()
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, graph in graphs.items():
            caches[name].position_1.zero_()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(tokens):
                graph.replay()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in times.items()}
