"""Decoders with a quarter removed in several ways: decoding, prompts, and on a CPU memory.

    python -m benchmarks.speed.shape_speed --out benchmarks/results/speed/shape-speed-cpu.json [--threads 1 2]
    python -m benchmarks.speed.shape_speed --device cuda --out benchmarks/results/speed/shape-speed-h100.json

Weights are bf16. `niwaki.model.prunable` writes the configs. All models take turns in one process. Times are medians
over the rounds.

CPU: BENCH's 1B shape (16 blocks, 2048 wide, 8192 neurons, 32 heads in 8 groups, 32000 tokens). Memory is VmRSS minus
that before building, each model alone in a fresh process.

GPU: the Llama-2-7B shape with random weights. A step of decoding is one CUDA graph for all models (see
`benchmarks.common.gpu_decoding`). A prompt is one forward, timed by device events.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from benchmarks.common.checkpoints import SHAPES
from benchmarks.common.cpu_timing import resident_bytes
from benchmarks.common.decoders import FIELDS, build, decode, dense_config, prompt, shapes
from benchmarks.common.devices import add_device, parse_for_device
from benchmarks.common.gpu_decoding import decode_in_turns, make_model, weight_bytes
from benchmarks.common.provenance import provenance
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import PrunedShape, ShapeSpace

GPU_FIELDS = (*FIELDS, "num_key_value_heads")
DEFAULTS = {
    "cpu": {"tokens": 32, "prompt_tokens": 32, "rounds": 5},
    "cuda": {"tokens": 128, "prompt_tokens": 2048, "rounds": 8},
}


def measure(models: dict[str, Any], threads: int, tokens: int, prompt_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of all models with a number of threads. The models take turns."""
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
    """Print what building the model and decoding adds to the memory of this process."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "head_dim": 2}
    build(dense_config().to_dict() | small)  # what the libraries take
    before = resident_bytes()
    model = build(shapes()[name][0])
    decode(model, 4)
    print(json.dumps({"rss_bytes": resident_bytes() - before}))


def gpu_shapes(blocks: int, removed_frac: float) -> dict[str, tuple[Any, float]]:
    """Return config and removed share by name: neurons alone, heads with them, whole blocks, and some of each."""
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
    """Return the median seconds of one forward over `tokens` tokens, in turns."""
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
    """Measure on the chosen device, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--tokens", type=int, help="default: 32, on a GPU 128")
    parser.add_argument("--prompt-tokens", type=int, help="default: 32, on a GPU 2048")
    parser.add_argument("--rounds", type=int, help="default: 5, on a GPU 8 with the one that warms up")
    parser.add_argument("--blocks", type=int, default=32, help="GPU only")
    parser.add_argument("--removed-frac", type=float, default=0.25, help="GPU only")
    parser.add_argument("--weigh", help=argparse.SUPPRESS)
    args = parse_for_device(parser, DEFAULTS)
    if args.weigh:
        weigh(args.weigh)
    elif args.device == "cuda":
        run_gpu(args)
    else:
        run_cpu(args)


def run_cpu(args: argparse.Namespace) -> None:
    """Measure the 1B shape on the CPU, and write the result."""
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


def run_gpu(args: argparse.Namespace) -> None:
    """Measure the 7B shape on a GPU, and write the result."""
    configs = gpu_shapes(args.blocks, args.removed_frac)
    with torch.inference_mode():
        models = {name: make_model(config, "cuda") for name, (config, _) in configs.items()}
        decoded = decode_in_turns(models, args.tokens, args.rounds)
    prompted = prompts(models, args.prompt_tokens, args.rounds)
    rows = []
    for name, (config, removed_frac) in configs.items():
        rows.append({
            "model": name, "removed_frac": round(removed_frac, 4), **{key: getattr(config, key) for key in GPU_FIELDS},
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
