"""Sums over the finished parts of a result, from the entries of its journal.

They are the field `result` of run.json, the index of the shards, and the descriptions of the packed modules.

    record = result_of(entries)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from niwaki.compression.run_record import JournalEntry, MatrixRecord, ModuleRecord, ResultRecord


def packed_modules(entries: Iterable[JournalEntry], disk_module: Callable[[int, str], str]) -> dict[str, Any]:
    """Return the descriptions of the packed modules by name on disk; `disk_module(block, matrix)` names a matrix."""
    modules: dict[str, Any] = {}
    for line in (line for entry in entries for line in entry.lines or () if line.stored is not None):
        modules[line.module if isinstance(line, ModuleRecord) else disk_module(line.block, line.matrix)] = line.stored
    return modules


def shard_index(entries: Sequence[JournalEntry]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    weight_map = {name: entry.shard for entry in entries if entry.shard for name in entry.tensors}
    total_bytes = sum(entry.tensor_bytes for entry in entries if entry.shard)
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def result_of(entries: Sequence[JournalEntry], blocks: Sequence[int] | None = None) -> ResultRecord:
    """Return the sums over the finished parts: weights, bits, and files; and over the named `blocks`, if any."""
    lines = [line for entry in entries for line in entry.matrices]
    named = {} if blocks is None else {"blocks": list(blocks), **_sums([one for one in lines if one.block in blocks])}
    if "method_bits" in named:  # what this run leaves counts as it is stored
        lines = [one if one.block in named["blocks"] else _counted(one) for one in lines]
    fields = {
        **_sums(lines),
        **_sparse(lines),
        **_embeddings([line for entry in entries for line in entry.modules]),
        "notes": sorted({line.note for line in lines if line.note}),
        "bytes": sum(entry.bytes for entry in entries if entry.shard),
        "sha256": {entry.shard: entry.sha256 for entry in entries if entry.shard},
        **({"named": named} if named else {}),
    }
    return ResultRecord.model_validate(fields)


def _counted(line: MatrixRecord) -> MatrixRecord:
    """Return the line with the bytes that its method counts; those of the file if it counts none."""
    return line if line.method_bytes is not None else line.model_copy(update={"method_bytes": line.bytes})


def _sums(lines: Sequence[MatrixRecord]) -> dict[str, Any]:
    weights = sum(line.weights for line in lines)
    return {
        "weights": weights,
        "zeros_frac": sum(line.zeros for line in lines) / weights,
        "bits": round(8 * sum(line.bytes for line in lines) / weights, 4),
        **method_bits(lines),
        "packed": sum(line.stored is not None for line in lines),
        "matrices": len(lines),
    }


def method_bits(lines: Sequence[MatrixRecord]) -> dict[str, float]:
    """Return {"method_bits": mean over the weights of all matrices whose method counts bits itself}, or {}.

    Baselines without a packed format write decoded weights, and count the bytes that a packed file would have.
    """
    counted = [(line.weights, line.method_bytes) for line in lines if line.method_bytes is not None]
    if not counted:
        return {}
    return {"method_bits": round(8 * sum(own for _, own in counted) / sum(weights for weights, _ in counted), 4)}


def _sparse(lines: Sequence[MatrixRecord]) -> dict[str, Any]:
    """Return how many matrices are stored as nonzeros, by layout and by kind of values; {} if none is."""
    kinds = [line.stored["sparse"] for line in lines if line.stored is not None and "sparse" in line.stored]
    counts = {}
    for field, name in ("layout", "sparse"), ("values", "sparse_values"):
        values = [kind[field] for kind in kinds]
        counts[name] = {value: values.count(value) for value in sorted(set(values))}
    return counts if kinds else {}


def _embeddings(lines: Sequence[ModuleRecord]) -> dict[str, Any]:
    """Return the mean bits of embeddings and head that are stored as codes, and their records; {} if none are."""
    if not lines:
        return {}
    bits = round(8 * sum(line.bytes for line in lines) / sum(line.weights for line in lines), 4)
    records = [ModuleRecord.model_validate(line.model_dump(exclude={"stored"}, exclude_unset=True)) for line in lines]
    return {"embeddings_bits": bits, "embeddings": records}
