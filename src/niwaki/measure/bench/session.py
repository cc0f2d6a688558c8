"""One form against the dense model: every batch, then the prompt, in turns; then what the seconds mean.

Legend: B sequences, T tokens.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from niwaki.measure.bench.decoding import Work, reading, writing
from niwaki.measure.bench.kernels import Ran, contextual_kernel, what_runs
from niwaki.measure.bench.models import read_bytes, weight_bytes
from niwaki.measure.bench.schema import Cell, cell
from niwaki.measure.bench.timing import Meter, bandwidth, in_turns
from niwaki.measure.bench.variants import Made

WINDOW = "step by step: attention sees a window, which a fixed cache does not follow"
WAITS = "step by step: a layer waits for the host, which no CUDA graph holds"


@dataclass(frozen=True)
class Plan:
    """What is timed. `rounds` turns of each kind of work, fewer once `seconds` have passed."""

    batches: tuple[int, ...]
    context: int
    new_tokens: int
    prompt_tokens: int
    rounds: int
    seconds: float


@dataclass
class Side:
    """A model that takes turns. `counted`: whether a step reads all of its weights; `peak_bytes` grows on the way."""

    model: Any
    weight_bytes: int
    counted: bool
    graphs: bool
    peak_bytes: int | None = 0

    def note_peak(self, rise: int | None) -> None:
        """What some work took beyond the weights."""
        known = None if self.peak_bytes is None or rise is None else max(self.peak_bytes, rise)
        self.peak_bytes = known

    def read_bytes(self) -> int | None:
        """What a step reads of the weights, after the last prompt that a contextual model answered."""
        if not self.counted:
            return None
        whole, running = read_bytes(self.model), getattr(self.model, "contextual", None)
        if running is None:
            return whole
        layout = running.shadow.layout
        units: int = layout.blocks * sum(layout.weights.values()) * self.model.dtype.itemsize
        return whole - round(self.skipped_frac() * units)

    def skipped_frac(self) -> float:
        """The share of the weights of all units that a contextual model skipped behind its last prompt."""
        running = getattr(self.model, "contextual", None)
        if running is None or not running.records or self.refusal():
            return 0.0
        skipped = running.records[-1].skipped_frac
        return float(skipped[-1]) if skipped else 0.0

    def refusal(self) -> str:
        """Why a contextual model ran with all of its weights; empty if it did not, or is none."""
        running = getattr(self.model, "contextual", None)
        return "" if running is None or not running.records else str(running.records[-1].dense_because)


@dataclass
class _Timed:
    """Seconds of one kind of work of a side at every round."""

    sequences: int
    tokens: int
    steps: int
    ran: Ran
    note: str
    seconds: list[float] = field(default_factory=list)
    read_bytes: int | None = None


def weigh(made: Made) -> int:
    """Bytes of all that a form holds."""
    return weight_bytes(made.model) + sum(tensor.nbytes for tensor in made.beside)


def measure(dense: Side, form: Side | None, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the rows of both sides (of the dense one for this session alone)."""
    device = dense.model.device
    sides = [dense] if form is None else [dense, form]
    vocabulary = dense.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(batch: int, count: int) -> Tensor:
        return torch.randint(0, vocabulary, (batch, count), generator=generator).to(device)

    rates = [bandwidth(device)]
    decode, prefill = [], None
    for batch in plan.batches:
        ids_BT = tokens(batch, plan.context)
        decode.append(_timed(sides, plan, _writing(ids_BT, plan), batch, plan.new_tokens))
    if plan.prompt_tokens:
        ids_1T = tokens(1, plan.prompt_tokens)
        prefill = _timed(sides, plan, lambda side, _: reading(side.model, ids_1T), 1, 0)
    rates.append(bandwidth(device))
    rows = []
    for number, side in enumerate(sides):
        peak = None if side.peak_bytes is None else side.weight_bytes + side.peak_bytes
        rows.append(
            {
                "weight_bytes": side.weight_bytes,
                "peak_bytes": peak,
                "bandwidth_bytes_per_s": mean(rates),
                "decode": tuple(_cell(timed, number, mean(rates)) for timed in decode),
                "prefill": None if prefill is None else _cell(prefill, number, None),
            }
        )
    return rows[0], rows[-1]


def _writing(ids_BT: Tensor, plan: Plan) -> Callable[[Side, Ran], Work]:
    def make(side: Side, ran: Ran) -> Work:
        return writing(side.model, ids_BT, plan.new_tokens, graphs=side.graphs and not ran.waits)

    return make


def _timed(
    sides: list[Side], plan: Plan, make: Callable[[Side, Ran], Work], sequences: int, steps: int
) -> list[_Timed]:
    """All sides do the same work in turns; `steps` 0: they read a prompt."""
    found, works = [], []
    rows = sequences if steps else plan.prompt_tokens
    for side in sides:
        ran = what_runs(side.model, rows)
        work, meter = make(side, ran), Meter(side.model.device)
        before = meter.level()
        work.warm()
        held = max(meter.level() - before, 0)
        works.append(_metered(side, work, held))
        contextual = steps and getattr(side.model, "contextual", None) is not None
        note = WAITS if ran.waits and side.graphs and steps else ""
        note = WINDOW if sides[0].graphs and not side.graphs and steps else note
        if contextual:
            refusal = side.refusal()
            note = f"all weights: {refusal}" if refusal else f"skips {side.skipped_frac():.0%} of heads and neurons"
            ran = ran if refusal else Ran(contextual_kernel(side.model, rows))
        tokens = sequences * steps or plan.prompt_tokens
        found.append(_Timed(sequences, tokens, steps, ran, note))
    for timed, side, seconds in zip(found, sides, in_turns(works, plan.rounds, plan.seconds), strict=True):
        timed.seconds = seconds
        timed.read_bytes = side.read_bytes() if steps else None
    works.clear()
    gc.collect()  # recorded steps and caches go before the next kind of work
    return found


def _metered(side: Side, work: Work, held_bytes: int) -> Callable[[], float]:
    meter = Meter(side.model.device)

    def run() -> float:
        meter.begin()
        seconds = work.run()
        rise = meter.rise()
        side.note_peak(None if rise is None else held_bytes + rise)
        return seconds

    return run


def _cell(timed: list[_Timed], number: int, rate: float | None) -> Cell:
    own = timed[number]
    return cell(
        own.sequences,
        own.tokens,
        timed[0].seconds,
        own.seconds,
        own.ran.kernel,
        steps=max(own.steps, 1),
        read_bytes=own.read_bytes,
        bandwidth=rate,
        note=own.note,
    )
