"""Gain of low-rank recovery on pruned models, every zero kept: perplexity before and after, three seeds.

    python -m benchmarks.quality.recovery MODEL DATA --out benchmarks/results/quality/recovery-NAME.json [--device cuda]

DATA as for quality.py. Recovery and the choice of masks use windows of the same calibration.jsonl, in different orders.
The evaluation texts are disjoint from both.
"""

import argparse
import json
import tempfile
from pathlib import Path

import niwaki
from benchmarks.common.perplexity import TEXTS, perplexities, spread
from benchmarks.common.provenance import provenance

CASES = [({"method": "wanda"}, "wanda"), ({"method": "wandapp"}, "wandapp")]


def measure(model: str, data: Path, recipe: dict, target: str, seed: int, device: str, settings: dict) -> dict:
    """Prune and recover with a seed, and return the perplexities before and after."""
    text = str(data / "calibration.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        pruned, recovered = Path(folder) / "pruned", Path(folder) / "recovered"
        niwaki.compress(
            model,
            pruned,
            target=target,
            calibration={"files": (text,), "samples": 64, "seq_len": 512},
            seed=seed,
            device=device,
            dtype="float32",
            **recipe,
        )
        record = niwaki.recover(pruned, recovered, data=text, seed=seed + 100, device=device, **settings)
        return {
            "seed": seed,
            "before": perplexities(pruned, data, device)["perplexity"],
            "after": perplexities(recovered, data, device)["perplexity"],
            "zeros_frac": record["result"]["zeros_frac"],
            "seconds": record["seconds"],
        }


def main() -> None:
    """Measure every case, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="2:4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=512)
    args = parser.parse_args()
    settings = {"steps": args.steps, "samples": args.samples, "seq_len": 512}
    rows: list[dict] = []
    result = {
        "model": Path(args.model).name,
        **provenance(args.device),
        "recover": settings,
        "dense": perplexities(args.model, args.data, args.device)["perplexity"],
        "rows": rows,
    }
    for recipe, label in CASES:
        runs = [
            measure(args.model, args.data, recipe, args.target, seed, args.device, settings)
            for seed in range(args.seeds)
        ]
        row = {"label": label, **recipe, "target": args.target, "runs": runs}
        for moment in ("before", "after"):
            row[moment] = {name: spread([run[moment][name] for run in runs]) for name in TEXTS}
        rows.append(row)
        print(label, {m: [round(row[m][name]["mean"], 2) for name in TEXTS] for m in ("before", "after")}, flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # after every case: a stopped run loses little


if __name__ == "__main__":
    main()
