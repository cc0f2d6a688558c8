"""Everything that is read from a result: hashes of its tensors, and numbers of its records."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

# These numbers belong to the machine or to the moment.
SKIPPED = {
    "command",
    "date",
    "environment",
    "fingerprint",
    "format",
    "files",
    "machine",
    "memory",
    "opening",
    "peak_bytes",
    "peak_device_bytes",
    "peak_rss_bytes",
    "python",
    "seconds",
    "sha256",
    "speed",
    "threads",
    "time",
    "version",
    "versions",
}
TIMED = ("seconds", "per_s", "_latency", "bandwidth", "spread_frac", "speedup")
LONG = 8  # numbers of a list that are kept as one hash

Values = dict[str, Any]


def short_hash(content: bytes) -> str:
    """Return the first 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def tensors_hash(folder: Path) -> str:
    """Hash the name, the type, the shape and the bytes of every tensor of every file below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        inside = path.parent.relative_to(folder).as_posix()
        digest.update(inside.encode())
        with safe_open(path, framework="pt") as file:
            digest.update(json.dumps(file.metadata(), sort_keys=True).encode())
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(dtype_of_bytes()).numpy().tobytes())
    return digest.hexdigest()


def dtype_of_bytes() -> Any:
    """Return the type that shows the bytes of any tensor."""
    import torch

    return torch.uint8


def rounded(value: Any) -> Any:
    """Return a number with 6 significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def skipped(name: str) -> bool:
    """Tell whether a key holds times, places or versions."""
    return name in SKIPPED or any(part in name for part in TIMED)


def numbers(value: Any, path: str = "") -> Values:
    """Flatten JSON to {key path: number}; a long list of numbers becomes its length and its hash."""
    if isinstance(value, bool | int | float):
        return {path: rounded(value)}
    if isinstance(value, dict):
        kept = [(str(name), child) for name, child in value.items() if not skipped(str(name))]
    elif isinstance(value, list | tuple):
        if len(value) > LONG and all(isinstance(child, int | float) for child in value):
            listed = json.dumps([rounded(child) for child in value])
            return {path: f"{len(value)} numbers, {short_hash(listed.encode())}"}
        kept = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {}
    found: Values = {}
    for name, child in kept:
        found |= numbers(child, f"{path}/{name}" if path else name)
    return found


def leaves(value: Any) -> list[Any]:
    """List the values of JSON without their keys."""
    if isinstance(value, dict):
        return [leaf for name, child in value.items() if not skipped(name) for leaf in leaves(child)]
    if isinstance(value, list):
        return [leaf for child in value for leaf in leaves(child)]
    return [rounded(value)]


def folded(value: Any) -> str:
    """Return the count of all values in JSON and one hash of them."""
    found = leaves(value)
    return f"{len(found)} values, {short_hash(json.dumps(found).encode())}"


def columns(lines: list[dict[str, Any]]) -> Values:
    """Return for every key path of many lines the count, and the sum of integers or the hash of all values."""
    found: dict[str, list[Any]] = {}
    for line in lines:
        for path, value in numbers(line).items():
            found.setdefault(path, []).append(value)
    summed: Values = {}
    for path, values in found.items():
        whole = all(type(value) is int for value in values)
        told = f"sum {sum(values)}" if whole else "digits"
        summed[path] = f"{len(values)} values, {told}, {short_hash(json.dumps(values).encode())}"
    return summed


def under(name: str, values: Values) -> Values:
    """Put a name before every key path."""
    return {f"{name}/{path}": value for path, value in values.items()}


def config_text(out: Path) -> str:
    """Return config.json without the field that stops transformers where niwaki is not imported (added later)."""
    text = (out / "config.json").read_text(encoding="utf-8")
    return re.sub(r'\n  "transformers_weights": .*', "", text)


def result_values(out: Path) -> Values:
    """Return the hashes of a result, the names of its files and the numbers of its record."""
    record = json.loads((out / "niwaki/run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text(encoding="utf-8").splitlines()]
    told = {name: record[name] for name in ("result", "allocation", "calibration", "stages") if name in record}
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    weights = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return {
        "weights": tensors_hash(out),
        "config": hashlib.sha256(config_text(out).encode()).hexdigest(),
        "files": ", ".join(names),
        "weight_file_bytes": weights,
        **under("run", numbers(told)),
        **under("blocks", columns(lines)),
    }
