"""A 1B-shaped Llama with a quarter of its decoder removed in several ways: decoding, prompts and memory on the CPU.

    python -m benchmarks.speed.shape_speed --out benchmarks/results/speed/shape-speed-cpu.json [--threads 1 2]

BENCH's 1B shape (16 blocks, 2048 wide, 8192 neurons, 32 heads in 8 groups, 32000 tokens), bf16 weights, built
from the configs that `niwaki.model.prunable` writes. All models take turns in one process; medians over the rounds.
Memory is VmRSS minus that before building, each model alone in a fresh process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from benchmarks.common.provenance import provenance
from benchmarks.speed.packed_decode import decode, resident_bytes
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton, materialize_buffers
from niwaki.model.prunable import PrunedShape, ShapeSpace

REMOVED_FRAC = 0.25
FIELDS = ("model_type", "num_hidden_layers", "intermediate_size", "num_attention_heads")


def dense_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def shapes(config: Any = None) -> dict[str, tuple[dict[str, Any], float]]:
    """Config and removed share by name: neurons alone, heads with them, whole blocks, and some of each."""
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
    found = {}
    for name, shape in wanted.items():
        assert shape is not None
        found[name] = sizes.config_for(shape), sizes.removed_frac(shape)
    return found


def build(config: dict[str, Any]) -> Any:
    values = dict(config)
    return filled(build_skeleton(AutoConfig.for_model(values.pop("model_type"), **values), torch.bfloat16))


def filled(model: Any) -> Any:
    """A skeleton with numbers in it, ready to run."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.fill_(0.01)  # a dense product takes as long whatever its numbers are
    materialize_buffers(model, model, "cpu")
    model.config.use_cache = True
    return model


@torch.inference_mode()
def prompt(model: Any, tokens: int) -> float:
    begin = time.perf_counter()
    model(torch.arange(1, tokens + 1)[None], logits_to_keep=1)
    return time.perf_counter() - begin


def measure(models: dict[str, Any], threads: int, tokens: int, prompt_tokens: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    decoded: dict[str, list[float]] = {name: [] for name in models}
    prompted: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            decode(model, 2)  # memory that lay idle while the others ran may have been taken away
            decoded[name].append(decode(model, tokens))
            prompted[name].append(prompt(model, prompt_tokens))
    rows = []
    for name in models:
        decode_s, prompt_s = statistics.median(decoded[name]), statistics.median(prompted[name])
        rows.append({
            "model": name, "threads": threads, "decode_tokens_per_s": round(tokens / decode_s, 2),
            "prompt_tokens_per_s": round(prompt_tokens / prompt_s, 1),
            "decode_speedup": round(statistics.median(decoded["dense"]) / decode_s, 3),
            "prompt_speedup": round(statistics.median(prompted["dense"]) / prompt_s, 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def weigh(name: str) -> None:
    """Prints what building the model and decoding adds to this process."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 2}
    build(dense_config().to_dict() | small)  # what the libraries take
    before = resident_bytes()
    model = build(shapes()[name][0])
    decode(model, 4)
    print(json.dumps({"rss_bytes": resident_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weigh", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weigh:
        weigh(args.weigh)
        return
    configs = shapes()
    weights = []
    for name, (config, removed_frac) in configs.items():
        command = [sys.executable, "-m", "benchmarks.speed.shape_speed", "--weigh", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        text = {key: config[key] for key in FIELDS}
        weights.append({"model": name, "removed_frac": round(removed_frac, 4), **text, **found})
        weights[-1]["rss_share"] = round(found["rss_bytes"] / weights[0]["rss_bytes"], 3)
        print(weights[-1], flush=True)
    models = {name: build(config) for name, (config, _) in configs.items()}
    rows = [
        row
        for threads in args.threads
        for row in measure(models, threads, args.tokens, args.prompt_tokens, args.rounds)
    ]
    if args.out:
        what = f"decoding {args.tokens} tokens, prompts of {args.prompt_tokens}, in turns, median of {args.rounds}"
        result = {"what": what, **provenance("cpu"), "models": weights, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
