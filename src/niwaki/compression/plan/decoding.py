"""How fast a model can decode at most, one sequence at a time: bytes read for a token over the rate of the memory.

A ceiling: caches of keys and values, activations and every start of a kernel come on top. Zeros that are stored in
place are read like any weight. Beside it stands how much of the ceiling our kernels reached where we measured it: on
the Llama-2-7B shape (benchmarks/results/packed-decode-h100.json) and on the TinyLlama-1.1B shape
(packed-decode-cpu.json; there the gain over dense as a share of what the bytes promise). Pruned codes were not measured
so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from niwaki.compression.plan.machines import Machine
from niwaki.compression.plan.sizes import ModelSizes, Stored
from niwaki.config.recipe import Bits, PrunedBits

PACKED_H100 = "benchmarks/results/packed-decode-h100.json"
PACKED_CPU = "benchmarks/results/packed-decode-cpu.json"
# On an H100: tokens a second, and bytes read for each.
_MEASURED = {"dense": (123.9, 13_214_687_744), "4 bit": (203.8, 3_601_867_264), "1.6 bit": (210.4, 1_564_626_432)}
_H100_BANDWIDTH = 3.35e12
MIN_BYTES = 1e9  # of a model: what takes less than the start of its kernels is not like those that were measured
# On a CPU of two cores: speed-up over dense, and how many times fewer bytes.
_CPU_SPEEDUP = (2.96, 2_200_119_888 / 458_441_168)


class Planned(Protocol):
    """What is read of a stage."""

    @property
    def stored(self) -> Stored:
        """Its files."""

    @property
    def target(self) -> Any:
        """What it was asked for."""


def decoding(dense: ModelSizes, stages: Sequence[Planned], machine: Machine) -> dict[str, Any]:
    """Ceilings before and after, and what kernels reached of them (None where nobody measured)."""
    last = stages[-1]
    met = sum(block.other_bytes + sum(m.dense_bytes * m.reach for m in block.matrices) for block in dense.blocks)
    before, after = met + dense.head_bytes, last.stored.read_bytes
    found: dict[str, Any] = {"machine": machine.name, "bandwidth_bytes_per_s": machine.bandwidth}
    for name, nbytes, kind in ("before", before, "dense"), ("after", after, _kind(last.target)):
        ceiling = machine.bandwidth / nbytes
        share = _share(machine, kind) if before >= MIN_BYTES else None
        found[name] = {
            "bytes_per_token": round(nbytes),
            "fits": (dense.file_bytes if name == "before" else last.stored.file_bytes) < machine.memory_bytes,
            "ceiling_tokens_per_s": round(ceiling, 3),
            "reached_tokens_per_s": None if share is None else round(share * ceiling, 3),
            "reached_share": None if share is None else round(share, 3),
        }
    found["speedup_ceiling"] = round(before / after, 3)
    found["speedup_reached"] = _speedup(found, machine, before / after, _kind(last.target))
    found["source"] = _source(machine)
    return found


def _kind(target: Any) -> str | None:
    """Which of the measured formats is nearest; none to codes without those of zeros."""
    if isinstance(target, PrunedBits):
        return None
    if not isinstance(target, Bits):
        return "dense"
    return "4 bit" if target.bits > 2.5 else "1.6 bit"


def _share(machine: Machine, kind: str | None) -> float | None:
    if machine.name != "h100" or kind is None:
        return None
    speed, nbytes = _MEASURED[kind]
    return speed * nbytes / _H100_BANDWIDTH


def _speedup(found: Mapping[str, Any], machine: Machine, ratio: float, kind: str | None) -> float | None:
    speeds = [found[name]["reached_tokens_per_s"] for name in ("before", "after")]
    if None not in speeds:
        return float(round(speeds[1] / speeds[0], 3))
    if machine.name == "cpu" and kind not in (None, "dense") and found["before"]["bytes_per_token"] >= MIN_BYTES:
        gained, promised = _CPU_SPEEDUP
        return round(1 + (ratio - 1) * (gained - 1) / (promised - 1), 3)
    return None


def _source(machine: Machine) -> str | None:
    return {"h100": PACKED_H100, "cpu": PACKED_CPU}.get(machine.name)
