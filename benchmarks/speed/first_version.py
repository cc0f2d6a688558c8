"""Seconds and peak memory of compressing today against the commit that first had the method, in turns in one run.

    python -m benchmarks.speed.first_version --out benchmarks/results/speed/first-version-cpu.json \\
        --work WORK [--model MODEL ...]

Both are installed from the repository into folders of their own, with compiled kernels. Both run in processes of their
own with the same libraries and text. Options are the defaults of each version: those of learning methods have changed.
Seconds are those of the record, from the open checkpoint to the closed result. Ratios are medians over the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common.checkpoints import write_topics
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling

FIRST = {"magnitude": "a677fed", "wanda": "a677fed", "sparsegpt": "a677fed", "wandapp": "e7fa16f", "besa": "e7fa16f",
         "gptq": "60f570f"}  # fmt: skip
CASES = ("wanda/0.5", "wanda/2:4", "sparsegpt/0.5", "sparsegpt/2:4", "gptq/4bit")
# An editable installation would answer first to `import niwaki`.
CHILD = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "niwaki" not in type(finder).__module__]
sys.path.insert(0, sys.argv.pop(1))
from niwaki.cli.app import app
app()
"""


def installed(commit: str, work: Path) -> Path:
    """Return the package of a commit, built once."""
    folder, source = work / f"niwaki-{commit}", work / f"source-{commit}"
    if not folder.exists():
        subprocess.run(["git", "worktree", "add", "--detach", "--force", str(source), commit], check=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source)]
        subprocess.run(install, check=True)
        subprocess.run(["git", "worktree", "remove", "--force", str(source)], check=True)
    return folder


def compress(package: Path, model: Path, case: str, text: Path, out: Path) -> tuple[float, int]:
    """Compress a model with a package, and return seconds and peak bytes."""
    method, target = case.split("/")
    command = [
        sys.executable, "-c", CHILD, str(package), "compress", str(model), str(out), "--method", method, "--target",
        target, "--calibration", str(text), "--samples", "64", "--seq-len", "256", "--device", "cpu", "--overwrite",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, env=os.environ)
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    record = json.loads((out / "niwaki/run.json").read_text())
    shutil.rmtree(out)
    return record["seconds"], record["peak_rss_bytes"]


def main() -> None:
    """Measure every case in turns, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--cases", nargs="+", metavar="METHOD/TARGET", default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "text.jsonl"
    write_topics(text)
    today = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    now = installed(today.stdout.strip(), args.work)
    rows = []
    for model in [sapling(), *args.model]:
        for case in args.cases:
            commit = FIRST[case.split("/")[0]]
            packages = {"first": installed(commit, args.work), "now": now}
            found: dict[str, list[tuple[float, int]]] = {name: [] for name in packages}
            for _ in range(args.rounds):
                for name, package in packages.items():
                    found[name].append(compress(package, model, case, text, args.work / "out"))
            seconds = {name: [second for second, _ in runs] for name, runs in found.items()}
            ratios = [first / later for first, later in zip(*seconds.values(), strict=True)]
            rows.append({
                "model": model.name, "case": case, "first": commit, "now": today.stdout.strip(), "seconds": seconds,
                "times_as_fast": round(statistics.median(ratios), 2),
                "peak_mb": {name: round(max(peak for _, peak in runs) / 1e6) for name, runs in found.items()},
            })  # fmt: skip
            print(rows[-1], flush=True)
    result = {
        "what": "64 windows of 256 tokens, today's code against the first that had the method, in turns",
        **provenance("cpu"),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
