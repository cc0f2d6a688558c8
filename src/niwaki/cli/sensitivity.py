"""The output of `niwaki inspect MODEL --sensitivity`: a heatmap, tables and plain words, at most 80 columns wide."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from niwaki.cli.heatmap import fewer, print_heatmap
from niwaki.cli.options import print_line
from niwaki.cli.tables import print_table

COLUMNS = 80
CELLS = 40  # of a row of the heatmap
MEANING = (
    "Damage: rise of the loss, in nats per token, with this block alone in the published form of squeeze10 (a fifth of "
    "the columns at four bits, the others at one, rounded to nearest). 2-bit error: relative error of the output of a "
    "block, with all its matrices or with one of them rounded to two bits. 1-bit loss: share of the energy of the "
    "output of a matrix that one bit loses (PBAR). In a fifth: the part of it in the worst fifth of the columns, "
    "which --set salient_frac=0.2 protects."
)


def print_sensitivity(to: Console, result: dict[str, Any]) -> None:
    """Print what every kind of matrix and every block loses, then what follows in words."""
    windows = result["calibration"]["windows"]
    print_line(f"{result['model']}: {windows[0]} windows of {windows[1]} tokens, nothing was written", to)
    blocks, kinds = result["blocks"], result["kinds"]
    print_line("\n2-bit error by depth, first block to last", to)
    rows = {"whole block": ([block["error"] for block in blocks], _mean([block["error"] for block in blocks]))}
    rows |= {name: (row["errors"], row["error"]) for name, row in kinds.items()}
    print_heatmap(to, {_short(name): (fewer(values, CELLS), value) for name, (values, value) in rows.items()}, _figure)
    print_table(
        to,
        ["matrix", "2-bit error", "most in", "1-bit loss", "in a fifth"],
        [
            [_short(name), _figure(row["error"]), f"block {row['max_block']}", _percent(row["lost"]),
             _percent(row["salient_lost"])]
            for name, row in kinds.items()
        ],
    )  # fmt: skip
    print_table(
        to,
        ["block", "damage", "share of all", "2-bit error", "most sensitive matrix"],
        [
            [
                str(block["block"]),
                _figure(block["damage"]),
                _percent(block["share"]),
                _figure(block["error"]),
                _short(block["worst"]),
            ]
            for block in blocks
        ],
    )
    for text in (MEANING, *in_words(result)):
        for line in textwrap.wrap(text, COLUMNS):
            print_line(line, to)


def in_words(result: Mapping[str, Any]) -> list[str]:
    """Return which blocks and kinds of matrices bear least and most, and what the allocations make of it."""
    blocks, kinds = result["blocks"], result["kinds"]
    most, least = result["most_sensitive"], result["least_sensitive"]
    top = 1 - sum(block["share"] for block in blocks if block["block"] not in most)
    by_error = sorted(kinds, key=lambda name: kinds[name]["error"])
    texts = [
        f"Most sensitive: {_blocks(most)}, with {top:.0%} of the damage of all {len(blocks)} blocks. Least sensitive: "
        f"{_blocks(least)}. {by_error[-1]} bears least on average, {by_error[0]} bears most.",
    ]
    for target, kept in result["keep_blocks"].items():
        bits = result["bits"][target]
        spread = sorted(bits, key=lambda name: bits[name])
        keeps = f"--keep-blocks auto keeps {_blocks(kept)} at 4 bits" if kept else "--keep-blocks auto keeps no block"
        given = (
            f"the default of squeeze10 gives {spread[0]} {bits[spread[0]]:.2f} bits and {spread[-1]} "
            f"{bits[spread[-1]]:.2f}"
            if bits[spread[-1]] - bits[spread[0]] > 0.005
            else "the default of squeeze10 gives all kinds the same"
        )
        texts.append(f"At {target}: {keeps}; {given}.")
    return texts


def _blocks(numbers: Sequence[int]) -> str:
    return f"block{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _figure(value: float) -> str:
    """Return three digits that mean something."""
    return f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _short(name: str) -> str:
    """Return a long name without its first parts, so that tables fit."""
    while len(name) > 22 and "." in name:
        name = name.partition(".")[2]
    return name
