"""Plots of benchmarks/results from its JSON files: perplexity by true bits, by removed share, and drift by depth.

    python -m benchmarks.common.plots quality RESULT.json OUT.svg
    python -m benchmarks.common.plots drift RESULT.json OUT.svg
    python -m benchmarks.common.plots structured QUALITY.json OUT.svg --latency LATENCY.json

Needs matplotlib (`pip install niwaki[plots]`).
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import matplotlib.ticker

matplotlib.rcParams |= {"svg.hashsalt": "niwaki", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
STYLES = ["o-", "s-", "^-", "D-", "v-", "P", "X", "*", "h", "p", "<", ">"]


def quality(result: dict) -> plt.Figure:
    """Plot perplexity by true bits on both texts. A method with several targets is a line."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    by_label: dict[str, list[dict]] = defaultdict(list)
    for row in result["rows"]:
        by_label[row["label"]].append(row)
    for axis, text in zip(axes, ("reviews", "wikitext2"), strict=True):
        ordered = sorted(by_label.items(), key=lambda item: -len(item[1]))  # lines first, then single points
        for (label, rows), style in zip(ordered, STYLES, strict=False):
            points = sorted(
                (statistics.mean(run["bits"] for run in row["runs"]), row[text]["mean"], row[text]["stdev"] or 0)
                for row in rows
            )
            bits, means, spreads = zip(*points, strict=True)
            axis.errorbar(bits, means, yerr=spreads, fmt=style, label=label, markersize=4, linewidth=1, capsize=2)
        axis.axhline(result["dense"][text], color="black", linestyle=":", linewidth=1)
        axis.text(axis.get_xlim()[1], result["dense"][text], "dense ", ha="right", va="bottom")
        axis.set(yscale="log", xlabel="true bits a weight (everything stored)", title=text)
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(matplotlib.ticker.FormatStrFormatter("%g"))
    axes[0].set_ylabel("perplexity")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"{result['model']}, mean and standard deviation of the calibration seeds")
    return figure


def drift(result: dict) -> plt.Figure:
    """Plot the relative squared error of the hidden states after every block, on seen and on unseen text."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    by_label: dict[str, list[dict]] = defaultdict(list)
    for row in result["rows"]:
        by_label[row["label"]].append(row)
    for axis, text in zip(axes, ("calibration", "unseen"), strict=True):
        for label, rows in by_label.items():
            means = [statistics.mean(values) for values in zip(*(row[text] for row in rows), strict=True)]
            style = "--" if "one sweep" in label else "-"
            axis.plot(range(1, len(means) + 1), means, style, marker="o", markersize=3, linewidth=1, label=label)
        axis.set(yscale="log", xlabel="block", title=f"{text} text")
    axes[0].set_ylabel("‖x − y‖² / ‖y‖²")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{result['model']}, squeeze10 at {result['target']}: drift from the dense model")
    return figure


def structured(result: dict, latency: dict) -> plt.Figure:
    """Plot perplexity by the removed parameters, and by the time of a prompt, on both texts."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey="row", layout="constrained")
    share = {(row["target"], row["label"]): row["prompt_share"] for row in latency["rows"]}
    by_label: dict[str, list[dict]] = defaultdict(list)
    for row in result["rows"]:
        by_label[row["label"]].append(row)
    for pair, text in zip(axes, ("reviews", "wikitext2"), strict=True):
        for (label, rows), style in zip(by_label.items(), STYLES, strict=False):
            rows = sorted(rows, key=lambda row: float(row["target"]))
            gone = [row["runs"][0].get("removed_frac", row.get("removed_frac")) for row in rows]
            timed = [row for row in rows if (row["target"], label) in share]
            means, spreads = [row[text]["mean"] for row in rows], [row[text]["stdev"] or 0 for row in rows]
            style_of = {"fmt": style, "label": label, "markersize": 4, "linewidth": 1, "capsize": 2}
            pair[0].errorbar([100 * g for g in gone], means, yerr=spreads, **style_of)
            if timed:
                x = [share[row["target"], label] for row in timed]
                pair[1].errorbar(x, [row[text]["mean"] for row in timed], **style_of)
        for axis in pair:
            axis.axhline(result["dense"][text], color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", title=text)
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(matplotlib.ticker.FormatStrFormatter("%g"))
        pair[0].set(ylabel="perplexity (dotted: dense)", xlabel="parameters of the blocks gone, %")
        pair[1].set(xlabel="seconds of a 512-token prompt, share of dense (CPU)")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{result['model']}, mean and standard deviation of the calibration seeds")
    return figure


def main() -> None:
    """Draw one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["quality", "drift", "structured"])
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--latency", type=Path)
    args = parser.parse_args()
    draw = {"quality": quality, "drift": drift, "structured": structured}[args.kind]
    more = [json.loads(args.latency.read_text())] if args.latency else []
    draw(json.loads(args.result.read_text()), *more).savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
