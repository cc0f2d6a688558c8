"""A whole 1B-shaped Llama on the CPU, dense bf16 against packed: speed of decoding, memory, bytes of the file.

    python -m benchmarks.speed.packed_decode --out benchmarks/results/speed/packed-decode-cpu.json \\
        --work /tmp/work [--threads 1 2]

TinyLlama-1.1B's shape with random weights, rounded to nearest in the layouts of `squeeze10`: `1.6 bit` has 20 % of the
columns at 4 bits and the rest at 1, `auto` 60 % at 2 bits and the rest at 1. Checkpoints are written to WORK and loaded
as a user loads them. Greedy decoding of 64 tokens with a key-value cache, all models in turns in one process, prompts
not timed; medians over the rounds. Memory is VmRSS minus that before loading, each model alone in a fresh process;
files are mapped, so it is taken after a few tokens (`decoding`) and once every weight has been read (`weights`).
With fewer `--blocks` than the shape has, the result says so.
"""

import argparse
import gc
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import niwaki  # noqa: F401  (teaches transformers the packed format)
from benchmarks.common.provenance import provenance
from benchmarks.speed.compression_speed import Shape, make_checkpoint
from niwaki.compression.embeddings import round_rows
from niwaki.formats.record import Packed, PackedTensors
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import INDEX, quantization, quantized_config
from niwaki.runtime.linear import PackedLinear

SHAPE = Shape("TinyLlama-1.1B", 2048, 5632, 32, 4, 22)
LAYOUTS = {"1.6 bit": (4, 0.2), "auto": (2, 0.6)}  # bits and share of the salient columns; the others have one bit
ENDS = ("model.embed_tokens", "lm_head")
ENDS_BITS, ENDS_GROUP = 4, 128
PROMPT_TOKENS = 8


def pack_matrix(weight_OI: torch.Tensor, salient_bits: int, salient_frac: float, seed: int) -> Packed:
    """Salient columns, chosen at random, before the others; one scale a row each."""
    columns = weight_OI.shape[1]
    count = round(salient_frac * columns / 8) * 8
    order_I = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    order_I = torch.cat([order_I[:count].sort().values, order_I[count:].sort().values])
    groups = groups_of(0, count, salient_bits, "midrise", 0) + groups_of(count, columns, 1, "free", 0)
    return Packed.codes(nearest(weight_OI[:, order_I].float(), groups, clip=False).storable().parts(order_I))


def pack_checkpoint(dense: Path, folder: Path, layout: str, ends: bool) -> None:
    """The checkpoint `dense` with its matrices as codes, shard by shard."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    modules: dict[str, Any] = {}
    for number, path in enumerate(sorted(dense.glob("*.safetensors"))):
        tensors = load_file(path)
        for module in [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2]:
            if module in ENDS:
                if not ends:
                    continue
                part, _ = round_rows(tensors[f"{module}.weight"], ENDS_BITS, ENDS_GROUP, torch.device("cpu"))
                shape = tensors.pop(f"{module}.weight").shape
                packed = PackedTensors.of_codes([part], shape)
            else:
                packed = pack_matrix(tensors.pop(f"{module}.weight"), *LAYOUTS[layout], seed=number).packed_codes()
            modules[module] = packed.description
            tensors |= {f"{module}.{name}": tensor for name, tensor in packed.tensors.items()}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (folder / "config.json").write_text(quantized_config(dense, quantization(modules, {})))


def load(folder: Path) -> Any:
    """As a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def decode(model: Any, tokens: int, begun: Callable[[], None] = lambda: None) -> float:
    """Seconds of decoding `tokens` greedily after a short prompt; `begun` is called between the two."""
    out = model(torch.arange(1, PROMPT_TOKENS + 1)[None], use_cache=True)
    begun()
    begin = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - begin


