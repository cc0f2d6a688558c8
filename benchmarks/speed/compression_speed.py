"""Seconds and peak memory of compressing a Llama-2-shaped checkpoint, as a multiple of the floor.

    python -m benchmarks.speed.compression_speed --out benchmarks/results/speed/compression-speed.json --work /tmp/work

Random bf16 weights (normal, std 0.02) are made on the machine. Calibration is 128 windows of 2048 tokens. The floor is
computed from the operations of each method and the matrix rate measured in the same run. With fewer `--blocks` than
the shape has, only these are timed and the result says so. The seconds per block allow extrapolation.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

import niwaki
from benchmarks.common.checkpoints import SHAPES, Shape, make_checkpoint, write_topics
from benchmarks.common.provenance import provenance
from niwaki.config.presets import PRESETS
from niwaki.config.recipe import make_recipe
from niwaki.config.targets import parse_target
from niwaki.methods.registry import make_steps, merged_needs


def matrix_rate(device: str) -> float:
    """Return the FLOP/s of a large bf16 (CUDA) or float32 (CPU) product on random data."""
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


def floor_seconds(case: dict, shape: Shape, blocks: int, rate: float) -> float:
    """Return the seconds of the operations that cannot be avoided, at the measured matrix rate.

    Every case has two forwards (statistics, propagation), and one more for a dense stream. Every window of learning
    and every regional gradient costs three. Methods that need Gram matrices add these (lower triangles), their
    factors and the sweeps. The last two are in float32, at an assumed eighth of the matrix rate.
    """
    samples, seq_len = case["calibration"]["samples"], case["calibration"]["seq_len"]
    tokens = samples * seq_len
    recipe = make_recipe(case)
    steps = make_steps(recipe.method, recipe.options, parse_target(recipe.target))
    window = 2 * shape.block_weights * seq_len + 2 * seq_len**2 * shape.hidden
    needs = merged_needs(steps)
    operations = (3 if needs.dense else 2) * samples * window
    for number, step in enumerate(steps):
        if step.name == "wandapp":
            gradients = samples if number == 0 and step.config.alpha else 0
            operations += 3 * window * (gradients + step.config.rounds * step.config.samples)
        if step.name == "besa":
            operations += 3 * window * step.config.steps * step.config.batch
    if needs.gram:
        operations += tokens * (3 * shape.hidden**2 + shape.middle**2)
        operations += 8 * 2 / 3 * (3 * shape.hidden**3 + shape.middle**3)
        operations += 8 * sum(rows * columns**2 for rows, columns in shape.matrices.values())
    return blocks * operations / rate


def profile(model: Path, out: Path, case: dict) -> None:
    """Print the kernels of one compression by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        niwaki.compress(model, out, overwrite=True, **case)
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=60))


def _block_seconds(out: Path) -> tuple[float, float]:
    """Return medians over the blocks, from the event log: compressing one, and scanning one before (or 0)."""
    events = [json.loads(line) for line in (out / "niwaki/events.jsonl").read_text().splitlines()]
    scans = [event["time"] for event in events if event["event"] == "scan"]
    scanned = [late - early for early, late in pairwise(scans)]
    block = statistics.median(event["seconds"] for event in events if event["event"] == "block")
    return block, statistics.median(scanned) if scanned else 0.0


def main() -> None:
    """Measure every case, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--blocks", type=int, help="default: all of the shape")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    cases = ["wanda/0.5", "wanda/2:4", "sparsegpt/0.5", "sparsegpt/2:4"]
    parser.add_argument("--cases", nargs="+", metavar="METHOD[:OPTION=NUMBER,…]/TARGET", default=cases)
    parser.add_argument("--device-gb", type=float, help="of the GPU, at most: what does not fit fails")
    parser.add_argument("--profile", action="store_true", help="print a kernel table for each case instead")
    args = parser.parse_args()
    if args.device_gb:
        share = args.device_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    shape = SHAPES[args.shape]
    blocks = args.blocks or shape.blocks
    args.work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    make_checkpoint(args.work / "model", blocks, args.device, shape)
    made_s = time.perf_counter() - begin
    text = args.work / "calibration.jsonl"
    write_topics(text, times=4)
    rate = matrix_rate(args.device)
    print(f"checkpoint made in {made_s:.0f} s; matrix rate {rate / 1e12:.1f} TFLOP/s", flush=True)
    rows = []
    for name in args.cases:
        method, target = name.split("/")
        method, _, given = method.partition(":")
        pairs = dict(pair.split("=") for pair in given.split(",") if pair)
        options = {key: int(value) if value.isdigit() else float(value) for key, value in pairs.items()}
        named = {"preset": method} if method in PRESETS else {"method": method}
        case = named | {"options": options} if options else named
        case = case | {
            "target": target,
            "device": args.device,
            "calibration": {"files": (str(text),), "samples": args.samples, "seq_len": args.seq_len},
        }
        if args.profile:
            profile(args.work / "model", args.work / "out", case)
            continue
        record = niwaki.compress(args.work / "model", args.work / "out", overwrite=True, **case)
        block_s, scan_s = _block_seconds(args.work / "out")
        floor_s = floor_seconds(case, shape, blocks, rate)
        rows.append(
            {
                "method": method,
                "options": options,
                "target": target,
                "seconds": record["seconds"],
                "floor_s": round(floor_s, 2),
                "median_block_s": block_s,
                "median_scan_s": round(scan_s, 3),
                "extrapolated_s": round(record["seconds"] + (block_s + scan_s) * (shape.blocks - blocks), 1),
                "multiple_of_floor": round(record["seconds"] / floor_s, 2),
                "block_multiple": round((block_s + scan_s) * blocks / floor_s, 2),
                "peak_device_gb": round(record["peak_device_bytes"] / 1e9, 2),
                "zeros_frac": record["result"]["zeros_frac"],
            }
        )
        print(rows[-1], flush=True)
    if args.profile:
        return
    result = {
        "what": f"compressing {blocks} of {shape.blocks} blocks of the {shape.name} shape, random bf16 weights, "
        f"{args.samples}×{args.seq_len} tokens, wall seconds from opening the checkpoint to the closed result",
        **provenance(args.device),
        "device_gb_at_most": args.device_gb,
        "matrix_rate_tflops": round(rate / 1e12, 1),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
