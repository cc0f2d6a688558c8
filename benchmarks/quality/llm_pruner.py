"""LLM-Pruner beside comp: the quality of both, and the memory that both take, measured.

    python -m benchmarks.quality.llm_pruner MODEL DATA --out benchmarks/results/quality/llm-pruner-NAME.json

Source: Ma et al. 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", written from the paper.
The loss of 10 windows of 64 tokens (also measured: 64 of 512) goes backwards through the whole model. A coupled group
is a neuron (rows of gate and up, column of down) or the heads that share a key and a value. Its importance is
Σ |w · ∂L/∂w| over its weights. The least important groups of each block go. The first eighth of the blocks and the last
sixteenth stay whole, as 4 and 2 of the 32 blocks in the paper. Nothing is tuned. Deviation: neurons make up for what
whole groups of heads remove too much or too little of the budget.

It needs all weights and all their gradients in memory, which is what COMP (arXiv 2501.15255) compares with. Each
compression runs in a process of its own. `peak_bytes` is its highest resident set, or on a GPU the most that torch
allocated; `start_bytes` that of the process before it opens the model.

Not a method of niwaki.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import niwaki
from benchmarks.common.perplexity import TEXTS, perplexities, spread
from benchmarks.common.provenance import provenance
from niwaki.config.targets import Kind, PrunableUnit
from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, load_tokenizer
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import peak_rss_bytes
from niwaki.model.prunable import PrunedShape, ShapeSpace

PUBLISHED = (10, 64)  # windows of the calibration text, and their tokens
FIRST_WHOLE, LAST_WHOLE = 4 / 32, 2 / 32  # shares of the blocks that stay as they are
MULTIPLE = 8  # of neurons that stay


def shape_of(space: ShapeSpace, removed_frac: float) -> PrunedShape:
    """Return the shape that removes at least `removed_frac` by the same share of every block that may lose groups."""
    blocks = len(space)
    first, last = math.ceil(blocks * FIRST_WHOLE), blocks - math.ceil(blocks * LAST_WHOLE)
    share = removed_frac * blocks / (last - first)
    heads = max(1, round(space.heads * (1 - share)))

    def shape(neurons: int) -> PrunedShape:
        inner = range(first, last)
        return PrunedShape(
            tuple(neurons if index in inner else space.neurons for index in range(blocks)),
            tuple(heads if index in inner else space.heads for index in range(blocks)),
        )

    counts = range(space.neurons // MULTIPLE * MULTIPLE, 0, -MULTIPLE)
    return next(made for count in counts if space.removed_frac(made := shape(count)) >= removed_frac)


def importance(block: nn.Module, unit: PrunableUnit) -> Tensor:
    """Return Σ |w · ∂L/∂w| of every group [G] over the rows of its producers and the columns of its consumer."""
    total_G = torch.zeros(unit.count, dtype=torch.float64)
    for name in (*unit.producers, unit.consumer):
        weight = block.get_submodule(name).weight
        assert weight.grad is not None
        salience_OI = (weight.detach() * weight.grad).abs()
        along = 0 if name == unit.consumer else 1
        total_G += salience_OI.double().sum(along).view(unit.count, -1).sum(1).cpu()
    return total_G


def kept_groups(model: nn.Module, path: str, space: ShapeSpace, shape: PrunedShape) -> list[dict[Kind, list[int]]]:
    """Return the most important groups of every block, by kind."""
    found: list[dict[Kind, list[int]]] = []
    for index in range(len(space)):
        block = model.get_submodule(f"{path}.{index}")
        found.append({})
        for kind, unit in space.units.items():
            order_G = importance(block, unit).argsort(descending=True, stable=True)
            found[-1][kind] = sorted(order_G[: shape.kept(kind)[index]].tolist())
    return found


def prune(model: str, out: Path, ids_ST: Tensor, target: float, device: str) -> dict[str, Any]:
    """Write `model` with zeros in the inputs of all removed groups; return its shape, its share and the peak memory."""
    decoder = Decoder(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    space = ShapeSpace(decoder.anatomy, decoder.model, decoder.checkpoint.config_content(), cuts=False)
    shape = shape_of(space, target)
    start_bytes = peak_rss_bytes()
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
    for window_1T in ids_ST.split(max(1, math.prod(PUBLISHED) // ids_ST.shape[1])):  # the published text is one batch
        ids_BT = window_1T.to(device)
        loss = whole(ids_BT, labels=ids_BT, use_cache=False).loss
        (loss * len(ids_BT) / len(ids_ST)).backward()
    kept = kept_groups(whole, decoder.path, space, shape)
    with torch.no_grad():
        for index, groups in enumerate(kept):
            for kind, unit in space.units.items():
                weight_OI = whole.get_submodule(f"{decoder.path}.{index}.{unit.consumer}").weight
                alive_G = torch.zeros(unit.count, device=device)
                alive_G[groups[kind]] = 1
                weight_OI.mul_(alive_G.repeat_interleave(weight_OI.shape[1] // unit.count))
    on_gpu = device != "cpu"
    memory = {
        "start_bytes": 0 if on_gpu else start_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_rss_bytes(),
    }
    whole.cpu().save_pretrained(out)
    load_tokenizer(model).save_pretrained(out)
    return {"removed_frac": space.removed_frac(shape), "neurons": shape.neurons, "heads": shape.heads, **memory}


def run(label: str, model: str, data: Path, target: float, seed: int, device: str, skip: bool) -> dict[str, Any]:
    """Compress by the method of `label`, and return memory, seconds and perplexities."""
    text, begin = data / "calibration.jsonl", time.perf_counter()
    samples, seq_len = (64, 512) if label.endswith("64 x 512") else PUBLISHED
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if label.startswith("llm_pruner"):
            ids_ST = calibration_windows(
                read_texts([str(text)]), load_tokenizer(model), samples=samples, seq_len=seq_len, seed=seed
            )
            found = prune(model, out, ids_ST, target, device)
        else:
            start_bytes = peak_rss_bytes()
            record = niwaki.compress(
                model, out, method="comp", target=str(target), seed=seed, device=device, dtype="float32",
                options={"learn_rounds": 0},
                calibration={"files": (str(text),), "samples": samples, "seq_len": seq_len},
            )  # fmt: skip
            on_gpu, allocation = device != "cpu", record["allocation"]
            found = {
                "removed_frac": allocation["removed_frac"], **allocation["shape"],
                "start_bytes": 0 if on_gpu else start_bytes,
                "peak_bytes": record["peak_device_bytes" if on_gpu else "peak_rss_bytes"],
            }  # fmt: skip
        found["seconds"] = round(time.perf_counter() - begin, 1)
        return {"seed": seed, **found} | ({} if skip else perplexities(out, data, device))


def main() -> None:
    """Measure every method, target and seed, and write the result after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--memory-only", action="store_true", help="do not measure the quality")
    labels = ("llm_pruner", "llm_pruner, 64 x 512", "comp", "comp, 64 x 512")
    parser.add_argument("--labels", nargs="+", choices=labels, default=labels)
    args = parser.parse_args()
    dense = {} if args.memory_only else perplexities(args.model, args.data, args.device)["perplexity"]
    about = {"model": Path(args.model).name, **provenance(args.device), "dense": dense}
    about["float32_bytes"] = 4 * sum(math.prod(info.shape) for info in Checkpoint.open(args.model).tensors.values())
    rows: list[dict[str, Any]] = []
    for target in args.targets:
        for label in args.labels:
            rows.append({"label": label, "target": str(target), "runs": []})
            for seed in range(args.seeds):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    given = (label, args.model, args.data, target, seed, args.device, args.memory_only)
                    rows[-1]["runs"].append(pool.apply(run, given))
                runs = rows[-1]["runs"]
                if not args.memory_only:
                    rows[-1] |= {name: spread([run["perplexity"][name] for run in runs]) for name in TEXTS}
                print(label, target, {k: v for k, v in runs[-1].items() if k not in ("neurons", "heads")}, flush=True)
                args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