def resident_bytes() -> int:
    """VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def weigh(folder: Path) -> None:
    """Prints the resident bytes that loading and a few tokens add, and those once every weight has been read."""
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64,
    ))
    importlib.import_module("niwaki.runtime.quantizer")
    before = resident_bytes()
    model = load(folder)
    decode(model, 4)
    gc.collect()
    decoding = resident_bytes()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).amax()
    print(json.dumps({"decoding_rss_bytes": decoding - before, "weights_rss_bytes": resident_bytes() - before}))


def prepare(work: Path, blocks: int) -> dict[str, Path]:
    """The checkpoints by name, the dense one first; those of an earlier run are kept."""
    folders = {"dense bf16": work / f"dense-{blocks}"}
    for layout in LAYOUTS:
        for ends in (False, True):
            name = f"{layout}{', 4-bit ends' if ends else ''}"
            folders[name] = work / f"{name.replace(' ', '-').replace(',', '')}-{blocks}"
    if not (folders["dense bf16"] / INDEX).is_file():
        make_checkpoint(folders["dense bf16"], blocks, "cpu", SHAPE)
    for name, folder in list(folders.items())[1:]:
        if not (folder / INDEX).is_file():
            print("packing", name, flush=True)
            pack_checkpoint(folders["dense bf16"], folder, name.split(",")[0], "," in name)
    return folders


def profile(model: Any, tokens: int) -> dict[str, float]:
    """Milliseconds a token of the matrices (packed or dense), the look-up and all else, timed in the modules."""
    spent = dict.fromkeys(("matrices", "embeddings"), 0.0)
    for module in model.modules():
        kind = "embeddings" if isinstance(module, torch.nn.Embedding) else "matrices"
        if isinstance(module, torch.nn.Embedding | torch.nn.Linear | PackedLinear):
            module.forward = _timed(module.forward, kind, spent)
    seconds = decode(model, tokens, begun=lambda: spent.update(dict.fromkeys(spent, 0.0)))
    for module in model.modules():
        vars(module).pop("forward", None)
    found = {kind: round(1e3 * value / tokens, 2) for kind, value in spent.items()}
    return found | {"rest": round(1e3 * (seconds - sum(spent.values())) / tokens, 2)}


def _timed(forward: Callable[[torch.Tensor], torch.Tensor], kind: str, spent: dict[str, float]) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        out = forward(x)
        spent[kind] += time.perf_counter() - begin
        return out

    return run


def measure(folders: dict[str, Path], threads: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Speed of every model with each number of threads, the models taking turns."""
    models = {name: load(folder) for name, folder in folders.items()}
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds + 1):  # the first round warms up
            for name, model in models.items():
                seconds = decode(model, tokens if number else 4)
                if number:
                    times[name].append(seconds)
        speeds = {name: tokens / statistics.median(found) for name, found in times.items()}
        for name, model in models.items():
            rows.append({
                "model": name, "threads": count, "tokens_per_s": round(speeds[name], 2),
                "speedup": round(speeds[name] / speeds["dense bf16"], 2),
                "ms_a_token": profile(model, min(tokens, 16)),
            })
            print(rows[-1], flush=True)
    return rows


def sizes(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Bytes of the weight files, and resident bytes of each model alone in a process."""
    rows: list[dict[str, Any]] = []
    for name, folder in folders.items():
        command = [sys.executable, "-m", "benchmarks.speed.packed_decode", "--weigh", str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows.append({"model": name, "file_bytes": file_bytes, **found})
        for what in ("file", "decoding_rss", "weights_rss"):
            rows[-1][f"{what}_share"] = round(rows[-1][f"{what}_bytes"] / rows[0][f"{what}_bytes"], 3)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--blocks", type=int, default=SHAPE.blocks)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weigh", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if args.weigh is not None:
        weigh(args.weigh)
        return
    if args.out is None or args.work is None:
        parser.error("--out FILE and --work FOLDER are required")
    folders = prepare(args.work, args.blocks)
    result = {
        "what": f"{SHAPE.name}'s shape, random weights: greedy decoding of {args.tokens} tokens, models in turns, "
        "medians; VmRSS beyond that before loading, alone in a process, after a few tokens and all weights read",
        **provenance("cpu"),
        "blocks": args.blocks,
        "blocks_of_shape": SHAPE.blocks,
        "sizes": sizes(folders),
        "speed": measure(folders, args.threads, args.tokens, args.rounds),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
