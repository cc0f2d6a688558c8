"""Tables of blocks.jsonl of a result: the compression of every matrix, and its error.

A measure is a matrix of blocks × projections, averaged over the experts of a projection:

- `bits`: true bits per weight, scales included
- `zeros`: share of zeros
- `kept`: share of heads or neurons that stay
- `error`: relative squared error of the output

Cost: one pass over the lines.

    layers = read_layers(Path("OUT"));  layers.measures["bits"]
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.errors import CheckpointError

LINES = Path("niwaki") / "blocks.jsonl"
_KEPT = re.compile(r"^(\d+) of (\d+) ")
_EXPERT = re.compile(r"\.\d+\.")
_READ = {"block", "matrix", "shape", "target", "kind", "zeros_frac", "bytes", "bits", "error_before_update", "error"}


@dataclass(frozen=True)
class Measure:
    """Values of every projection (rows) in every block (columns), None for a missing matrix."""

    name: str
    blocks: tuple[int, ...]
    projections: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    @property
    def known(self) -> list[float]:
        """Return all values that are not None."""
        return [value for row in self.values for value in row if value is not None]


@dataclass(frozen=True)
class Layers:
    """Lines of one result. By block: `growth` is its own error, `drift` the error of all blocks up to it."""

    lines: tuple[dict[str, Any], ...]
    measures: dict[str, Measure]
    growth: dict[int, float]
    drift: dict[int, float]


def read_layers(folder: Path) -> Layers | None:
    """Read the record of a result, None for a model that niwaki did not compress.

    Raises CheckpointError for a broken record.
    """
    path = folder / LINES
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        missing = next(filter(None, (_READ - set(line) for line in lines)), None)
        if missing:
            raise ValueError(f"a line has no {', '.join(sorted(missing))}")
        return layers_of(lines)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a record of niwaki ({error}): compress again, or remove it") from error


def layers_of(lines: list[dict[str, Any]]) -> Layers:
    """Return the measures of these lines. A measure that is trivial everywhere (no zeros, all kept) is omitted."""
    measures = {}
    for name, value_of, is_informative in (
        ("kept", _kept, lambda values: min(values) < 1),
        ("zeros", _zeros, lambda values: max(values) > 0),
        ("bits", _bits, lambda values: True),
        ("error", lambda line: line["error"], lambda values: max(values) > 0),
    ):
        measure = _measure(name, lines, value_of)
        if measure.known and is_informative(measure.known):
            measures[name] = measure
    by_block = {name: {line["block"]: line[name] for line in lines if line.get(name) is not None}
                for name in ("block_error", "drift")}  # fmt: skip
    return Layers(tuple(lines), measures, by_block["block_error"], by_block["drift"])


def _measure(name: str, lines: list[dict[str, Any]], value_of: Any) -> Measure:
    cells = defaultdict(list)
    for line in lines:
        value = value_of(line)
        if value is not None:
            cells[_EXPERT.sub(".*.", line["matrix"]), line["block"]].append(float(value))
    blocks = tuple(sorted({line["block"] for line in lines}))
    projections = tuple(dict.fromkeys(projection for projection, _ in cells))
    return Measure(
        name,
        blocks,
        projections,
        tuple(
            tuple(sum(own) / len(own) if (own := cells.get((row, block))) else None for block in blocks)
            for row in projections
        ),
    )


def _kept(line: dict[str, Any]) -> float | None:
    match = _KEPT.match(line["target"])
    return int(match[1]) / int(match[2]) if match else None


def _zeros(line: dict[str, Any]) -> float | None:
    """Return the share of pruned weights. A quantization code that happens to be zero does not count."""
    return None if line["kind"] == "codes" and "bit" in line["target"] else line["zeros_frac"]


def _bits(line: dict[str, Any]) -> float | None:
    return line["bits"] if "stored" in line or line["kind"] == "codes" else None
