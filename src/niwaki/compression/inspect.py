"""Summary of a result from its records: which weights were removed or rounded, where, and at what error.

Only OUT/niwaki is read: run.json, blocks.jsonl, and the predictor if there is one. No model is loaded. The `measure` of
a result has one value per matrix:

- `zeros_frac`: share of zeros
- `bits`: bits per weight
- `removed_frac`: share of removed rows or columns
- `run_frac`: share of heads and neurons that run

    found = inspect("OUT")
    found["blocks"][3]["error"], found["matrices"]["mlp.down_proj"]["values"]
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.compression.run_record import RECORD, MatrixRecord, RunRecord, read_lines, read_run
from niwaki.config.targets import format_blocks, parse_target
from niwaki.errors import CheckpointError, faults_of
from niwaki.methods.registry import get_method

WORST = 5  # matrices that the summary names
_EXPERT = re.compile(r"\.\d+(?=\.|$)")


def inspect(out: str | Path) -> dict[str, Any]:
    """Return the summary of a result; the functions that make its parts explain their keys.

    Raises InputError for a folder that niwaki did not write, CheckpointError for an incomplete record.
    """
    folder = Path(out)
    record, lines = read_run(folder), read_lines(folder)
    with faults_of(f"{folder / RECORD} holds records that do not fit together", "compress again"):
        return _summary(folder, record, lines)


def _summary(folder: Path, record: RunRecord, lines: Sequence[MatrixRecord]) -> dict[str, Any]:
    measure = measure_of(record, lines)
    summary = {
        "out": str(folder),
        "kind": "pruned and quantized" if _two_kinds(lines) else _KINDS[measure],
        "measure": measure,
        "made": _made(record),
        "measured": _measured(record),
        "methods": [methods_line(name) for name in record.recipe.method.split("+")],
        "options": record.options,
        "allocation": _allocation(record),
        "matrices": _matrices(lines, measure),
        "blocks": _blocks(lines, measure),
        "worst": _worst(lines),
        "kept_dense": {} if record.kept_dense is None else record.kept_dense.dump(),
        "notes": record.result.notes,
        "stages": [_made(stage) | {"allocation": _allocation(stage)} for stage in record.stages],
        "named": None if record.result.named is None else record.result.named.dump(),
        "earlier": [_made(run) for run in record.earlier if isinstance(run, RunRecord)],
        "runs": {str(block): run_of(record, block) for block in sorted({line.block for line in lines})},
    }
    if measure == "run_frac":
        summary |= _contextual(folder, record)
    return summary


def measure_of(record: RunRecord, lines: Sequence[MatrixRecord]) -> str:
    """Return the measure of a result (see the module)."""
    if record.result.predictor is not None:
        return "run_frac"
    if any(line.method_bits is not None or line.kind == "codes" for line in lines):
        return "bits"
    return "removed_frac" if any(line.kind == "sliced" for line in lines) else "zeros_frac"


def value_of(line: MatrixRecord, measure: str) -> float:
    """Return the value of `measure` for one matrix."""
    if measure == "bits":
        return line.bits if line.method_bits is None else line.method_bits
    if measure == "removed_frac":
        kept, _, rest = line.target.partition(" of ")
        return 1 - int(kept) / int(rest.split()[0])
    return line.zeros_frac


def both(line: MatrixRecord) -> bool:
    """Return whether the target of the matrix has zeros and bits."""
    return "+" in line.target


def _two_kinds(lines: Sequence[MatrixRecord]) -> bool:
    """Return whether the result has zeros and codes, in the same matrices or in different ones."""
    return {"masked", "codes"} <= {line.kind for line in lines} or any(both(line) for line in lines)


def methods_line(name: str) -> str:
    """Return the first sentence of the description of a method, by its name."""
    return f"{name}: {get_method(name).doc.partition(chr(10))[0].partition(': ')[2]}"


def kind_of(matrix: str) -> str:
    """Return the name of a matrix without the number of its expert, which is the name of a row of the heatmap."""
    return _EXPERT.sub(".*", matrix)


_KINDS = {"zeros_frac": "pruned", "bits": "quantized", "removed_frac": "structured", "run_frac": "contextual"}


def _made(record: RunRecord) -> dict[str, Any]:
    """Return recipe, date, version and device of a run."""
    recipe, windows = record.recipe, record.calibration.windows
    return {
        "method": recipe.method,
        "target": recipe.target or f"{recipe.target_bytes:,} bytes",
        "calibration": None if windows is None else {"windows": windows[0], "tokens": windows[1]},
        "pack": recipe.pack,
        "embeddings": recipe.embeddings,
        **({} if recipe.blocks is None else {"blocks": format_blocks(recipe.blocks)}),
        "seed": recipe.seed,
        "device": record.device,
        "date": record.date,
        "niwaki": record.niwaki,
    }


def _measured(record: RunRecord) -> dict[str, Any]:
    """Return measured bytes, zeros, bits, time and memory."""
    names = {"bytes", "zeros_frac", "bits", "method_bits", "embeddings_bits", "packed", "matrices", "weights"}
    return {
        "dense_bytes": record.origin.dense_bytes,
        **{name: value for name, value in record.result.dump().items() if name in names},
        **{name: getattr(record, name) for name in ("seconds", "peak_rss_bytes", "peak_device_bytes")},
    }


def _allocation(record: RunRecord) -> dict[str, Any]:
    """Return the name of the rule that set the target of each block, and the numbers that it used."""
    return {"rule": record.recipe.allocation, **record.allocation.dump()}


def _matrices(lines: Sequence[MatrixRecord], measure: str) -> dict[str, dict[str, Any]]:
    """Return by kind of matrix: the value in every block (the mean over experts), and the errors."""
    kinds = dict.fromkeys(kind_of(line.matrix) for line in lines)
    blocks = sorted({line.block for line in lines})
    rows = {}
    for kind in kinds:
        own = [line for line in lines if kind_of(line.matrix) == kind]
        by_block = [[value_of(line, measure) for line in own if line.block == block] for block in blocks]
        errors = [line.error for line in own if line.error is not None]
        rows[kind] = {
            "values": [mean(values) for values in by_block],
            "value": _weighted(own, measure),
            "bytes": sum(line.bytes for line in own),
            "error": mean(errors),
            "max_error": max(errors, default=None),
        }
    return rows


def run_of(record: RunRecord, block: int) -> int | None:
    """Return which run compressed a block last: 0 for this one, 1 for the one before, …; None if none did."""
    for number, run in enumerate((record, *record.earlier[::-1])):
        if isinstance(run, RunRecord) and (run.recipe.blocks is None or block in run.recipe.blocks):
            return number
    return None


def _blocks(lines: Sequence[MatrixRecord], measure: str) -> list[dict[str, Any]]:
    """Return by block, in depth: its value, bytes, the error of its output, and the drift of all blocks up to it."""
    rows = []
    for block in sorted({line.block for line in lines}):
        own = [line for line in lines if line.block == block]
        errors = {line.matrix: line.error for line in own if line.error is not None}
        rows.append({
            "block": block,
            "gone": all(0 in line.shape for line in own),
            measure: _weighted(own, measure),
            "bytes": sum(line.bytes for line in own),
            "error": own[0].block_error,
            "drift": own[0].drift,
            "worst": max(errors, key=lambda name: errors[name]) if errors else None,
            "worst_error": max(errors.values(), default=None),
        })  # fmt: skip
    return rows


def _worst(lines: Sequence[MatrixRecord]) -> list[dict[str, Any]]:
    """Return the matrices with the largest output errors.

    Sliced matrices count only if they were refitted: the others produce units that the next matrix no longer reads.
    """
    known = [line for line in lines if line.error and (line.kept_groups is not None or line.kind != "sliced")]
    names = ("block", "matrix", "target", "zeros_frac", "bits", "error_before_update", "error")
    worst = sorted(known, key=lambda line: -(line.error or 0))[:WORST]
    return [{name: getattr(line, name) for name in names} for line in worst]


def _contextual(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return the units that run for an average prompt, by block, and the settings of the predictor."""
    from niwaki.runtime.contextual.predictor_files import InputShadow, has_shadow, read_shadow
    from niwaki.runtime.contextual.units import KINDS

    if not has_shadow(folder):
        raise CheckpointError(f"{folder} has no predictor beside its record: compress again")
    shadow = read_shadow(folder)
    if isinstance(shadow, InputShadow):
        return _inputs(shadow, record)
    layout, predictor = shadow.layout, shadow.predictor
    kept = layout.split(shadow.rule.select(predictor.prior_U[None], layout))
    scores = layout.split(predictor.prior_U[None])
    summary: dict[str, Any] = {"matrices": {}, "blocks": [], "predictor": dict(record.result.predictor or {})}
    for kind, kept_1LG, score_1LG in zip(KINDS, kept, scores, strict=True):
        share_L = (score_1LG * kept_1LG).sum(2)[0] / score_1LG.sum(2)[0].clamp_min(1e-12)
        summary["matrices"][kind] = {
            "values": [round(float(v), 6) for v in kept_1LG.float().mean(2)[0]],
            "value": float(kept_1LG.float().mean()),
            "importance": [round(float(v), 6) for v in share_L],
            "units": layout.count(kind),
        }
    skip = parse_target(record.recipe.target or "")
    about = {"features": list(predictor.features), "trust": predictor.trust_K2.tolist(), "target": str(skip)}
    summary["predictor"] |= about | {"rule": vars(shadow.rule), "running": vars(shadow.running)}
    return summary


def _inputs(shadow: Any, record: RunRecord) -> dict[str, Any]:
    """Return the inputs that a token reads on average, by block, and the settings of the thresholds."""
    run: dict[str, list[float]] = {}
    for place, share in zip(shadow.places, shadow.shares, strict=True):
        run.setdefault(place.kind, []).append(round(1 - share, 6))
    about = {"target": str(parse_target(record.recipe.target or "")), "running": vars(shadow.running)}
    return {
        "matrices": {kind: {"values": values, "value": mean(values)} for kind, values in run.items()},
        "blocks": [],
        "predictor": dict(record.result.predictor or {}) | about,
    }


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of no values."""
    return sum(values) / len(values) if values else None


def _weighted(lines: Sequence[MatrixRecord], measure: str) -> float:
    """Return the mean over weights, or over matrices if no weights remain."""
    sizes = [line.weights for line in lines] if measure != "removed_frac" else [1] * len(lines)
    sizes = sizes if any(sizes) else [1] * len(lines)
    return sum(value_of(line, measure) * size for line, size in zip(lines, sizes, strict=True)) / sum(sizes)
