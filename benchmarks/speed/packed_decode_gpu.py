"""A Llama-2-7B-shaped decoder on a GPU, one token at a time: tokens a second of dense bf16 and of packed weights.

    python -m benchmarks.speed.packed_decode_gpu --out benchmarks/results/speed/packed-decode-h100.json [--blocks 32]

Random weights, made on the device. The blocks, norms and rotary embeddings are those of transformers; keys and values
lie in tensors of fixed size, attention sees what the mask lets it see. A step (embeddings, blocks, head in bf16, the
largest logit as the next token) is one CUDA graph; the models take turns in one run.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.provenance import provenance
from benchmarks.kernels.packed_linear_gpu import LAYERS, random_layer
from niwaki.measure.bench.models import random_model
from niwaki.runtime.linear import PackedLinear

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}


class FixedCache:
    """Keys and values [1, heads, length, head size] of every block; the position to write is a tensor."""

    def __init__(self, config: LlamaConfig, length: int, like: Tensor) -> None:
        size = (1, config.num_key_value_heads, length, config.head_dim)
        self.keys = [like.new_zeros(size) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(size) for _ in range(config.num_hidden_layers)]
        self.position_1 = torch.zeros(1, dtype=torch.long, device=like.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls."""
        self.keys[layer_idx].index_copy_(2, self.position_1, keys)
        self.values[layer_idx].index_copy_(2, self.position_1, values)
        return self.keys[layer_idx], self.values[layer_idx]


def make_model(config: Any, device: str) -> Any:
    """A decoder as transformers builds it, weights normal, in bf16."""
    return random_model(config, torch.bfloat16, torch.device(device))


def with_packed_blocks(model: LlamaForCausalLM, layer: str, device: str) -> LlamaForCausalLM:
    """The same model with random packed layers in its blocks; embeddings, norms and head are shared."""
    packed = copy.copy(model)
    packed._modules = dict(model._modules)
    packed.model = copy.copy(model.model)
    packed.model._modules = dict(model.model._modules)
    with torch.device("meta"):
        packed.model.layers = type(model)(model.config).model.layers
    for old, new in zip(model.model.layers, packed.model.layers, strict=True):
        for name, module in list(new.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(module, nn.Linear):
                own = random_layer(layer, module.out_features, module.in_features, device)
                setattr(new.get_submodule(parent), last, own)
            elif not list(module.children()):
                setattr(new.get_submodule(parent), last, old.get_submodule(name))
    return packed.eval()


def make_step(model: LlamaForCausalLM, cache: FixedCache, token_11: Tensor) -> Callable[[], Tensor]:
    """One token further: reads and overwrites the token, and returns the logits."""
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
    """Of everything that a step reads: all but the embeddings."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values()) - model.model.embed_tokens.weight.nbytes


def measure(models: dict[str, LlamaForCausalLM], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of decoding `tokens` tokens, in turns."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    args = parser.parse_args()
    config = LlamaConfig(num_hidden_layers=args.blocks, attn_implementation="sdpa", dtype="bfloat16", **SHAPE)
    with torch.inference_mode():
        models = {"dense": make_model(config, "cuda")}
        models |= {layer: with_packed_blocks(models["dense"], layer, "cuda") for layer in args.layers}
        seconds = measure(models, args.tokens, args.rounds)
    rows = [
        {
            "weights": name, "tokens_per_s": round(args.tokens / seconds[name], 1),
            "ms_per_token": round(seconds[name] / args.tokens * 1e3, 3),
            "speedup": round(seconds["dense"] / seconds[name], 2), "bytes_read": weight_bytes(model),
            "packed_layers": sum(isinstance(module, PackedLinear) for module in model.modules()),
        }
        for name, model in models.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    result = {
        "what": f"decoding {args.tokens} tokens one at a time, {args.blocks} blocks of Llama-2-7B's shape",
        **provenance("cuda"),
        "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
