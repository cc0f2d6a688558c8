"""Ceiling of the decode speed of a model, one sequence at a time: bytes read per token over the memory bandwidth.

Caches of keys and values, activations and kernel launches come on top. Zeros that are stored in place are read like any
weight. The share of the ceiling that our kernels reached is stated where it was measured. On an H100 that is the shape
of Llama-2-7B (benchmarks/results/speed/packed-decode-h100.json). On a CPU it is the shape of TinyLlama-1.1B
(packed-decode-cpu.json), as the gain over dense against the gain in bytes. Pruned codes were not measured this way.
"""

from collections.abc import Mapping
from typing import Any, assert_never

from niwaki.compression.plan.machines import Machine
from niwaki.compression.plan.sizes import ModelSizes, StoredSizes
from niwaki.config.targets import NM, Bits, KeepUnits, PrunedBits, Sparsity, Target

PACKED_H100 = "benchmarks/results/speed/packed-decode-h100.json"
PACKED_CPU = "benchmarks/results/speed/packed-decode-cpu.json"
# On an H100: tokens a second, and bytes read for each.
_MEASURED = {"dense": (123.9, 13_214_687_744), "4 bit": (203.8, 3_601_867_264), "1.6 bit": (210.4, 1_564_626_432)}
_H100_BANDWIDTH = 3.35e12
MIN_BYTES = 1e9  # of a model: what takes less than the start of its kernels is not like those that were measured
# On a CPU of two cores: speed-up over dense, and how many times fewer bytes.
_CPU_SPEEDUP = (2.96, 2_200_119_888 / 458_441_168)


def decoding(dense: ModelSizes, stored: StoredSizes, target: Target, machine: Machine) -> dict[str, Any]:
    """Return the ceilings before and after, and the share that kernels reached (None where it was not measured)."""
    met = sum(block.other_bytes + sum(m.dense_bytes * m.reach for m in block.matrices) for block in dense.blocks)
    before, after = met + dense.head_bytes, stored.read_bytes
    facts: dict[str, Any] = {"machine": machine.name, "bandwidth_bytes_per_s": machine.bandwidth}
    for name, nbytes, kind in ("before", before, "dense"), ("after", after, _kind(target)):
        ceiling = machine.bandwidth / nbytes
        share = _share(machine, kind) if before >= MIN_BYTES else None
        facts[name] = {
            "bytes_per_token": round(nbytes),
            "fits": (dense.file_bytes if name == "before" else stored.file_bytes) < machine.memory_bytes,
            "ceiling_tokens_per_s": round(ceiling, 3),
            "reached_tokens_per_s": None if share is None else round(share * ceiling, 3),
            "reached_share": None if share is None else round(share, 3),
        }
    facts["speedup_ceiling"] = round(before / after, 3)
    facts["speedup_reached"] = _speedup(facts, machine, before / after, _kind(target))
    facts["source"] = _source(machine)
    return facts


def _kind(target: Target) -> str | None:
    """Return the nearest of the measured formats; none is near to pruned codes."""
    match target:
        case Bits():
            return "4 bit" if target.bits > 2.5 else "1.6 bit"
        case PrunedBits():
            return None
        case Sparsity() | NM() | KeepUnits():
            return "dense"
        case _:
            assert_never(target)  # a new kind of target must say what it decodes like


def _share(machine: Machine, kind: str | None) -> float | None:
    if machine.name != "h100" or kind is None:
        return None
    speed, nbytes = _MEASURED[kind]
    return speed * nbytes / _H100_BANDWIDTH


def _speedup(facts: Mapping[str, Any], machine: Machine, ratio: float, kind: str | None) -> float | None:
    speeds = [facts[name]["reached_tokens_per_s"] for name in ("before", "after")]
    if None not in speeds:
        return float(round(speeds[1] / speeds[0], 3))
    if machine.name == "cpu" and kind not in (None, "dense") and facts["before"]["bytes_per_token"] >= MIN_BYTES:
        gained, promised = _CPU_SPEEDUP
        return round(1 + (ratio - 1) * (gained - 1) / (promised - 1), 3)
    return None


def _source(machine: Machine) -> str | None:
    return {"h100": PACKED_H100, "cpu": PACKED_CPU}.get(machine.name)
