"""The table of a real model: every method at its targets, with perplexity, divergence and the accuracy of four tasks.

    python -m benchmarks.quality.real_model MODEL DATA --jobs 7 --shots 0 5 --out \
        benchmarks/results/quality/real-model-NAME.json

DATA holds calibration.jsonl, eval_reviews.jsonl, wikitext2_test.txt and the folder tasks. Calibration: 128 windows of
512 tokens per seed. Arithmetic is float32. Accuracies are paired with those of the dense model, with intervals of
95 %; hellaswag counts by likelihood per character. `--shots 0 5` asks every question alone and after five solved ones,
which the seed 0 draws. The dense model is scored once for all runs; `--dense-scores FOLDER` keeps its scores for the
next call. `--cases FILE` adds cases from lines of JSON: recipes with a
`label`. In a case, `rotate` holds options of a new basis before it, and `recover` those of a recovery after it. The
`held_out` of its calibration may be a file in DATA. Finished runs of an earlier OUT are kept: those that have every
number of `--shots`.

A case with `peer` runs another project (peers.py) on the same tokens. `--peers FOLDER` says where they are installed,
each in a folder of its own, so that none changes what another one imports:

    for p in auto_round hqq llmcompressor gptqmodel; do pip install --no-deps --target FOLDER/$p ...; done

With `--jobs` over 1, seconds are those of a shared machine. `processor_s` counts those of all threads of a run.
The model and the texts are not part of this repository.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import niwaki
from benchmarks.common.perplexity import TEXTS, spread
from benchmarks.common.provenance import provenance
from benchmarks.quality.suites import SUITES, Case
from niwaki.config.targets import parse_count
from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, load_tokenizer
from niwaki.measure.evaluate.tasks import read_items
from niwaki.measure.schema import Estimate, TaskQuality
from niwaki.model.files import write_text

BY_CHARACTER = ("hellaswag",)  # tasks whose usual figure is the accuracy by likelihood per character
SAMPLES, WINDOW, TOKENS = 128, 512, 50_000


@dataclass(frozen=True)
class Setting:
    """Model, texts, device and amounts that all runs share."""

    model: str
    data: Path
    device: str
    limit: int | None  # questions of each task
    shots: tuple[int, ...]  # solved questions before each, one scoring per number
    dense_scores: Path  # what the runs share
    tokens: int  # of each text
    samples: int  # windows of calibration
    peers: Path | None  # where peers are installed

    @property
    def calibration(self) -> dict[str, Any]:
        """Return the calibration of every recipe that says nothing else."""
        return {"files": (str(self.data / "calibration.jsonl"),), "samples": self.samples, "seq_len": WINDOW}


def score(setting: Setting, candidate: Path, place: Path) -> dict[str, Any]:
    """Return the paired scores of a candidate on both texts and all tasks, in one pass through its blocks."""
    files = {name: str(setting.data / file) for name, file in TEXTS.items()}
    tasks = {shots: write_tasks(setting, shots, place) for shots in setting.shots if setting.limit != 0}
    found = niwaki.compare(
        setting.model, str(candidate), data=list(files.values()),
        tasks=[str(path) for own in tasks.values() for path in own.values()], max_tokens=setting.tokens, rounds=0,
        device=setting.device, dtype="float32", dense_scores=setting.dense_scores,
    ).candidates[0]  # fmt: skip
    texts = {}
    for name, quality in zip(files, found.data, strict=True):
        whole = quality.whole
        texts[name] = {
            "perplexity": whole.perplexity,
            "dense": whole.dense_perplexity,
            "ratio": interval(whole.perplexity_ratio),
            "kl": interval(whole.kl),
            "top1": interval(whole.top1_agreement),
        }
    scored = {task.task: task for task in found.tasks}
    by_shots = {shots: accuracies({n: scored[str(path)] for n, path in own.items()}) for shots, own in tasks.items()}
    scores = {"texts": texts, "tasks": by_shots.pop(0, {})}
    return scores | ({"tasks_by_shots": {str(shots): own for shots, own in by_shots.items()}} if by_shots else {})


def write_tasks(setting: Setting, shots: int, place: Path) -> dict[str, Path]:
    """Write the questions of every task, each after `shots` solved ones, and return the files by task."""
    written = {}
    for path in sorted((setting.data / "tasks").glob("*.jsonl")):
        items = read_items(str(path), setting.limit, shots, seed=0)
        name = path.stem.split("_")[0]
        written[name] = place / f"{name}-{shots}.jsonl"
        rows = [json.dumps({"pairs": item.pairs, "gold": item.gold}) for item in items]
        written[name].write_text("\n".join(rows) + "\n")
    return written


def accuracies(tasks: dict[str, TaskQuality]) -> dict[str, Any]:
    """Return the accuracy of every task, that of the dense model, and the interval of the loss."""
    answers = {}
    for name, task in tasks.items():
        own = task.accuracy_norm if name in BY_CHARACTER else task.accuracy
        answers[name] = {
            "questions": task.questions,
            "dense": own.dense_accuracy,
            "accuracy": own.accuracy,
            "loss": interval(own.loss),
        }
    return answers


def interval(estimate: Estimate) -> list[float | None]:
    """Return value, low and high of an estimate."""
    return [estimate.value, estimate.low, estimate.high]


def measure(setting: Setting, case: Case, seed: int) -> dict[str, Any]:
    """Run a case with a seed, and return sizes, seconds and scores."""
    compress = run_peer if "peer" in case.recipe else run_niwaki
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out, size = compress(setting, case, seed, Path(folder), seconds)
        with clock(seconds, "score_s"):
            scores = score(setting, out, Path(folder))
    return {"seed": seed, **size, "seconds": seconds, **scores}


Run = tuple[Path, dict[str, Any]]  # a result and its sizes


def run_niwaki(setting: Setting, case: Case, seed: int, place: Path, seconds: dict[str, float]) -> Run:
    """Compress with a recipe, in another basis and with a recovery where the case says so."""
    recipe = dict(case.recipe)
    rotation, recovery = recipe.pop("rotate", None), recipe.pop("recover", None)
    text = setting.calibration | recipe.pop("calibration", {})
    if (setting.data / str(text.get("held_out"))).is_file():
        text["held_out"] = str(setting.data / text["held_out"])
    own_text, device = setting.calibration["files"][0], setting.device
    source: str | Path = setting.model
    if rotation is not None:
        with clock(seconds, "rotate_s"):
            source = place / "rotated"
            niwaki.rotate(
                setting.model, source, target=recipe["target"], calibration=own_text, device=device,
                **{"seq_len": WINDOW, "seed": seed, **rotation},
            )  # fmt: skip
    processor = time.process_time()
    with clock(seconds, "compress_s"):
        out = place / "out"
        given = {"dtype": "float32", **recipe}
        record = niwaki.compress(source, out, calibration=text, seed=seed, device=device, **given)
    seconds["processor_s"] = round(time.process_time() - processor, 1)
    if recovery is not None:
        with clock(seconds, "recover_s"):
            compressed, out = out, place / "recovered"
            counts = {name: parse_count(str(value)) for name, value in recovery.items() if name == "tokens"}
            given = recovery | counts
            niwaki.recover(compressed, out, data=own_text, teacher=setting.model, seed=seed, device=device, **given)
    result = record["result"]
    bits = result.get("method_bits", result["bits"])  # of baselines whose files hold decoded weights
    size = {"zeros_frac": result["zeros_frac"], "bits": bits, "bytes": result["bytes"]}
    if "shape" in record["allocation"]:
        size |= {key: record["allocation"][key] for key in ("removed_frac", "shape")}
    return out, size


def run_peer(setting: Setting, case: Case, seed: int, place: Path, seconds: dict[str, float]) -> Run:
    """Compress with a peer on the tokens that niwaki would read, in a process that imports it first."""
    assert setting.peers, f"expected --peers, the folder where {case.recipe['peer']} is installed"
    text = setting.calibration | case.recipe.get("calibration", {})
    tokenizer, windows, out = load_tokenizer(setting.model), place / "windows.safetensors", place / "out"
    ids_ST = calibration_windows(
        read_texts(list(text["files"])), tokenizer, samples=text["samples"], seq_len=text["seq_len"], seed=seed
    )
    save_file({"ids": ids_ST}, windows)
    path = [str(setting.peers.resolve() / case.recipe["peer"]), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    device = "cuda" if setting.device == "auto" and torch.cuda.is_available() else setting.device.replace("auto", "cpu")
    command = [sys.executable, "-m", "benchmarks.quality.peers", str(Path(setting.model).resolve())]
    done = subprocess.run(
        [*command, str(windows), str(out), "--device", device, "--case", json.dumps({**case.recipe, "seed": seed})],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}, cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case.label} ended with code {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds |= {name: round(value, 1) for name, value in found["seconds"].items()}
    return out, {"zeros_frac": found["zeros_frac"], "bits": found["bits"], "version": found["version"]}


@contextlib.contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the seconds of the block under `name`."""
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a case: its recipe, its runs, and the ratios and accuracies over its seeds."""
    runs = sorted(runs, key=lambda run: run["seed"])
    row: dict[str, Any] = {"label": case.label, **case.recipe, "runs": runs}
    row["ratio"] = {name: spread([run["texts"][name]["ratio"][0] for run in runs]) for name in TEXTS}
    row["accuracy"] = over_seeds([run["tasks"] for run in runs])
    if few := runs[0].get("tasks_by_shots"):
        row["accuracy_by_shots"] = {
            shots: over_seeds([run.get("tasks_by_shots", {}).get(shots, {}) for run in runs]) for shots in few
        }
    return row


def over_seeds(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the accuracy of every task over the runs that have it."""
    names = dict.fromkeys(name for own in tasks for name in own)
    return {name: spread([own[name]["accuracy"] for own in tasks if name in own]) for name in names}


