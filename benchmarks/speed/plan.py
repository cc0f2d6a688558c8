"""Predictions of `niwaki plan` against `niwaki compress`: seconds, peak memory, bytes, in fresh processes.

    python -m benchmarks.speed.plan --out benchmarks/results/speed/plan-cpu.json --work WORK \\
        --models sapling NAME=FOLDER

The command line plans every case and compresses it right after, on the CPU, so that both see the same load. A result
has the name of a model, never its folder.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common.checkpoints import write_topics
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling

SAMPLES, SEQ_LEN = 16, 256
CASES = {
    "magnitude": "magnitude 0.5",
    "wanda": "wanda 2:4",
    "wanda-owl": "wanda 0.6 --allocation owl",
    "sparsegpt": "sparsegpt 0.5",
    "fast": "fast 2:4",
    "wandapp": "wandapp 2:4 --set rounds=2 --set samples=8",
    "besa": "besa 0.5 --set steps=24",
    "gblm": "gblm 2:4",
    "rtn": "rtn 4bit --set group=64 --embeddings 4bit",
    "gptq": "gptq 4bit --set group=64",
    "squeeze10": "squeeze10 1.75bit --set learn_rounds=1 --set samples=8",
    "billm": "billm 3bit --set salient=16",
    "ptq161": "ptq161 2.5bit --set rounds=1 --set samples=8",
    "comp": "comp 0.25 --set try_blocks=1 --set try_heads=1",
    "flap": "flap 0.25",
    "comp+gptq": "comp+gptq 0.25+4bit --set comp.try_blocks=0 --set comp.try_heads=0 --set gptq.group=64",
    "shadow": "shadow 0.5 --set unit=prompt --set gradient_windows=4",
}


def niwaki(*arguments: str) -> str:
    """Run the command line and return its output."""
    command = [sys.executable, "-m", "niwaki.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def case(name: str, model: Path, text: Path, out: Path, device: str = "cpu") -> dict:
    """Return one row: predictions, measurements, and their ratios."""
    method, target, *more = CASES[name].split()
    chosen = ["--preset", method] if method == "fast" else ["--method", method]
    arguments = [*chosen, "--target", target, *more, "--calibration", str(text)]
    arguments += ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    gpu = ["--gpu", "cpu"] if device == "cpu" else []  # otherwise the one of this machine
    planned = json.loads(niwaki("plan", str(model), *arguments, *gpu, "--out", str(out), "--json"))
    load = os.getloadavg()[0]
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    niwaki("compress", str(model), str(out), *arguments, "--device", device, "--overwrite")
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used
    record = json.loads((out / "niwaki/run.json").read_text())
    shutil.rmtree(out)
    memory = "peak_rss_bytes" if device == "cpu" else "peak_device_bytes"
    predicted = {key: planned[key] for key in ("seconds", memory, "output_bytes")}
    measured = {"seconds": record["seconds"], memory: record[memory], "output_bytes": record["result"]["bytes"]}
    ratios = {key: round(predicted[key] / measured[key], 4) for key in predicted}
    phases = planned["seconds_by_phase"]
    return {
        "case": CASES[name],
        "predicted": predicted | {"phases": phases},
        "measured": measured | {"cpu_seconds": round(used, 2), "load": load},
        "ratio": ratios,
    }


def main() -> None:
    """Plan and compress every case of every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["sapling"], help="sapling, or NAME=FOLDER")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--add", action="store_true", help="keep the rows that --out has of other models and cases")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "text.jsonl"
    write_topics(text)
    rows = json.loads(args.out.read_text())["rows"] if args.add and args.out.exists() else []
    for given in args.models:
        label, _, folder = given.partition("=")
        for name in args.cases:
            rows = [row for row in rows if (row["model"], row["case"]) != (label, CASES[name])]
            row = {"model": label} | case(name, Path(folder) if folder else sapling(), text, args.work / "out")
            print(label, name, row["ratio"], row["measured"]["seconds"], row["predicted"]["phases"], flush=True)
            rows.append(row)
            write(args, rows)


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write the rows so far."""
    worst = {
        key: [min(row["ratio"][key] for row in rows), max(row["ratio"][key] for row in rows)]
        for key in rows[0]["ratio"]
    }
    labels = dict.fromkeys(row["model"] for row in rows)
    result = {
        "what": f"`niwaki plan` against `niwaki compress` right after it, {SAMPLES}×{SEQ_LEN} tokens; ratio: predicted "
        "over measured. Other work shared the two cores: `load` is what waited for them when a compression began.",
        **provenance("cpu"),
        "command": f"python -m benchmarks.speed.plan --out {args.out.name} --work WORK --models {' '.join(labels)}",
        "threads": torch.get_num_threads(),
        "ratio_least_and_most": worst,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
