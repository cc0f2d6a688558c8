"""Explanation of one matrix of a result: its scores, its threshold, its errors, and the source of its target.

why("OUT", "model.layers.3.mlp.down_proj")["reasons"]
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from niwaki.compression.inspect import both, kind_of, mean, measure_of, methods_line, run_of, value_of
from niwaki.compression.run_record import AllocationRecord, MatrixRecord, RunRecord, read_lines, read_run
from niwaki.errors import InputError
from niwaki.formats.descriptors import FORMS
from niwaki.formats.quantized import WEIGHT
from niwaki.model.shards import INDEX

ERRORS = ("error_before_update", "error", "block_error", "drift", "heldout_error_start", "heldout_error")
COUNTED = ("salient_columns", "salient_weights", "method_bits", "kept_groups", "row_zeros")


def why(out: str | Path, matrix: str) -> dict[str, Any]:
    """Return what the records hold of one matrix. Its name may be full or the end of it (`3.mlp.down_proj`).

    In one sentence, `chosen_by` is the criterion over the weights. The distribution of the scores and the highest score
    that was cut are `scores` (see `niwaki.methods.mask_scores`); None if weights are not ranked. The sources of the
    target are `reasons`.

    Raises InputError with the nearest name for an unknown matrix.
    """
    folder = Path(out)
    record, lines = read_run(folder), read_lines(folder)
    if not lines:
        raise InputError(
            f"{folder} changed no matrix, it learned which heads and neurons an input needs: "
            f"run `niwaki inspect {folder}` without --why"
        )
    prefix = _prefix(folder, lines)
    line = _find(lines, prefix, matrix)
    measure = measure_of(record, lines)
    number = run_of(record, line.block)
    made = record if not number else record.earlier[-number]
    assert isinstance(made, RunRecord), "only these compress blocks"
    rows, columns = line.shape
    fields = line.dump()
    errors = {name: fields[name] for name in ERRORS if fields.get(name) is not None}
    if (line.kind == "codes" or line.method_bits is not None) and not both(line):
        errors.pop("error_before_update", None)  # no weights were removed
    others = [other for other in lines if kind_of(other.matrix) == kind_of(line.matrix) and other is not line]
    return {
        "matrix": f"{prefix}{line.block}.{line.matrix}",
        "shape": [rows, columns],
        "target": line.target,
        "kind": line.kind,
        "kept": rows * columns - line.zeros,
        "cut": line.zeros,
        "removed": _removed(record, line),
        "bytes": line.bytes,
        "bits": line.bits,
        "tokens": line.tokens,
        "measure": measure,
        "value": value_of(line, measure),
        "value_elsewhere": mean([value_of(other, measure) for other in others]),
        "errors": errors,
        "error_elsewhere": mean([other.error for other in others if other.error is not None]),
        "scores": line.scores,
        "chosen_by": "no run compressed this block" if number is None else _chosen_by(made, line),
        "reasons": [*([] if number is None else _reasons(made, line)), *filter(None, [line.note])],
        "detail": {name: fields[name] for name in COUNTED if name in fields} | _stored(line),
    }


def _prefix(folder: Path, lines: Sequence[MatrixRecord]) -> str:
    """Return the common prefix of the parameter names of all blocks, up to the number of the block."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError):
        return ""
    for line in lines:
        inside = f"{line.block}.{line.matrix}."
        for name in names:
            if (place := f".{name}".find(f".{inside}")) >= 0:
                return str(name[:place])
    return ""


def _find(lines: Sequence[MatrixRecord], prefix: str, asked: str) -> MatrixRecord:
    name = asked.removesuffix(WEIGHT)
    names = {f"{prefix}{line.block}.{line.matrix}": line for line in lines}
    for full, line in names.items():
        if full == name or (name and full.endswith(f".{name}") and name.split(".")[0].isdecimal()):
            return line
    fitting = [full for full in names if full.endswith(f".{name}")]
    near = fitting[:1] or difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    blocks = sorted({line.block for line in lines})
    kinds = ", ".join(dict.fromkeys(kind_of(line.matrix) for line in lines))
    raise InputError(
        f"unknown matrix {asked!r}: {hint}expected {prefix}N.NAME with N from {blocks[0]} to {blocks[-1]} and NAME one "
        f"of {kinds}"
    )


