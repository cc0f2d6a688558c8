"""One variant against the dense model, in turns: decoding at every batch, then the prefill.

Legend: B sequences, T tokens.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from niwaki.measure.bench.kernels import KernelRun, contextual_kernel, detect_kernels
from niwaki.measure.bench.models import read_bytes, weight_bytes
from niwaki.measure.bench.prefill_decode import TimedWork, decode_work, prefill_work
from niwaki.measure.bench.schema import Cell, Workload, make_cell
from niwaki.measure.bench.timing import MemoryMeter, measure_bandwidth, time_in_turns
from niwaki.measure.bench.variants import VariantModel

WINDOW = "step by step: attention sees a window, which a fixed cache cannot follow"
WAITS = "step by step: a layer waits for the host, which a CUDA graph cannot record"


@dataclass
class TimedModel:
    """A model that takes turns. `reads_all`: a step reads all weights. `peak_bytes`: memory beyond the weights."""

    model: Any
    weight_bytes: int
    reads_all: bool
    graphs: bool
    peak_bytes: int | None = 0

    def note_peak(self, rise: int | None) -> None:
        """Update the peak with the memory that some work took beyond the weights."""
        known = None if self.peak_bytes is None or rise is None else max(self.peak_bytes, rise)
        self.peak_bytes = known

    def read_bytes(self) -> int | None:
        """Return the bytes of weights that a step reads; for a contextual model after its last prompt."""
        if not self.reads_all:
            return None
        whole, running = read_bytes(self.model), getattr(self.model, "contextual", None)
        if running is None:
            return whole
        units: int = running.shadow.weights * self.model.dtype.itemsize
        return whole - round(self.skipped_frac() * units)

    def skipped_frac(self) -> float:
        """Return the share of the weights of all units that a contextual model skipped after its last prompt."""
        running = getattr(self.model, "contextual", None)
        if running is None or not running.records or self.refusal():
            return 0.0
        skipped = running.records[-1].skipped_frac
        return float(skipped[-1]) if skipped else 0.0

    def refusal(self) -> str:
        """Return the reason why a contextual model ran with all of its weights, empty for any other run."""
        running = getattr(self.model, "contextual", None)
        return "" if running is None or not running.records else str(running.records[-1].dense_because)


@dataclass
class _Timing:
    """Seconds of one model for one kind of work at every round."""

    sequences: int
    tokens: int
    steps: int
    run: KernelRun
    note: str
    seconds: list[float] = field(default_factory=list)
    read_bytes: int | None = None


def variant_bytes(variant: VariantModel) -> int:
    """Return the bytes of all tensors of a variant."""
    return weight_bytes(variant.model) + sum(tensor.nbytes for tensor in variant.extra_tensors)


def measure(dense: TimedModel, variant: TimedModel | None, workload: Workload) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time the dense model and a variant in turns, and return the fields of their rows."""
    device = dense.model.device
    sides = [dense] if variant is None else [dense, variant]
    vocabulary = dense.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(batch: int, count: int) -> Tensor:
        return torch.randint(0, vocabulary, (batch, count), generator=generator).to(device)

    rates = [measure_bandwidth(device)]
    decode, prefill = [], None
    for batch in workload.batches:
        ids_BT = tokens(batch, workload.context)
        decode.append(_time(sides, workload, _decoding(ids_BT, workload), batch, workload.new_tokens))
    if workload.prompt_tokens:
        ids_1T = tokens(1, workload.prompt_tokens)
        prefill = _time(sides, workload, lambda side, _: prefill_work(side.model, ids_1T), 1, 0)
    rates.append(measure_bandwidth(device))
    rows = []
    for number, side in enumerate(sides):
        peak = None if side.peak_bytes is None else side.weight_bytes + side.peak_bytes
        rows.append(
            {
                "weight_bytes": side.weight_bytes,
                "peak_bytes": peak,
                "bandwidth_bytes_per_s": mean(rates),
                "decode": tuple(_cell(timings, number, mean(rates)) for timings in decode),
                "prefill": None if prefill is None else _cell(prefill, number, None),
            }
        )
    return rows[0], rows[-1]


def _decoding(ids_BT: Tensor, workload: Workload) -> Callable[[TimedModel, KernelRun], TimedWork]:
    def make(side: TimedModel, run: KernelRun) -> TimedWork:
        return decode_work(side.model, ids_BT, workload.new_tokens, graphs=side.graphs and not run.waits)

    return make


def _time(
    sides: list[TimedModel],
    workload: Workload,
    make: Callable[[TimedModel, KernelRun], TimedWork],
    sequences: int,
    steps: int,
) -> list[_Timing]:
    """Time the same work of all models in turns. `steps` 0: a prefill."""
    timings, works = [], []
    rows = sequences if steps else workload.prompt_tokens
    for side in sides:
        run = detect_kernels(side.model, rows)
        work, meter = make(side, run), MemoryMeter(side.model.device)
        before = meter.level()
        work.warm_up()
        held = max(meter.level() - before, 0)
        works.append(_metered(side, work, held))
        contextual = steps and getattr(side.model, "contextual", None) is not None
        note = WAITS if run.waits and side.graphs and steps else ""
        note = WINDOW if sides[0].graphs and not side.graphs and steps else note
        if contextual:
            refusal = side.refusal()
            what = side.model.contextual.shadow.what
            note = f"all weights: {refusal}" if refusal else f"skips {side.skipped_frac():.0%} of {what}"
            run = run if refusal else KernelRun(contextual_kernel(side.model, rows))
        tokens = sequences * steps or workload.prompt_tokens
        timings.append(_Timing(sequences, tokens, steps, run, note))
    seconds_of_all = time_in_turns(works, workload.rounds, workload.seconds)
    for timing, side, seconds in zip(timings, sides, seconds_of_all, strict=True):
        timing.seconds = seconds
        timing.read_bytes = side.read_bytes() if steps else None
    works.clear()
    gc.collect()  # free recorded steps and caches before the next kind of work
    return timings


def _metered(side: TimedModel, work: TimedWork, held_bytes: int) -> Callable[[], float]:
    meter = MemoryMeter(side.model.device)

    def run() -> float:
        meter.begin()
        seconds = work.run()
        rise = meter.rise()
        side.note_peak(None if rise is None else held_bytes + rise)
        return seconds

    return run


def _cell(timings: list[_Timing], number: int, rate: float | None) -> Cell:
    own = timings[number]
    return make_cell(
        own.sequences,
        own.tokens,
        timings[0].seconds,
        own.seconds,
        own.run.kernel,
        steps=max(own.steps, 1),
        read_bytes=own.read_bytes,
        bandwidth=rate,
        note=own.note,
    )
