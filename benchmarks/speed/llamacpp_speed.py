"""The 1B shape of shape_speed.py in llama.cpp: decoding, prompts and memory, dense against a quarter less.

    python -m benchmarks.speed.llamacpp_speed --work /tmp/work --out benchmarks/results/speed/llamacpp-speed-cpu.json
    python -m benchmarks.speed.llamacpp_speed --work /tmp/work --tiny --rounds 1                  (to try the script)

Checkpoints of random weights are built, saved and exported by `niwaki export --to gguf` as a user's are. WORK keeps one
file per shape and type (2.2 GB a bf16 file). Models of a type take turns in one process. Times are medians over the
rounds. A prompt is one batch, decoding follows a prompt of 8 tokens. Memory is VmRSS minus that before loading, each
model alone in a fresh process, after a prompt and some tokens. Weights are mapped, and by then all have been read.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import torch
import transformers

import niwaki
from benchmarks.common.cpu_timing import resident_bytes
from benchmarks.common.decoders import FIELDS, build, dense_config, shapes
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling

TYPES = ("bf16", "f16", "q8_0")
PROMPT_BEFORE_DECODING = 8


def tiny_config() -> transformers.LlamaConfig:
    """Return a small config, to try the script."""
    return transformers.LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def files(work: Path, configs: dict[str, dict[str, Any]], types: list[str]) -> dict[tuple[str, str], Path]:
    """Return the GGUF of every shape and type, made unless it is there."""
    found = {}
    for name, config in configs.items():
        key = "-".join([*name.split(), str(config["hidden_size"])])
        wanted = {type: work / f"{key}-{type}" for type in types}
        if not all((folder / "model.gguf").is_file() for folder in wanted.values()):
            torch.manual_seed(0)
            model = build(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
                else:
                    parameter.fill_(1)
            model.save_pretrained(work / key)
            del model
            for companion in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(sapling() / companion, work / key / companion)
            for type, folder in wanted.items():
                niwaki.export(work / key, folder, to="gguf", type=type, overwrite=True)
            shutil.rmtree(work / key)
        found |= {(name, type): folder / "model.gguf" for type, folder in wanted.items()}
    return found


class Engine:
    """A model with its context, driven without the copies that the high-level class makes."""

    def __init__(self, path: Path, context: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        self.context = llama_cpp.llama_init_from_model(self.model, params)

    def threads(self, count: int) -> None:
        """Set the number of threads."""
        llama_cpp.llama_set_n_threads(self.context, count, count)

    def forget(self) -> None:
        """Clear the key-value cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def feed(self, ids: list[int]) -> None:
        """Run one batch of tokens."""
        held = (llama_cpp.llama_token * len(ids))(*ids)  # the batch points into it
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, len(ids))):
            raise RuntimeError("llama.cpp could not run the batch")
        llama_cpp.llama_synchronize(self.context)

    def prompt_s(self, tokens: int) -> float:
        """Return the seconds of a prompt."""
        self.forget()
        begin = time.perf_counter()
        self.feed(list(range(1, tokens + 1)))
        return time.perf_counter() - begin

    def decode_s(self, tokens: int) -> float:
        """Return the seconds of decoding after a short prompt."""
        self.prompt_s(PROMPT_BEFORE_DECODING)
        begin = time.perf_counter()
        for token in range(1, tokens + 1):
            self.feed([token])
        return time.perf_counter() - begin


def measure(engines: dict[str, Engine], kind: str, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of all models of a type. The models take turns."""
    decoded: dict[str, list[float]] = {name: [] for name in engines}
    prompted: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.threads(threads)
    for _ in range(args.rounds):
        for name, engine in engines.items():
            engine.decode_s(2)  # memory that lay idle while the others ran may have been taken away
            decoded[name].append(engine.decode_s(args.tokens))
            prompted[name].append(engine.prompt_s(args.prompt_tokens))
    rows = []
    for name in engines:
        decode_s, prompt_s = statistics.median(decoded[name]), statistics.median(prompted[name])
        rows.append({
            "model": name, "type": kind, "threads": threads, "decode_tokens_per_s": round(args.tokens / decode_s, 2),
            "prompt_tokens_per_s": round(args.prompt_tokens / prompt_s, 1),
            "decode_speedup": round(statistics.median(decoded["dense"]) / decode_s, 3),
            "prompt_speedup": round(statistics.median(prompted["dense"]) / prompt_s, 3),
            "decode_s": [round(seconds, 4) for seconds in decoded[name]],
            "prompt_s": [round(seconds, 4) for seconds in prompted[name]],
        })  # fmt: skip
        print({key: value for key, value in rows[-1].items() if not key.endswith("_s") or "tokens" in key}, flush=True)
    return rows


def weigh(path: Path, prompt_tokens: int) -> None:
    """Print what loading the file and running it adds to the memory of this process."""
    before = resident_bytes()
    engine = Engine(path, prompt_tokens + 16)
    engine.prompt_s(prompt_tokens)
    engine.decode_s(4)
    print(json.dumps({"rss_bytes": resident_bytes() - before}))


def main() -> None:
    """Measure all types and shapes, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--shapes", nargs="+", help="names of benchmarks.common.decoders.shapes; dense is always there")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weigh", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if int(os.environ.get("OMP_NUM_THREADS", max(args.threads))) < max(args.threads):
        parser.error("OMP_NUM_THREADS is less than the threads to measure: unset it")  # OpenMP would let them wait
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    if args.weigh:
        weigh(args.weigh, args.prompt_tokens)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    known = shapes(tiny_config() if args.tiny else dense_config())
    chosen = {name: known[name] for name in known if name == "dense" or name in (args.shapes or known)}
    paths = files(args.work, {name: config for name, (config, _) in chosen.items()}, args.types)
    models, rows = [], []
    for kind in args.types:
        for name, (config, removed_frac) in chosen.items():
            path = paths[name, kind]
            command = [sys.executable, "-m", "benchmarks.speed.llamacpp_speed", "--work", str(args.work)]
            command += ["--weigh", str(path), "--prompt-tokens", str(args.prompt_tokens)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            about = {"type": kind, "removed_frac": round(removed_frac, 4), **{key: config[key] for key in FIELDS}}
            models.append({"model": name, **about, "file_bytes": path.stat().st_size, **json.loads(output)})
            dense = next(model for model in models if model["model"] == "dense" and model["type"] == kind)
            models[-1]["rss_share"] = round(models[-1]["rss_bytes"] / dense["rss_bytes"], 3)
            print(models[-1], flush=True)
        engines = {name: Engine(paths[name, kind], args.prompt_tokens + 16) for name in chosen}
        rows += [row for threads in args.threads for row in measure(engines, kind, threads, args)]
        for engine in engines.values():
            llama_cpp.llama_free(engine.context)
            llama_cpp.llama_model_free(engine.model)
    if args.out:
        what = f"decoding {args.tokens} tokens, prompts of {args.prompt_tokens}, in turns, median of {args.rounds}"
        where = provenance("cpu")
        where["versions"] |= {name: version(name) for name in ("llama-cpp-python", "gguf")}
        args.out.write_text(json.dumps({"what": what, **where, "models": models, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
