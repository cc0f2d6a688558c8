"""Plots of benchmarks/results from its JSON files: perplexity by true bits, by removed share, and drift by depth.

`real` takes files of benchmarks.quality.real_model: the first one ours, the others those of peers.

    python -m benchmarks.common.plots quality RESULT.json OUT.svg
    python -m benchmarks.common.plots drift RESULT.json OUT.svg
    python -m benchmarks.common.plots structured QUALITY.json OUT.svg --latency LATENCY.json
    python -m benchmarks.common.plots real RESULT.json OUT.svg --with PEERS.json

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


LIMIT = 8.0  # times dense: what is above is of no use, and its points are only counted
PRUNED = ("4:8", "2:4", "0.5", "0.7", "0.2", "0.3")  # targets of zeros, then of smaller shapes


def real(result: dict, *others: dict) -> plt.Figure:
    """Plot perplexity over dense by true bits, and by target for what is pruned, on both texts."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey=True, layout="constrained")
    by_label: dict[str, list[dict]] = defaultdict(list)
    for row in (row for one in (result, *others) for row in one["rows"]):
        by_label[row["label"]].append(row)
    for pair, text in zip(axes, ("reviews", "wikitext2"), strict=True):
        for axis, places in zip(pair, (None, PRUNED), strict=True):
            above = 0
            for number, (label, rows) in enumerate(by_label.items()):
                points = [point for row in rows if (point := _point(row, text, places))]
                shown = sorted(point for point in points if point[1] <= LIMIT)
                above += len(points) - len(shown)
                if not shown:
                    continue
                peer = "peer" in rows[0]
                style = {"marker": STYLES[number % len(STYLES)][0], "color": f"C{number % 10}", "markersize": 5}
                style |= {"linestyle": "none" if places else ":" if peer else "-", "linewidth": 1, "label": label}
                style |= {"markerfacecolor": "none"} if peer else {}
                x, means, spreads = zip(*shown, strict=True)
                x = [place + (0.04 * (number % 9 - 4) if places else 0) for place in x]  # side by side
                axis.errorbar(x, means, yerr=spreads, **style)
            axis.axhline(1, color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", title=f"{text}, {above} points above {LIMIT:g} not shown")
            axis.set_xlabel("target" if places else "true bits a weight (everything stored)")
            if places:
                axis.set_xticks(range(len(places)), places)
                axis.set_xlim(-0.5, len(places) - 0.5)
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.legend(fontsize=6, ncols=2)
        pair[0].set_ylabel("perplexity / dense")
    figure.suptitle(f"{result['model']}: mean and standard deviation of the seeds; dotted or hollow: other projects")
    return figure


def _point(row: dict, text: str, places: tuple[str, ...] | None) -> tuple[float, float, float] | None:
    """Return place, mean and deviation of the ratio; None for a row that belongs on the other side."""
    bits, target, ratio = row["runs"][0]["bits"], row["target"], row["ratio"][text]
    if (bits >= 16) != bool(places) or (places and target not in places):
        return None
    return places.index(target) if places else bits, ratio["mean"], ratio["stdev"] or 0


def main() -> None:
    """Draw one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["quality", "drift", "structured", "real"])
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--latency", type=Path)
    parser.add_argument("--with", dest="others", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    draw = {"quality": quality, "drift": drift, "structured": structured, "real": real}[args.kind]
    more = [json.loads(path.read_text()) for path in ([args.latency] if args.latency else args.others)]
    draw(json.loads(args.result.read_text()), *more).savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
