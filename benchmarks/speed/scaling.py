"""Growth of time and memory of compressing with blocks, width and tokens: slopes in log-log, 1 is linear.

    python -m benchmarks.speed.scaling --out benchmarks/results/speed/scaling-cpu.json --work WORK \\
        --plot scaling-cpu.svg
    python -m benchmarks.speed.scaling --device cuda --scale 4 --out benchmarks/results/speed/scaling-h100.json \\
        --work WORK

Random bf16 Llamas: one of the three changes, the others stay at the middle. Every point is a process of its own. Rounds
go over all points, so that a busy minute meets all alike. Seconds are those of the walk: all blocks, without start-up
and reading of text. The least of the rounds counts. Memory is the peak RSS, or the peak of the device. `--scale`
multiplies widths and windows.

The slope of a whole row hides a growth that begins late, so the slope between the last two points stands beside it.
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common.checkpoints import Shape, make_checkpoint, write_topics
from benchmarks.common.provenance import provenance

# Groups of 64 columns divide every width.
METHODS = {"wanda": ["0.5"], "sparsegpt": ["0.5"], "gptq": ["4bit", "--set", "group=64"]}
BLOCKS, WIDTHS, WINDOWS = (4, 8, 16, 32), (256, 512, 1024, 2048), (8, 16, 32, 64)
MIDDLE = {"blocks": 4, "width": 512, "windows": 16}
SEQ_LEN = 256


def points() -> list[tuple[str, dict[str, int]]]:
    """Return the name of the size that changes and all three sizes, for every point."""
    rows = {"blocks": BLOCKS, "width": WIDTHS, "windows": WINDOWS}
    return [(name, MIDDLE | {name: value}) for name, values in rows.items() for value in values]


def model_of(point: dict[str, int], args: argparse.Namespace) -> Path:
    """Return the checkpoint of a point, made once."""
    width = point["width"] * args.scale
    folder = args.work / f"model-{point['blocks']}-{width}"
    if not folder.exists():
        shape = Shape("", width, width * 11 // 4 // 64 * 64, width // 64, width // 64, point["blocks"])
        make_checkpoint(folder, point["blocks"], args.device, shape)
    return folder


def compress(method: str, point: dict[str, int], args: argparse.Namespace) -> tuple[float, int]:
    """Compress, and return the seconds of the walk and the peak in bytes."""
    out, windows, seq_len = args.work / "out", point["windows"] * args.scale, SEQ_LEN * args.scale
    command = [
        sys.executable, "-m", "niwaki.cli", "compress", str(model_of(point, args)), str(out), "--method", method,
        "--target", *METHODS[method], "--calibration", str(args.work / "text.jsonl"), "--samples", str(windows),
        "--seq-len", str(seq_len), "--device", args.device, "--overwrite",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((out / "niwaki/run.json").read_text())
    events = [json.loads(line) for line in (out / "niwaki/events.jsonl").read_text().splitlines()]
    blocks = [event["seconds"] for event in events if event["event"] == "block"]
    shutil.rmtree(out)
    # The first block of a process warms up what the others find warm.
    seconds = sum(blocks[1:]) * len(blocks) / (len(blocks) - 1)
    return seconds, record["peak_device_bytes"] if args.device == "cuda" else record["peak_rss_bytes"]


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def summary(rows: list[dict]) -> list[dict]:
    """Return the slopes of every method and size."""
    found = []
    for (method, changed), group in itertools.groupby(rows, lambda row: (row["method"], row["changed"])):
        own = list(group)
        xs = [float(row[changed]) for row in own]
        for what in ("seconds", "peak_bytes"):
            ys = [row[what] for row in own]
            slopes = {"slope": round(slope(xs, ys), 3), "last_slope": round(slope(xs[-2:], ys[-2:]), 3)}
            found.append({"method": method, "changed": changed, "of": what, **slopes})
    return found


def plot(result: dict, path: Path) -> None:
    """Plot seconds and peaks over each of the three sizes, one line per method."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "niwaki", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained", sharey="row")
    for column, changed in enumerate(("blocks", "width", "windows")):
        for line, (what, unit) in enumerate({"seconds": 1.0, "peak_bytes": 1e9}.items()):
            axis = axes[line][column]
            for method in METHODS:
                own = [row for row in result["rows"] if (row["method"], row["changed"]) == (method, changed)]
                slopes = next(
                    s for s in result["slopes"] if (s["method"], s["changed"], s["of"]) == (method, changed, what)
                )
                label = f"{method} ({slopes['slope']:.2f}, at the end {slopes['last_slope']:.2f})"
                axis.plot([row[changed] for row in own], [row[what] / unit for row in own], "o-", label=label)
            sizes = sorted({row[changed] for row in result["rows"] if row["changed"] == changed})
            axis.set(xscale="log", yscale="log", xlabel=changed if line else None)
            axis.set_xticks(sizes, map(str, sizes))
            axis.set_xticks([], minor=True)
            axis.legend(fontsize=7)
    axes[0][0].set_ylabel("seconds of the walk")
    axes[1][0].set_ylabel("peak, GB")
    figure.suptitle(f"Compressing on {result['device']}: slopes in log-log, 1 is linear")
    figure.savefig(path)


def main() -> None:
    """Measure all points in rounds, and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    write_topics(args.work / "text.jsonl", times=4)
    cases = [(method, changed, point) for method in METHODS for changed, point in points()]
    measured: list[list[tuple[float, int]]] = [[] for _ in cases]
    for number in range(args.rounds):
        for (method, changed, point), own in zip(cases, measured, strict=True):
            own.append(compress(method, point, args))
            print(number, method, changed, point, own[-1], flush=True)
        save(cases, measured, args)  # every round: what was measured is not lost
    print(*json.loads(args.out.read_text())["slopes"], sep="\n")


def save(
    cases: list[tuple[str, str, dict[str, int]]], measured: list[list[tuple[float, int]]], args: argparse.Namespace
) -> None:
    """Write the result of the rounds so far, and its plot."""
    rows = []
    for (method, changed, point), own in zip(cases, measured, strict=True):
        scales = {"blocks": 1, "width": args.scale, "windows": args.scale}
        sizes = {name: value * scales[name] for name, value in point.items()}
        least, peak = min(seconds for seconds, _ in own), max(peak for _, peak in own)
        rows.append({"method": method, "changed": changed, **sizes, "seconds": round(least, 4), "peak_bytes": peak})
    result = {
        "what": "seconds of the walk (least of the rounds) and peak bytes of `niwaki compress`, one size at a time",
        **provenance(args.device),
        "seq_len": SEQ_LEN * args.scale, "rounds": len(measured[0]), "slopes": summary(rows), "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
