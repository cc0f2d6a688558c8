"""Limits of a roll-out by the names of `signals`: defaults, a gate file, or the measurements of `niwaki compare`.

The limits of a compare.json are those that `niwaki gate --init` writes: a margin beyond the values that the pilot
certainly keeps. Gates that traffic cannot measure (bytes, accuracies, KL) belong to `niwaki gate`. A signal without a
limit in the file keeps its default. Quality has no default, because the user decides how much may be lost.

    limits_from(Path("report/compare.json"), candidate="four")  ->  {"error_rate": 0.002, "top1_agreement": 0.83, ...}
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

from niwaki.errors import InputError
from niwaki.rollout.signals import QUALITY, SIGNALS

DEFAULTS: Mapping[str, float] = MappingProxyType(
    {"error_rate": 0.002, "prefill_latency_ratio": 1.5, "decode_latency_ratio": 1.5}
)
MARGIN = 0.1


def limits_from(
    path: Path | None,
    *,
    candidate: str | None = None,
    given: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the defaults, replaced by the file (gate.yaml or compare.json), then by `given`. Raise InputError."""
    limits = {**DEFAULTS, **({} if path is None else _read(path, candidate)), **(given or {})}
    for name, limit in limits.items():
        _check(name, limit)
    return limits


def quality_of(limits: Mapping[str, float]) -> list[str]:
    """Return the limited signals that audits measure."""
    return [name for name in QUALITY if name in limits]


def _read(path: Path, candidate: str | None) -> dict[str, float]:
    # A lazy import: compare needs torch, and a gateway without a file does not.
    from niwaki.measure.compare.baseline import gate_text
    from niwaki.measure.compare.gates import Gates, load_gates
    from niwaki.measure.schema import read_comparison

    if path.suffix == ".json":
        gates = Gates(**yaml.safe_load(gate_text(read_comparison(path), candidate, MARGIN)))
    elif candidate is not None:
        raise InputError(f"{path} has no candidates: --candidate goes with the compare.json of a report")
    else:
        gates = load_gates(path)
    named = {gate.partition("_")[2]: limit for gate, limit in gates.limits.items()}
    return {name: limit for name, limit in named.items() if name in SIGNALS}


def _check(name: str, limit: float) -> None:
    if name not in SIGNALS:
        from niwaki.errors import unknown

        raise InputError(unknown("signal", name, SIGNALS))
    signal = SIGNALS[name]
    at = signal.scaled(limit)
    if not 0 < at < 1 or abs(signal.value(at) - limit) > 1e-9 + 1e-6 * abs(limit):
        ends = sorted((signal.value(0.0), signal.value(1.0)))
        raise InputError(f"the limit of {name} must lie between {ends[0]:g} and {ends[1]:g}, got {limit:g}")
