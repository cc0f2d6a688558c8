"""Real inputs on a real model: each kind that people bring, against transformers, or against the text it stands for.

    python -m benchmarks.quality.real_inputs MODEL DATA --out benchmarks/results/quality/real-inputs-NAME.json

DATA holds calibration.jsonl, eval_reviews.jsonl, wikitext2_test.txt and the folder tasks. `--gguf FILE` is the same
model as one GGUF file. Arithmetic is float32. Each row has what was expected and what was measured.
The model and the texts are not part of this repository.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import niwaki
from benchmarks.common.perplexity import TEXTS
from benchmarks.common.provenance import provenance
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer

WINDOW = 512


class World:
    """Inputs of a run: the model, the texts, the device and the sizes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.model, self.data, self.device, self.folder = Path(args.model), args.data, args.device, folder
        self.tokens, self.samples, self.gguf = args.tokens, args.samples, args.gguf
        self.calibration = {"files": [str(self.data / "calibration.jsonl")], "samples": self.samples, "seq_len": WINDOW}

    def text(self) -> str:
        """Return the evaluation text."""
        return str(self.data / TEXTS["wikitext2"])

    def perplexity(self, model: str | Path, **options: Any) -> float:
        """Return the perplexity by niwaki."""
        scores = niwaki.evaluate(
            model, data=self.text(), seq_len=WINDOW, max_tokens=self.tokens, device=self.device, dtype="float32",
            **options,
        )  # fmt: skip
        return next(iter(scores["perplexity"].values()))

    def expected(self, folder: Path) -> float:
        """Return the perplexity by plain transformers on the same windows."""
        from transformers import AutoModelForCausalLM

        windows_ST = evaluation_windows(
            read_texts([self.text()]), load_tokenizer(folder), seq_len=WINDOW, max_tokens=self.tokens
        ).to(self.device)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        losses = []
        with torch.no_grad():
            for ids_T in windows_ST:
                logits = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
                losses.append(torch.nn.functional.cross_entropy(logits, ids_T[1:]).item())
        return math.exp(sum(losses) / len(losses))

    def compress(self, model: str | Path, name: str, method: str, target: str, **options: Any) -> tuple[Path, dict]:
        """Compress `model` and return the folder and its record."""
        given: dict[str, Any] = {"calibration": self.calibration, "device": self.device, "overwrite": True}
        record = niwaki.compress(model, self.folder / name, method=method, target=target, **given | options)
        return self.folder / name, record

    def copy(self, name: str, **tensors: torch.Tensor) -> Path:
        """Return a copy of the model folder with more tensors in its file."""
        folder = self.folder / name
        shutil.copytree(self.model, folder)
        (file,) = folder.glob("*.safetensors")
        save_file(load_file(file) | tensors, file, {"format": "pt"})
        return folder


def both(world: World, folder: Path) -> dict[str, Any]:
    """Return the perplexities of transformers and of niwaki."""
    return {"expected": world.expected(folder), "got": world.perplexity(folder)}


def dense(world: World) -> dict[str, Any]:
    """Evaluate the model as it is."""
    return both(world, world.model)


def own_head(world: World) -> dict[str, Any]:
    """Give a tied model a head of its own."""
    tensors = load_file(next(world.model.glob("*.safetensors")))
    return both(world, world.copy("own-head", **{"lm_head.weight": tensors["model.embed_tokens.weight"] * 1.25}))


