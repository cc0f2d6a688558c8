"""Sizes of pruned and packed models, in the file and in memory, as a share of the bf16 weights of the decoder.

MODEL is compressed once per line of RESULTS with `--pack auto`. Bytes are those of the tensors of the blocks. Headers
give those of the file. The state dict gives those in memory, after transformers loaded the model in bfloat16.
Embeddings and head do not count, norms do. Shares hardly depend on the text: a few windows of DATA/calibration.jsonl
are enough.

    python -m benchmarks.speed.sparse_sizes MODEL DATA --out benchmarks/results/speed/sparse-sizes.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.model.checkpoint import Checkpoint

# The promise of every line: at most this share of the bf16 bytes, in the file and in memory.
RESULTS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "50 % bitmap": ("magnitude", "0.5", {}, 0.57),
    "2:4": ("magnitude", "2:4", {}, 0.57),
    "2:4 + 4 bit": ("sparsegpt+gptq", "2:4+4bit", {}, 0.20),
    "50 % + 4 bit": ("sparsegpt+gptq", "0.5+4bit", {}, 0.21),
    "2:4 + 8 bit": ("sparsegpt+gptq", "2:4+8bit", {}, 0.33),
}


def block_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of blocks in the files of `folder`, from their headers."""
    total = 0
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if ".layers." in name:
                first, last = about["data_offsets"]
                total += last - first
    return total


def memory_bytes(folder: Path) -> int:
    """Return the bytes of all tensors of blocks in the state dict of the loaded model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if ".layers." in name)


def sizes(model: Path, calibration: dict[str, Any], out: Path) -> dict[str, dict[str, Any]]:
    """Return by line of RESULTS: bytes in file and memory, shares of bf16, true bits, and the promised share."""
    tensors = Checkpoint.open(model).tensors
    dense = 2 * sum(torch.Size(tensor.shape).numel() for name, tensor in tensors.items() if ".layers." in name)
    found: dict[str, dict[str, Any]] = {"dense, bf16": {"file_bytes": dense}}
    for number, (name, (method, target, options, most)) in enumerate(RESULTS.items()):
        folder = out / str(number)
        record = niwaki.compress(
            model, folder, method=method, target=target, options=options, pack="auto", device="cpu",
            calibration=calibration,
        )  # fmt: skip
        in_file, in_memory = block_bytes(folder), memory_bytes(folder)
        found[name] = {
            "method": method,
            "target": target,
            "stored_as": record["result"]["sparse"],
            "bits": record["result"]["bits"],
            "zeros_frac": record["result"]["zeros_frac"],
            "file_bytes": in_file,
            "file_share": round(in_file / dense, 5),
            "memory_bytes": in_memory,
            "memory_share": round(in_memory / dense, 5),
            "promised_share": most,
        }
        print(f"{name}: file {in_file / dense:.4f}, memory {in_memory / dense:.4f}, at most {most}", flush=True)
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="a folder with calibration.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    calibration = {
        "files": (str(given.data / "calibration.jsonl"),), "samples": given.samples, "seq_len": given.seq_len,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = sizes(given.model, calibration, Path(folder))
    about = {"what": "bytes of the tensors of all blocks, and their share of bf16", "model": given.model.name}
    found = about | provenance("cpu") | {"samples": given.samples, "seq_len": given.seq_len, "seed": 0, "rows": rows}
    given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
