"""Seconds of `niwaki.load` in two trees of this repository, in turns: alone, and with a first prompt of 16 tokens.

    python -m benchmarks.speed.load_time BEFORE AFTER --models MODEL FOUR_BITS --rounds 10 --out OUT

BEFORE and AFTER are roots of clones with compiled kernels. A round starts a process per tree and model. It loads
once to warm up and then `--loads` times, and its medians are those of the round. One thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.perplexity import spread
from benchmarks.common.provenance import provenance

LOADS = """
import sys, time, torch
from niwaki.runtime.load import load
ids = torch.arange(1, 17)[None]
for number in range(int(sys.argv[2]) + 1):
    began = time.perf_counter()
    model = load(sys.argv[1], device="cpu")
    loaded = time.perf_counter()
    with torch.no_grad():
        model(ids)
    if number:
        print(loaded - began, time.perf_counter() - began)
    del model
"""


def timed(tree: Path, model: str, loads: int) -> tuple[float, float]:
    """Return the median seconds of a load, and of a load with its first prompt."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADS, model, str(loads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    pairs = [line.split() for line in done.stdout.splitlines() if line.strip()]
    return statistics.median(float(pair[0]) for pair in pairs), statistics.median(float(pair[1]) for pair in pairs)


def main() -> None:
    """Measure all rounds, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--loads", type=int, default=5, help="of a process")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "after": args.after.resolve()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for model in args.models:
            for name, tree in trees.items():
                found.setdefault((model, name), []).append(timed(tree, model, args.loads))
        rows: list[dict[str, Any]] = [
            {
                "model": Path(model).name, "tree": name, "rounds": len(own),
                "load_s": spread([one[0] for one in own]), "with_prompt_s": spread([one[1] for one in own]),
            }
            for (model, name), own in found.items()
        ]  # fmt: skip
        args.out.write_text(json.dumps(provenance("cpu") | {"loads": args.loads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