def line(row: dict[str, Any]) -> str:
    """Return a row as printed: target, label, bits, ratios, divergence, accuracies, seconds."""
    runs = row["runs"]
    ratios = " / ".join(f"{row['ratio'][name]['mean']:.3f}" for name in TEXTS)
    kl, top1 = (statistics.mean(run["texts"]["reviews"][key][0] for run in runs) for key in ("kl", "top1"))
    tasks = " ".join(f"{name} {found['mean']:.3f}" for name, found in row["accuracy"].items())
    for shots, own in row.get("accuracy_by_shots", {}).items():
        tasks += f" | {shots}: " + " ".join(f"{name} {found['mean']:.3f}" for name, found in own.items())
    took = ", ".join(
        f"{name} {statistics.mean(run['seconds'][name] for run in runs):.0f}" for name in runs[0]["seconds"]
    )
    size = f"{row['target']:>8} | {row['label']:<34} | {runs[0]['bits']}"
    return f"{size} | {ratios} | {kl:.3f} {top1:.3f} | {tasks} | {took}"


def read_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the suites and of the file that are asked for."""
    found = [case for suite in args.suite for case in SUITES[suite]]
    if args.cases:
        rows = [json.loads(text) for text in args.cases.read_text().splitlines() if text.strip()]
        found += [Case(row.pop("label"), row) for row in rows]
    found = [case for case in found if not args.targets or case.recipe["target"] in args.targets]
    return [case for case in found if not args.labels or case.label in args.labels]


def main() -> None:
    """Measure every case and seed, and write the result after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--suite", nargs="*", choices=sorted(SUITES), default=[])
    parser.add_argument("--cases", type=Path, help="lines of JSON")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", nargs="*", help="only these")
    parser.add_argument("--labels", nargs="*", help="only these")
    parser.add_argument("--limit", type=int, help="questions of each task, 0 for none")
    parser.add_argument("--shots", type=int, nargs="+", default=[0], help="solved questions before each of a task")
    parser.add_argument("--dense-scores", type=Path, help="folder that keeps the scores of the dense model")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each text")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--peers", type=Path, help="folder with a folder for each peer")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--stop", type=float, default=float("inf"), help="begin no run after these seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scores = args.dense_scores or Path(folder)
        amounts = (args.limit, tuple(args.shots), scores.absolute(), args.tokens, args.samples)
        measure_all(args, Setting(args.model, args.data, args.device, *amounts, args.peers))


