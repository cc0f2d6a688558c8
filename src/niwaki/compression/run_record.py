"""What the finished parts of a result add up to.

A part is one shard: a block, or some of the tensors outside the blocks. Its entry in the journal names the shard and
its tensors (a block that was removed has neither), and holds a line for every matrix in it: those of blocks have a
`block`, embeddings and head a `module`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.formats.record import decode_stored

Entry = Mapping[str, Any]


def block_lines(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The lines of blocks.jsonl."""
    return [line for entry in entries for line in entry["lines"] if "block" in line]


def packed_modules(entries: Iterable[Entry], prefix: Callable[[int], str]) -> dict[str, Any]:
    """How the quantized modules are stored, by name; `prefix(block)` begins the names of a block."""
    stored = [line for entry in entries for line in entry["lines"] if "stored" in line]
    return {line.get("module") or prefix(line["block"]) + line["matrix"]: line["stored"] for line in stored}


def read_plain(shard: Path, modules: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard, quantized `modules` as plain weights of `dtype`."""
    return decode_stored({name: tensor.clone() for name, tensor in load_file(shard).items()}, modules, dtype)


def shard_index(entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    written = [entry for entry in entries if "shard" in entry]
    weight_map = {name: entry["shard"] for entry in written for name in entry["tensors"]}
    total_bytes = sum(entry["tensor_bytes"] for entry in written)
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def result_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """The field `result` of run.json: what was compressed, to how many bits, and what is on the disk."""
    lines = block_lines(entries)
    weights = sum(math.prod(line["shape"]) for line in lines)
    return {
        "weights": weights,
        "zeros_frac": sum(line["zeros"] for line in lines) / weights,
        "bits": round(8 * sum(line["bytes"] for line in lines) / weights, 4),
        **method_bits(lines),
        "packed": sum("stored" in line for line in lines),
        **_sparse(lines),
        "matrices": len(lines),
        **_ends([line for entry in entries for line in entry["lines"] if "module" in line]),
        "notes": sorted({line["note"] for line in lines if line["note"]}),
        "bytes": sum(entry["bytes"] for entry in entries if "shard" in entry),
        "sha256": {entry["shard"]: entry["sha256"] for entry in entries if "shard" in entry},
    }


def method_bits(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return {"method_bits": mean over the weights of all matrices whose method counts bits itself}, or {}.

    Baselines without a packed format write decoded weights, and count the bytes that a packed file would have.
    """
    counted = [line for line in lines if "method_bytes" in line]
    if not counted:
        return {}
    weights = sum(math.prod(line["shape"]) for line in counted)
    return {"method_bits": round(8 * sum(line["method_bytes"] for line in counted) / weights, 4)}


def _sparse(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many matrices are stored as nonzeros, by layout and by kind of values; {} if none is."""
    kinds = [line["stored"]["sparse"] for line in lines if "sparse" in line.get("stored", ())]
    found = {}
    for field, name in ("layout", "sparse"), ("values", "sparse_values"):
        counted = [kind[field] for kind in kinds]
        found[name] = {value: counted.count(value) for value in sorted(set(counted))}
    return found if kinds else {}


def _ends(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Embeddings and head that are stored as codes: their mean bits a weight, and each; {} if there are none."""
    if not lines:
        return {}
    weights = sum(math.prod(line["shape"]) for line in lines)
    ends_bits = round(8 * sum(line["bytes"] for line in lines) / weights, 4)
    return {"ends_bits": ends_bits, "ends": [{k: v for k, v in line.items() if k != "stored"} for line in lines]}
