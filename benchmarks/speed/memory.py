"""Peak memory of compressing on the CPU: it must not grow with depth, and a 7B shape must fit a small machine.

    python -m benchmarks.speed.memory --out benchmarks/results/speed/memory-cpu.json \\
        --work /tmp/work [--seven-b-blocks 32]
    python -m benchmarks.speed.memory --out … --work … --depth-methods comp --method comp --seven-b-blocks 3

Every compression is a process of its own. Its run.json has the peak RSS. Weights are random.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from benchmarks.common.checkpoints import make_checkpoint, write_topics
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling


def compress(model: Path, out: Path, text: Path, samples: int, seq_len: int, method: str, target: str) -> dict:
    """Run the command line and return run.json."""
    command = [
        sys.executable,
        "-m",
        "niwaki.cli",
        "compress",
        str(model),
        str(out),
        "--method",
        method,
        "--target",
        target,
        "--calibration",
        str(text),
        "--samples",
        str(samples),
        "--seq-len",
        str(seq_len),
        "--device",
        "cpu",
        "--overwrite",
    ]
    subprocess.run(command, check=True)
    record = json.loads((out / "niwaki/run.json").read_text())
    shutil.rmtree(out)
    return record


def deep_model(folder: Path, blocks: int) -> None:
    """Write a bf16 Llama of 1024 × `blocks` with the sapling's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        vocab_size=4096,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)


def main() -> None:
    """Measure depths and the 7B shape, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seven-b-blocks", type=int, default=32)
    parser.add_argument("--depth-methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--method", default="wanda", help="of the 7B shape")
    parser.add_argument("--target", default="0.5")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "text.jsonl"
    write_topics(text)
    depths = []
    for method in args.depth_methods:
        for blocks in (6, 24):
            model = args.work / f"deep-{blocks}"
            if not model.exists():
                deep_model(model, blocks)
            record = compress(model, args.work / "out", text, 8, 256, method, args.target)
            row = {"method": method, "blocks": blocks, "peak_rss_gb": round(record["peak_rss_bytes"] / 1e9, 3)}
            depths.append(row)
            print(row, flush=True)
    model = args.work / "seven-b"
    make_checkpoint(model, args.seven_b_blocks, "cpu")
    record = compress(model, args.work / "out", text, 8, 256, args.method, args.target)
    shutil.rmtree(model)
    seven_b = {
        "blocks": args.seven_b_blocks,
        "checkpoint_gb": round(record["model"]["bytes"] / 1e9, 2),
        "tokens": 8 * 256,
        "peak_rss_gb": round(record["peak_rss_bytes"] / 1e9, 2),
        "seconds": record["seconds"],
    }
    print(seven_b, flush=True)
    result = {
        "what": "peak RSS of `niwaki compress --device cpu`; deep models are 1024 wide, 8×256 tokens; "
        "the Llama-2-7B shape takes 8×256 tokens with " + args.method,
        **provenance("cpu"),
        "threads": torch.get_num_threads(),
        "depth": depths,
        "llama_2_7b_shape": seven_b,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