def _chosen_by(record: RunRecord, line: MatrixRecord) -> str:
    """Return the criterion over the weights of this matrix, in one sentence."""
    *pruners, method = (name.strip() for name in record.recipe.method.split("+"))
    about = methods_line(method)
    if both(line):
        ranked = "a score for every weight, the lowest went" if line.scores is not None else "pruned first"
        return f"{ranked}; what was left is rounded to codes. {methods_line(pruners[-1])} {about}"
    if line.scores is not None:
        return f"a score for every weight, the lowest went. {about}"
    if line.kind == "codes" or line.method_bits is not None:
        return f"no weight was cut: each is rounded to the codes it is stored as. {about}"
    if line.kind == "sliced":
        return f"whole heads or neurons went, not single weights: no score of weights exists. {about}"
    if line.zeros and ":" in line.target:
        return (
            "inside the sweep, group by group, on weights that had already been changed: their scores exist only there "
            f"and are not kept. {about}"
        )
    return f"the mask does not follow from one ranking of the weights (it was learned or chosen again). {about}"


def _reasons(record: RunRecord, line: MatrixRecord) -> list[str]:
    """Return the reasons for the target of a matrix, from the numbers of the allocation."""
    rule, allocated, block, target = record.recipe.allocation, record.allocation, line.block, line.target
    if allocated.shape is not None:
        return [_shape_reason(allocated, block, target)]
    if block in (allocated.kept_blocks or ()):
        return [f"block {block} was kept at 4 bits: {_ranked(allocated.sensitivities, block, 'sensitivity')}"]
    if allocated.rest_bits is not None:
        return [f"{allocated.rest_bits:.3f} bits are what the blocks kept at 4 bits leave to the others"]
    if rule == "owl":
        shares = allocated.outlier_shares
        return [f"owl: {_ranked(shares, block, 'share of outlier scores')}; more outliers, fewer zeros"]
    if rule == "sensitivity" and allocated.sensitivities:
        own = allocated.sensitivities[block][line.matrix]
        every = sorted((value for block in allocated.sensitivities for value in block.values()), reverse=True)
        return [
            f"sensitivity: at two bits it alone costs the block {own:.3g} of its output's energy, number "
            f"{every.index(own) + 1} of {len(every)} matrices; bits grow with the logarithm of that for each weight"
        ]
    if line.row_zeros is not None:
        rows = line.row_zeros
        return [f"learned: its rows lose {min(rows)} to {max(rows)} of {line.shape[1]} weights, the block as asked"]
    return [f"uniform: every matrix was given {target}"]


def _shape_reason(allocated: AllocationRecord, block: int, target: str) -> str:
    rank = _ranked(allocated.influence, block, "influence on the residual stream", lowest=True)
    if allocated.shape is not None and block in allocated.shape.dropped:
        return f"block {block} was removed: {rank}"
    tried = len(allocated.trials)
    how = f"the shape with the lowest loss of {tried} tried" if tried else "the shape that the method computes"
    return f"{target} stay in block {block}: {how} ({rank})"


def _ranked(values: Sequence[Any] | None, block: int, what: str, *, lowest: bool = False) -> str:
    """Return the value of a block and its rank among all."""
    if not values or not isinstance(values[block], int | float):
        return f"its {what} was not measured"
    order = sorted(values, reverse=not lowest)
    end = "lowest" if lowest else "highest"
    return f"its {what} is {values[block]:.4g}, number {order.index(values[block]) + 1} of {len(values)} from the {end}"


def _removed(record: RunRecord, line: MatrixRecord) -> int:
    """Return the number of weights that left the file with their heads or neurons."""
    if line.kind != "sliced" or not record.allocation.cut:
        return 0
    kept, _, rest = line.target.partition(" of ")
    count, (rows, columns) = int(rest.split()[0]), line.shape
    return rows * columns * (count - int(kept)) // int(kept) if int(kept) else 0


def _stored(line: MatrixRecord) -> dict[str, Any]:
    return {name: value for name, value in (line.stored or {}).items() if name in FORMS}
