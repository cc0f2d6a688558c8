"""The 7B shape with a quarter of its decoder removed in several ways, on a GPU: decoding and prompts of 2048 tokens.

    python -m benchmarks.speed.shape_speed_gpu --out benchmarks/results/speed/shape-speed-h100.json

Random bf16 weights, configs as `niwaki.model.prunable` writes them. Decoding: a step is one CUDA graph, for all models
(see packed_decode_gpu). Prompts: one forward, device events. All models take turns in one run; medians.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from benchmarks.common.provenance import provenance
from benchmarks.speed.compression_speed import SHAPES
from benchmarks.speed.packed_decode_gpu import make_model, measure, weight_bytes
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import PrunedShape, ShapeSpace

FIELDS = ("model_type", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def shapes(blocks: int, removed_frac: float) -> dict[str, tuple[Any, float]]:
    """Config and removed share by name: neurons alone, heads with them, whole blocks, and some of each."""
    shape = SHAPES["7b"]
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.middle, num_hidden_layers=blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=32000,
        max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    skeleton = build_skeleton(config, torch.bfloat16)
    sizes = ShapeSpace(discover(skeleton), skeleton, config.to_dict())
    gone = round(removed_frac * blocks)
    wanted: dict[str, PrunedShape | None] = {
        "dense": sizes.shape(shape.middle, shape.heads),
        "neurons": sizes.fitting(removed_frac, 32, (), 256),
        "heads and neurons": sizes.fitting(removed_frac, 26, (), 256),
        "blocks": sizes.shape(shape.middle, shape.heads, range(blocks // 2, blocks // 2 + gone)),
        "blocks and neurons": sizes.fitting(removed_frac, 32, range(blocks // 2, blocks // 2 + gone // 2), 256),
    }
    found = {}
    for name, candidate in wanted.items():
        assert candidate is not None
        values = sizes.config_for(candidate)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        found[name] = config, sizes.removed_frac(candidate)
    return found


@torch.inference_mode()
def prompts(models: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of one forward over `tokens` tokens, in turns."""
    ids_1T = torch.arange(1, tokens + 1, device="cuda")[None] % 32000
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            model(ids_1T, logits_to_keep=1, use_cache=False)
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--removed-frac", type=float, default=0.25)
    args = parser.parse_args()
    configs = shapes(args.blocks, args.removed_frac)
    with torch.inference_mode():
        models = {
            name: make_model(config, "cuda") for name, (config, _) in configs.items()
        }
        decoded = measure(models, args.tokens, args.rounds)
    prompted = prompts(models, args.prompt_tokens, args.rounds)
    rows = []
    for name, (config, removed_frac) in configs.items():
        rows.append({
            "model": name, "removed_frac": round(removed_frac, 4), **{key: getattr(config, key) for key in FIELDS},
            "weight_bytes": weight_bytes(models[name]),
            "decode_tokens_per_s": round(args.tokens / decoded[name], 1),
            "decode_speedup": round(decoded["dense"] / decoded[name], 3),
            "prompt_ms": round(1e3 * prompted[name], 2),
            "prompt_speedup": round(prompted["dense"] / prompted[name], 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    if args.out:
        what = f"decoding {args.tokens} tokens, prompts of {args.prompt_tokens}, in turns, median of {args.rounds - 1}"
        args.out.write_text(json.dumps({"what": what, **provenance("cuda"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
