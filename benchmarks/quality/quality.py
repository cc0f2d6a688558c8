"""Quality of methods under one protocol: 64×512 calibration tokens, 50,000 evaluation tokens of two texts.

    python -m benchmarks.quality.quality MODEL DATA --suite classic --out benchmarks/results/quality/quality-NAME.json

DATA holds calibration.jsonl, eval_reviews.jsonl and wikitext2_test.txt. Arithmetic is float32 on every device.
"Gap closed" is (ppl_wanda − ppl) / (ppl_wanda − ppl_dense), wanda with the same target, calibration and seed.
The model and the texts are not part of this repository.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import niwaki
from benchmarks.common.perplexity import TEXTS, perplexities, spread
from benchmarks.common.provenance import provenance
from benchmarks.quality.suites import SUITES, Case


def measure(model: str, data: Path, case: Case, seed: int, device: str, reference: str | None) -> dict:
    """Compress with a case and a seed, and return sizes, seconds and scores."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        record = niwaki.compress(
            model,
            out,
            calibration={"files": (str(data / "calibration.jsonl"),), "samples": 64, "seq_len": 512},
            seed=seed,
            device=device,
            dtype="float32",
            **case.recipe,
        )
        scores = perplexities(out, data, device, reference)
    result = record["result"]
    bits = result.get("method_bits", result["bits"])  # of baselines whose files hold decoded weights
    size = {"zeros_frac": result["zeros_frac"], "bits": bits, "bytes": result["bytes"]}
    if "shape" in record["allocation"]:
        size |= {key: record["allocation"][key] for key in ("removed_frac", "shape")}
    return {"seed": seed, **size, "compress_s": record["seconds"], **scores}


def add_gaps(rows: list[dict], dense: dict) -> None:
    """Add the gap closed to every run that has a plain wanda run of its target and seed."""
    wanda = {(row["target"], run["seed"]): run for row in rows if row["label"] == "wanda" for run in row["runs"]}
    for row in rows:
        for run in row["runs"]:
            if base := wanda.get((row["target"], run["seed"])):
                run["gap_closed"] = {
                    name: (base["perplexity"][name] - run["perplexity"][name])
                    / (base["perplexity"][name] - dense[name])
                    for name in TEXTS
                }
        if all("gap_closed" in run for run in row["runs"]):
            row["gap_closed"] = {name: spread([run["gap_closed"][name] for run in row["runs"]]) for name in TEXTS}


def summary(case: Case, runs: list[dict]) -> dict:
    """Return the row of a case: its recipe, its runs and their spread."""
    runs = sorted(runs, key=lambda run: run["seed"])
    row = {"label": case.label, **case.recipe, "runs": runs}
    return row | {name: spread([run["perplexity"][name] for run in runs]) for name in TEXTS}


def line(row: dict) -> str:
    """Return a row as printed: bits, perplexities, gaps closed in percent, seconds."""
    means = [round(row[name]["mean"], 2) for name in TEXTS]
    gaps = [round(100 * row["gap_closed"][name]["mean"], 1) for name in TEXTS] if "gap_closed" in row else ""
    took = round(sum(run["compress_s"] for run in row["runs"]), 1)
    shape = row["runs"][0].get("shape", "")
    return f"{row['target']} | {row['label']} | {row['runs'][0]['bits']} bits {shape} {means} {gaps} {took}"


def main() -> None:
    """Measure every case and seed, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=["classic"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", nargs="*", help="only these")
    parser.add_argument("--labels", nargs="*", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="compressions at a time; makes compress_s meaningless")
    parser.add_argument("--divergence", action="store_true", help="KL and top-1 agreement to the dense model too")
    args = parser.parse_args()
    started = time.time()
    dense = perplexities(args.model, args.data, args.device)["perplexity"]
    cases = [case for suite in args.suite for case in SUITES[suite]]
    cases = [case for case in cases if not args.targets or case.recipe["target"] in args.targets]
    cases = [case for case in cases if not args.labels or case.label in args.labels]
    reference = args.model if args.divergence else None
    about = {
        "model": Path(args.model).name,
        **provenance(args.device),
        "dense": dense,
    }
    rows: dict[int, dict] = {}  # by the number of the case
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        owners: dict[Future, int] = {}
        for number, case in enumerate(cases):
            for seed in range(1 if case.label == "magnitude" else args.seeds):  # magnitude reads no data
                work = pool.submit(measure, args.model, args.data, case, seed, args.device, reference)
                owners[work] = number
        waiting = Counter(owners.values())
        runs: dict[int, list[dict]] = defaultdict(list)
        for work in as_completed(owners):
            number = owners[work]
            runs[number].append(work.result())
            if len(runs[number]) < waiting[number]:
                continue
            rows[number] = summary(cases[number], runs[number])
            found = [rows[done] for done in sorted(rows)]
            add_gaps(found, dense)
            print(line(rows[number]), flush=True)
            result = about | {"seconds": round(time.time() - started, 1), "rows": found}
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # after every case: a stopped run loses little


if __name__ == "__main__":
    main()
