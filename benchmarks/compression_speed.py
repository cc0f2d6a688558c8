"""Seconds and peak memory of compressing a Llama-2-7B-shaped checkpoint, as a multiple of the floor.

    python benchmarks/compression_speed.py --out benchmarks/results/compression-speed.json --work /tmp/work

Random bf16 weights (normal, std 0.02) are made on the machine; calibration is 128 windows of 2048 tokens. The
floor is computed from the operations of each method and the matrix rate measured in the same run. `--blocks`
below 32 times that many and labels the result so.
"""

import argparse
import datetime
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from safetensors.torch import save_file

import niwaki
from niwaki.demo import sapling
from niwaki.methods import besa, wandapp

HIDDEN, MIDDLE, HEADS, VOCABULARY, BLOCKS = 4096, 11008, 32, 32000, 32
BLOCK_WEIGHTS = 4 * HIDDEN**2 + 3 * HIDDEN * MIDDLE


def make_checkpoint(folder: Path, blocks: int, device: str) -> None:
    """A sharded random checkpoint with the sapling's tokenizer (its ids all lie inside the vocabulary)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=blocks, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16", bos_token_id=0, eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()

    weight_map = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        shard = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN), "mlp.down_proj": (HIDDEN, MIDDLE),
    }
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(index + 1, tensors | {f"{prefix}{n}.weight": ones.clone() for n in norms})
    save(blocks + 1, {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "lm_head.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": ones.clone(),
    })
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def matrix_rate(device: str) -> float:
    """FLOP/s of a large bf16 (CUDA) or float32 (CPU) product on random data."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def floor_seconds(method: str, blocks: int, samples: int, seq_len: int, rate: float) -> float:
    """Operations that cannot be avoided over the measured matrix rate.

    Two forwards (statistics, propagation); for sparsegpt also four Gram matrices (lower triangles), their
    factors and the sweeps, the last two in float32 at an assumed eighth of the matrix rate; for the learning
    methods three forwards for every window learned from (wandapp also for every window's regional gradient).
    """
    tokens = samples * seq_len
    forward = 2 * BLOCK_WEIGHTS * tokens + 2 * samples * seq_len**2 * HIDDEN
    operations = 2 * forward
    if method == "wandapp":
        learned = wandapp.Config()
        operations += 3 * forward * (1 + learned.rounds * learned.samples / samples)
    if method == "besa":
        operations += 3 * forward * besa.Config().steps * besa.Config().batch / samples
    if method == "sparsegpt":
        operations += tokens * (3 * HIDDEN**2 + MIDDLE**2)
        operations += 8 * 2 / 3 * (3 * HIDDEN**3 + MIDDLE**3)
        operations += 8 * ((4 * HIDDEN + 2 * MIDDLE) * HIDDEN**2 + HIDDEN * MIDDLE**2)
    return blocks * operations / rate


def profile(model: Path, out: Path, case: dict) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        niwaki.compress(model, out, overwrite=True, **case)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", default=["wanda/0.5", "wanda/2:4", "sparsegpt/0.5", "sparsegpt/2:4"])
    parser.add_argument("--profile", action="store_true", help="print a kernel table for each case instead")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    make_checkpoint(args.work / "model", args.blocks, args.device)
    made_s = time.perf_counter() - begin
    text = args.work / "calibration.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for _ in range(4) for name in sorted(topics)))
    rate = matrix_rate(args.device)
    print(f"checkpoint made in {made_s:.0f} s; matrix rate {rate / 1e12:.1f} TFLOP/s", flush=True)
    rows = []
    for name in args.cases:
        method, target = name.split("/")
        case = {
            "method": method, "target": target, "device": args.device,
            "calibration": {"files": (str(text),), "samples": args.samples, "seq_len": args.seq_len},
        }
        if args.profile:
            profile(args.work / "model", args.work / "out", case)
            continue
        record = niwaki.compress(args.work / "model", args.work / "out", overwrite=True, **case)
        floor_s = floor_seconds(method, args.blocks, args.samples, args.seq_len, rate)
        rows.append({
            "method": method, "target": target, "seconds": record["seconds"], "floor_s": round(floor_s, 2),
            "multiple_of_floor": round(record["seconds"] / floor_s, 2),
            "peak_device_gb": round(record["peak_device_bytes"] / 1e9, 2),
            "zeros_frac": record["result"]["zeros_frac"],
        })
        print(rows[-1], flush=True)
    if args.profile:
        return
    on_gpu = args.device == "cuda"
    result = {
        "what": f"compressing {args.blocks} of {BLOCKS} blocks of the Llama-2-7B shape, random bf16 weights, "
        f"{args.samples}×{args.seq_len} tokens, wall seconds from opening the checkpoint to the closed result",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "matrix_rate_tflops": round(rate / 1e12, 1),
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()
        },
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
