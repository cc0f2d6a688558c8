"""What a result says of itself: what was cut, where, why, and at what error.

Read from OUT/niwaki alone (run.json, blocks.jsonl, a predictor if there is one); nothing is loaded, nothing computed
anew. `measure` names what varies over a result, one number for every matrix: `zeros_frac`, `bits` a weight, the share
`removed_frac` of its rows or columns that is gone, or `run_frac`, the share of heads and neurons that run.

    found = inspect("OUT")
    found["blocks"][3]["error"], found["matrices"]["mlp.down_proj"]["values"]
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.compression.run import RECORD
from niwaki.config.recipe import current_fields, parse_target
from niwaki.errors import CheckpointError, InputError
from niwaki.methods.registry import get_method

Line = dict[str, Any]
WORST = 5  # matrices that are named
_EXPERT = re.compile(r"\.\d+(?=\.|$)")


def inspect(out: str | Path) -> dict[str, Any]:
    """The record of a result, summed up; every key is explained where it is made.

    Raises InputError for a folder that niwaki did not write, CheckpointError for a record that is not whole.
    """
    folder = Path(out)
    record, lines = read_record(folder), read_lines(folder)
    measure = measure_of(record, lines)
    found = {
        "out": str(folder),
        "kind": "pruned and quantized" if any(both(line) for line in lines) else _KINDS[measure],
        "measure": measure,
        "made": _made(record),
        "measured": _measured(record),
        "methods": [methods_line(name) for name in record["recipe"]["method"].split("+")],
        "options": record.get("options", {}),
        "allocation": _allocation(record),
        "matrices": _matrices(lines, measure),
        "blocks": _blocks(lines, measure),
        "worst": _worst(lines),
        "notes": record["result"]["notes"],
        "stages": [_made(stage) | {"allocation": _allocation(stage)} for stage in record.get("stages", ())],
    }
    if measure == "run_frac":
        found |= _contextual(folder, record)
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The content of run.json. Raises InputError where there is none."""
    path = folder / RECORD / "run.json"
    if not path.is_file():
        raise InputError(f"{folder} is no result of niwaki: expected {path}; give the OUT of `niwaki compress`")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "recipe" not in record or "result" not in record:
            raise InputError(f"{folder} holds no compression: give the OUT of `niwaki compress`")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): compress again") from error
    return record


def read_lines(folder: Path) -> list[Line]:
    """The lines of blocks.jsonl, a matrix each; none for a result that changed no matrix."""
    path = folder / RECORD / "blocks.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): compress again") from error


def measure_of(record: dict[str, Any], lines: Sequence[Line]) -> str:
    """What varies over the result (see above)."""
    if "predictor" in record["result"]:
        return "run_frac"
    if any("method_bits" in line or line["kind"] == "codes" for line in lines):
        return "bits"
    return "removed_frac" if any(line["kind"] == "sliced" for line in lines) else "zeros_frac"


def value_of(line: Line, measure: str) -> float:
    """What `measure` is for one matrix."""
    if measure == "bits":
        return float(line["method_bits"] if "method_bits" in line else line["bits"])
    if measure == "removed_frac":
        kept, _, rest = line["target"].partition(" of ")
        return 1 - int(kept) / int(rest.split()[0])
    return float(line[measure])


def both(line: Line) -> bool:
    """Whether the matrix was asked for zeros and for bits."""
    return "+" in line["target"]


def methods_line(name: str) -> str:
    """The first sentence of a method's description, by its name."""
    return f"{name}: {get_method(name).doc.partition(chr(10))[0].partition(': ')[2]}"


def kind_of(matrix: str) -> str:
    """The name of a matrix without the number of its expert: what stands in one row of a heatmap."""
    return _EXPERT.sub(".*", matrix)


_KINDS = {"zeros_frac": "pruned", "bits": "quantized", "removed_frac": "structured", "run_frac": "contextual"}


def _made(record: dict[str, Any]) -> dict[str, Any]:
    """How the result came to be: recipe, date, version, device."""
    recipe, windows = record["recipe"], record["calibration"]["windows"]
    return {
        "method": recipe["method"],
        "target": recipe["target"] or f"{recipe['target_bytes']:,} bytes",
        "calibration": None if windows is None else {"windows": windows[0], "tokens": windows[1]},
        "pack": recipe["pack"],
        "embeddings": current_fields(recipe)["embeddings"],
        "seed": recipe["seed"],
        "device": record["device"],
        "date": record["date"],
        "niwaki": record["niwaki"],
    }


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    """Bytes, zeros, bits, time and memory, as they were measured."""
    result = record["result"]
    names = ("bytes", "zeros_frac", "bits", "method_bits", "ends_bits", "packed", "matrices", "weights")
    return {
        "dense_bytes": record["model"]["bytes"],
        **{name: result[name] for name in names if name in result},
        **{name: record[name] for name in ("seconds", "peak_rss_bytes", "peak_device_bytes")},
    }