def finished(setting: Setting, run: dict[str, Any]) -> bool:
    """Return whether an earlier run has every number that is asked for."""
    have = {0} if run["tasks"] else set()
    have |= {int(shots) for shots in run.get("tasks_by_shots", {})}
    return setting.limit == 0 or have.issuperset(setting.shots)


def measure_all(args: argparse.Namespace, setting: Setting) -> None:
    """Measure what an earlier result lacks."""
    started, cases = time.time(), read_cases(args)
    shared = {"samples": args.samples, "window": WINDOW, "tokens": args.tokens}
    about = {"model": Path(args.model).name, **provenance(args.device), **shared}
    earlier = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    runs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in earlier:
        runs[row["target"], row["label"]] += row["runs"]
    wanted = [
        (case, seed)
        for seed in range(args.seeds)
        for case in cases
        if seed not in {run["seed"] for run in runs[case.recipe["target"], case.label] if finished(setting, run)}
    ]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = {pool.submit(begin, started + args.stop, setting, case, seed): (case, seed) for case, seed in wanted}
        for future in as_completed(work):
            case, seed = work[future]
            key, error = (case.recipe["target"], case.label), future.exception()
            if error is not None:
                print(f"{key} seed {seed}: {error}", *traceback.format_exception(error)[-1:], flush=True)
                continue
            if (run := future.result()) is None:
                print(f"{key} seed {seed}: not begun, the time is over", flush=True)
                continue
            runs[key] = [*(one for one in runs[key] if one["seed"] != seed), run]
            print(line(summary(case, [run])), flush=True)
            now = {(c.recipe["target"], c.label): c for c in cases}
            rows = [row for row in earlier if (row["target"], row["label"]) not in now]
            rows += [summary(c, runs[name]) for name, c in now.items() if runs[name]]
            result = about | {"seconds": round(time.time() - started, 1), "rows": rows}
            write_text(args.out, json.dumps(result, indent=1) + "\n")


def begin(until: float, setting: Setting, case: Case, seed: int) -> dict[str, Any] | None:
    """Measure a run, unless the time is over."""
    return None if time.time() > until else measure(setting, case, seed)


if __name__ == "__main__":
    main()
