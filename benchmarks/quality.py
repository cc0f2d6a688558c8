"""Quality of every method under one protocol: 64×512 calibration tokens, 50,000 evaluation tokens of two texts.

    python benchmarks/quality.py MODEL DATA --out benchmarks/results/quality-NAME.json [--device cuda]

DATA holds calibration.jsonl, eval_reviews.jsonl and wikitext2_test.txt. Arithmetic is float32 on every device.
The model and the texts are not part of this repository.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import niwaki

CASES = [
    ("magnitude", "0.5", {}),
    ("wanda", "0.5", {}),
    ("sparsegpt", "0.5", {}),
    ("wanda", "0.7", {}),
    ("sparsegpt", "0.7", {}),
    ("wanda", "0.7", {"allocation": "owl"}),
    ("sparsegpt", "0.7", {"allocation": "owl"}),
    ("magnitude", "2:4", {}),
    ("wanda", "2:4", {}),
    ("sparsegpt", "2:4", {}),
    ("sparsegpt", "4:8", {}),
]


def measure(model: str, data: Path, case: tuple, seed: int, device: str) -> dict:
    method, target, extra = case
    texts = {"reviews": str(data / "eval_reviews.jsonl"), "wikitext2": str(data / "wikitext2_test.txt")}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        record = niwaki.compress(
            model,
            out,
            method=method,
            target=target,
            calibration={"files": (str(data / "calibration.jsonl"),), "samples": 64, "seq_len": 512},
            seed=seed,
            device=device,
            dtype="float32",
            **extra,
        )
        scores = niwaki.evaluate(
            out, reference=model, data=list(texts.values()), max_tokens=50_000, device=device, dtype="float32"
        )
    return {
        "seed": seed,
        "zeros_frac": record["result"]["zeros_frac"],
        "compress_s": record["seconds"],
        "perplexity": {name: scores["perplexity"][path] for name, path in texts.items()},
        "dense_perplexity": {name: scores["reference_perplexity"][path] for name, path in texts.items()},
        "kl_reviews": scores["kl"][texts["reviews"]],
        "top1_agreement_reviews": scores["top1_agreement"][texts["reviews"]],
        "tokens": {name: scores["tokens"][path] for name, path in texts.items()},
    }


def spread(runs: list[dict], text: str) -> dict:
    values = [run["perplexity"][text] for run in runs]
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="method:target, for example sparsegpt:0.5")
    args = parser.parse_args()
    started = time.time()
    rows = []
    for case in CASES:
        method, target, extra = case
        if args.only and f"{method}:{target}" not in [name.replace("/", ":", 1) for name in args.only]:
            continue
        seeds = range(1 if method == "magnitude" else args.seeds)  # magnitude sees no data
        runs = [measure(args.model, args.data, case, seed, args.device) for seed in seeds]
        row = {"method": method, "target": target, **extra, "runs": runs}
        row |= {text: spread(runs, text) for text in ("reviews", "wikitext2")}
        rows.append(row)
        print(method, target, extra, {t: round(row[t]["mean"], 2) for t in ("reviews", "wikitext2")}, flush=True)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    result = {
        "model": Path(args.model).name,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()
        },
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.time() - started, 1),
        "dense": rows[0]["runs"][0]["dense_perplexity"],
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