def _allocation(record: dict[str, Any]) -> dict[str, Any]:
    """Who decided how much goes where: the rule by name, and what it went by."""
    return {"rule": record["recipe"]["allocation"], **record.get("allocation", {})}


def _matrices(lines: Sequence[Line], measure: str) -> dict[str, dict[str, Any]]:
    """By kind of matrix: the value in every block (the mean over experts), and the errors."""
    kinds = dict.fromkeys(kind_of(line["matrix"]) for line in lines)
    blocks = sorted({line["block"] for line in lines})
    found = {}
    for kind in kinds:
        own = [line for line in lines if kind_of(line["matrix"]) == kind]
        by_block = [[value_of(line, measure) for line in own if line["block"] == block] for block in blocks]
        errors = [line["error"] for line in own if line["error"] is not None]
        found[kind] = {
            "values": [mean(values) for values in by_block],
            "value": _weighted(own, measure),
            "bytes": sum(line["bytes"] for line in own),
            "error": mean(errors),
            "max_error": max(errors, default=None),
        }
    return found


def _blocks(lines: Sequence[Line], measure: str) -> list[dict[str, Any]]:
    """By block, in depth: its value, bytes, the error of its output and the drift of all before it."""
    found = []
    for block in sorted({line["block"] for line in lines}):
        own = [line for line in lines if line["block"] == block]
        errors = {line["matrix"]: line["error"] for line in own if line["error"] is not None}
        found.append({
            "block": block,
            "gone": all(0 in line["shape"] for line in own),
            measure: _weighted(own, measure),
            "bytes": sum(line["bytes"] for line in own),
            "error": own[0].get("block_error"),
            "drift": own[0].get("drift"),
            "worst": max(errors, key=lambda name: errors[name]) if errors else None,
            "worst_error": max(errors.values(), default=None),
        })  # fmt: skip
    return found


def _worst(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The matrices whose outputs lost most; not those whose lost outputs another matrix was refitted to do without."""
    known = [line for line in lines if line["error"] and ("kept_groups" in line or line["kind"] != "sliced")]
    names = ("block", "matrix", "target", "zeros_frac", "bits", "error_before_update", "error")
    return [
        {name: line[name] for name in names}
        for line in sorted(known, key=lambda line: -float(line["error"] or 0))[:WORST]
    ]


def _contextual(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a predictor lets run where a prompt shows nothing unusual, by block, and what it is."""
    from niwaki.runtime.contextual.record import has_shadow, read_shadow
    from niwaki.runtime.contextual.units import KINDS

    if not has_shadow(folder):
        raise CheckpointError(f"{folder} has no predictor beside its record: compress again")
    shadow = read_shadow(folder)
    layout, predictor = shadow.layout, shadow.predictor
    kept = layout.split(shadow.rule.select(predictor.prior_U[None], layout))
    scores = layout.split(predictor.prior_U[None])
    found: dict[str, Any] = {"matrices": {}, "blocks": [], "predictor": dict(record["result"]["predictor"])}
    for kind, kept_1LG, score_1LG in zip(KINDS, kept, scores, strict=True):
        share_L = (score_1LG * kept_1LG).sum(2)[0] / score_1LG.sum(2)[0].clamp_min(1e-12)
        found["matrices"][kind] = {
            "values": [round(float(v), 6) for v in kept_1LG.float().mean(2)[0]],
            "value": float(kept_1LG.float().mean()),
            "importance": [round(float(v), 6) for v in share_L],
            "units": layout.count(kind),
        }
    skip = parse_target(record["recipe"]["target"])
    about = {"features": list(predictor.features), "trust": predictor.trust_K2.tolist(), "target": str(skip)}
    found["predictor"] |= about | {"rule": vars(shadow.rule), "running": vars(shadow.running)}
    return found


def mean(values: Sequence[float]) -> float | None:
    """None for none."""
    return sum(values) / len(values) if values else None


def _weighted(lines: Sequence[Line], measure: str) -> float:
    """The mean over weights; over matrices where none are left."""
    sizes = [math.prod(line["shape"]) for line in lines] if measure != "removed_frac" else [1] * len(lines)
    sizes = sizes if any(sizes) else [1] * len(lines)
    return sum(value_of(line, measure) * size for line, size in zip(lines, sizes, strict=True)) / sum(sizes)