def adapter(world: World) -> dict[str, Any]:
    """Merge an adapter that lies beside the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = world.copy("adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(plain, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(folder)
    try:
        world.perplexity(folder)
        refusal = ""
    except niwaki.CheckpointError as error:
        refusal = str(error)
    out, record = world.compress(
        folder, "adapter-out", "rtn", "8bit", merge_adapter=True, options={"group": 32}, calibration=()
    )
    return {"expected": world.expected(folder), "got": world.perplexity(out), "refusal": refusal,
            "recorded": record["model"].get("adapter"), "note": "rtn 8 bit of the merged model"}  # fmt: skip


def unread(world: World) -> dict[str, Any]:
    """Carry a layer beyond num_hidden_layers through a compression."""
    tensors = load_file(next(world.model.glob("*.safetensors")))
    last = max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    prefix = f"model.layers.{last}."
    more = {n.replace(prefix, f"model.layers.{last + 1}."): t + 1 for n, t in tensors.items() if n.startswith(prefix)}
    out, _ = world.compress(world.copy("unread", **more), "unread-out", "magnitude", "0.5")
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {"expected": len(more), "got": sum(torch.equal(found[name], t) for name, t in more.items() if name in found)}


def dialogues(world: World) -> dict[str, Any]:
    """Calibrate and evaluate on dialogues, written by the template of the model."""
    path, bad = world.folder / "chat.jsonl", ['{"messages": null}', "not json", '{"messages": [{"role": 1}]}']
    rows = []
    for text in read_texts([str(world.data / "calibration.jsonl")])[:4000]:
        question, _, answer = text.partition(". ")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or question}]
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join([*bad, *rows]) + "\n")
    own = {**world.calibration, "files": [str(path)], "samples": min(world.samples, 16)}
    out, record = world.compress(world.model, "chat-out", "wanda", "0.5", calibration=own)
    scores = niwaki.evaluate(
        out, reference=world.model, data=str(path), seq_len=WINDOW, max_tokens=world.tokens, device=world.device
    )
    return {"expected": len(bad), "got": sum(scores["skipped"][str(path)].values()), "perplexity": scores["perplexity"],
            "reference_perplexity": scores["reference_perplexity"],
            "calibration": record["calibration"]}  # fmt: skip


def one_long_text(world: World) -> dict[str, Any]:
    """Read calibration windows from one text of 512 MB."""
    path, whole = world.folder / "long.txt", "\n".join(read_texts([str(world.data / "calibration.jsonl")]))
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < 2**29:
            file.write(whole)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    world.compress(world.model, "long-out", "wanda", "0.5", calibration={**world.calibration, "files": [str(path)]})
    seconds = time.perf_counter() - started
    after, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    world.compress(world.model, "short-out", "wanda", "0.5")
    return {"expected": time.perf_counter() - started, "got": seconds, "peak_rss_rise_bytes": 1024 * (after - before),
            "file_bytes": path.stat().st_size}  # fmt: skip


def gguf(world: World) -> dict[str, Any]:
    """Evaluate the GGUF file of the model, and compress it."""
    if world.gguf is None:
        return {"not_run": "no --gguf FILE"}
    out, record = world.compress(world.gguf, "gguf-out", "rtn", "8bit", options={"group": 32}, calibration=())
    return {"expected": world.perplexity(world.model), "got": world.perplexity(world.gguf),
            "rtn_8bit": world.perplexity(out), "recorded": record["model"]}  # fmt: skip


def packed(world: World) -> dict[str, Any]:
    """Load a packed result with and without niwaki."""
    out, record = world.compress(world.model, "packed", "gptq", "4bit", options={"group": 64})
    load = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
            for code in (f"import niwaki; {load}", load)]  # fmt: skip
    return {"expected": [0, 1], "got": [run.returncode for run in runs], "without": runs[1].stderr.splitlines()[-1],
            "perplexity": world.perplexity(out), "bits": record["result"]["bits"]}  # fmt: skip


def comparison(world: World) -> dict[str, Any]:
    """Compare pruned with dense on two texts and all tasks, in float32."""
    on_gpu = world.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    out, _ = world.compress(world.model, "compared", "sparsegpt", "2:4")
    started = time.perf_counter()
    niwaki.compare(
        world.model, [out], data=[str(world.data / file) for file in TEXTS.values()], max_tokens=world.tokens,
        tasks=[str(path) for path in sorted((world.data / "tasks").glob("*.jsonl"))], dtype="float32",
        device=world.device, report=world.folder / "report", rounds=3,
    )  # fmt: skip
    found = json.loads((world.folder / "report/compare.json").read_text())
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    candidate = found["candidates"][0]
    return {"seconds_of_compare": time.perf_counter() - started, "peak_device_bytes": peak,
            "tasks": candidate["tasks"]}  # fmt: skip


KINDS: tuple[Callable[[World], dict[str, Any]], ...] = (
    dense, own_head, adapter, unread, dialogues, one_long_text, gguf, packed, comparison,
)  # fmt: skip


def main() -> None:
    """Run every kind, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", default="", help="part of the name of a kind")
    args = parser.parse_args()
    rows: list[dict] = []
    result = {"model": Path(args.model).name, **provenance(args.device), "tokens": args.tokens, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        world = World(args, Path(folder))
        for kind in KINDS:
            if args.only not in kind.__name__:
                continue
            started = time.perf_counter()
            try:
                found = kind(world)
            except Exception as error:  # a kind that fails is a row too
                found = {"failed": f"{type(error).__name__}: {error}"}
            about = (kind.__doc__ or "").strip()
            rows.append({"kind": kind.__name__, "what": about, **found, "seconds": time.perf_counter() - started})
            print(json.dumps(rows[-1], default=str)[:600], flush=True)
            args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
