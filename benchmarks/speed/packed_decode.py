"""A whole decoder, dense bf16 against packed: speed of decoding, and on a CPU also memory and bytes of the file.

    python -m benchmarks.speed.packed_decode --out benchmarks/results/speed/packed-decode-cpu.json \\
        --work /tmp/work [--threads 1 2]
    python -m benchmarks.speed.packed_decode --device cuda --out benchmarks/results/speed/packed-decode-h100.json

CPU: TinyLlama-1.1B's shape with random weights, rounded to nearest in the layouts of `squeeze10`. `1.6 bit` has 20 % of
the columns at 4 bits and the rest at 1. `auto` has 60 % at 2 bits and the rest at 1. Checkpoints are written to WORK
and loaded as a user loads them. All models decode 64 tokens greedily with a key-value cache, in turns in one process.
Prompts are not timed. Times are medians over the rounds. Memory is VmRSS minus that before loading, each model alone in
a fresh process. Files are mapped, so it is taken after a few tokens (`decoding`) and after a read of every weight
(`weights`).

GPU: Llama-2-7B's shape with random weights, made on the device. Blocks, norms and rotary embeddings are those of
transformers. A step (embeddings, blocks, head in bf16, the largest logit as the next token) is one CUDA graph. The
models take turns in one run.

With fewer `--blocks` than the shape has, the result says so.
"""

import argparse
import copy
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
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import niwaki  # noqa: F401  (teaches transformers the packed format)
from benchmarks.common.checkpoints import Shape, make_checkpoint
from benchmarks.common.cpu_timing import resident_bytes
from benchmarks.common.decoders import decode
from benchmarks.common.devices import add_device, parse_for_device
from benchmarks.common.gpu_decoding import decode_in_turns, make_model, weight_bytes
from benchmarks.common.provenance import provenance
from benchmarks.common.random_layers import LAYERS, random_layer
from niwaki.compression.embeddings import round_rows
from niwaki.formats.packed import Packed, PackedTensors
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import quantization, quantized_config
from niwaki.model.shards import INDEX
from niwaki.runtime.linear import PackedLinear

SHAPE = Shape("TinyLlama-1.1B", 2048, 5632, 32, 4, 22)
GPU_SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
DEFAULTS = {
    "cpu": {"blocks": SHAPE.blocks, "tokens": 64, "rounds": 5},
    "cuda": {"blocks": 32, "tokens": 128, "rounds": 6},
}
LAYOUTS = {"1.6 bit": (4, 0.2), "auto": (2, 0.6)}  # bits and share of the salient columns; the others have one bit
ENDS = ("model.embed_tokens", "lm_head")
ENDS_BITS, ENDS_GROUP = 4, 128


def pack_matrix(weight_OI: torch.Tensor, salient_bits: int, salient_frac: float, seed: int) -> Packed:
    """Round a matrix: salient columns, chosen at random, before the others, one scale per row each."""
    columns = weight_OI.shape[1]
    count = round(salient_frac * columns / 8) * 8
    order_I = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    order_I = torch.cat([order_I[:count].sort().values, order_I[count:].sort().values])
    groups = groups_of(0, count, salient_bits, "midrise", 0) + groups_of(count, columns, 1, "free", 0)
    return Packed.codes(nearest(weight_OI[:, order_I].float(), groups, clip=False).storable().parts(order_I))


def pack_checkpoint(dense: Path, folder: Path, layout: str, ends: bool) -> None:
    """Write the checkpoint `dense` with its matrices as codes, shard by shard."""
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
    """Load a model as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def weigh(folder: Path) -> None:
    """Print the resident bytes that loading and a few tokens add, and those after a read of every weight."""
    AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=64,
        )
    )
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
    """Return the checkpoints by name, the dense one first. Those of an earlier run are kept."""
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
    """Return the milliseconds per token of the matrices, the look-up and the rest, timed in the modules."""
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
    """Return the speed of every model per number of threads. The models take turns."""
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
            rows.append(
                {
                    "model": name,
                    "threads": count,
                    "tokens_per_s": round(speeds[name], 2),
                    "speedup": round(speeds[name] / speeds["dense bf16"], 2),
                    "ms_a_token": profile(model, min(tokens, 16)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def sizes(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Return bytes of the weight files, and resident bytes of each model alone in a process."""
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


def with_packed_blocks(model: LlamaForCausalLM, layer: str, device: str) -> LlamaForCausalLM:
    """Return the model with random packed layers in its blocks. Embeddings, norms and head are shared."""
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


def main() -> None:
    """Measure on the chosen device, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--out", type=Path, help="required on a CPU")
    parser.add_argument("--work", type=Path, help="folder of checkpoints, required on a CPU")
    parser.add_argument("--blocks", type=int, help="default: 22, on a GPU 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU only")
    parser.add_argument("--tokens", type=int, help="default: 64, on a GPU 128")
    parser.add_argument("--rounds", type=int, help="default: 5, on a GPU 6 with the one that warms up")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, help="GPU only")
    parser.add_argument("--weigh", type=Path, help=argparse.SUPPRESS)
    args = parse_for_device(parser, DEFAULTS)
    if args.device == "cuda":
        run_gpu(args)
        return
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


def run_gpu(args: argparse.Namespace) -> None:
    """Measure decoding on a GPU, and write the result."""
    config = LlamaConfig(num_hidden_layers=args.blocks, attn_implementation="sdpa", dtype="bfloat16", **GPU_SHAPE)
    with torch.inference_mode():
        models = {"dense": make_model(config, "cuda")}
        models |= {layer: with_packed_blocks(models["dense"], layer, "cuda") for layer in args.layers}
        seconds = decode_in_turns(models, args.tokens, args.rounds)
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
