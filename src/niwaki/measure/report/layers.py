"""Tables of blocks.jsonl of a result: the compression of every matrix, and its error.

A measure is a matrix of blocks × projections, averaged over the experts of a projection:

- `bits`: true bits per weight, scales included
- `zeros`: share of zeros
- `kept`: share of heads or neurons that stay
- `error`: relative squared error of the output

Cost: one pass over the lines.

    layers = read_layers(Path("OUT"));  layers.measures["bits"]
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.compression.run_record import LINES, RECORD, MatrixRecord, read_lines
from niwaki.errors import faults_of

_KEPT = re.compile(r"^(\d+) of (\d+) ")
_EXPERT = re.compile(r"\.\d+\.")


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

    lines: tuple[MatrixRecord, ...]
    measures: dict[str, Measure]
    growth: dict[int, float]
    drift: dict[int, float]


def read_layers(folder: Path) -> Layers | None:
    """Read the record of a result, None for a model that niwaki did not compress.

    Raises CheckpointError for a broken record.
    """
    if not (folder / RECORD / LINES).is_file():
        return None
    with faults_of(f"{folder / RECORD / LINES} holds lines that do not fit together", "compress again"):
        return layers_of(read_lines(folder))


def layers_of(lines: Sequence[MatrixRecord]) -> Layers:
    """Return the measures of these lines. A measure that is trivial everywhere (no zeros, all kept) is omitted."""
    measures = {}
    for name, value_of, is_informative in (
        ("kept", _kept, lambda values: min(values) < 1),
        ("zeros", _zeros, lambda values: max(values) > 0),
        ("bits", _bits, lambda values: True),
        ("error", lambda line: line.error, lambda values: max(values) > 0),
    ):
        measure = _measure(name, lines, value_of)
        if measure.known and is_informative(measure.known):
            measures[name] = measure
    growth = {line.block: line.block_error for line in lines if line.block_error is not None}
    drift = {line.block: line.drift for line in lines if line.drift is not None}
    return Layers(tuple(lines), measures, growth, drift)


def _measure(name: str, lines: Sequence[MatrixRecord], value_of: Any) -> Measure:
    cells = defaultdict(list)
    for line in lines:
        value = value_of(line)
        if value is not None:
            cells[_EXPERT.sub(".*.", line.matrix), line.block].append(float(value))
    blocks = tuple(sorted({line.block for line in lines}))
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


def _kept(line: MatrixRecord) -> float | None:
    match = _KEPT.match(line.target)
    return int(match[1]) / int(match[2]) if match else None


def _zeros(line: MatrixRecord) -> float | None:
    """Return the share of pruned weights. A quantization code that happens to be zero does not count."""
    return None if line.kind == "codes" else line.zeros_frac


def _bits(line: MatrixRecord) -> float | None:
    return line.bits if line.stored is not None or line.kind == "codes" else None
