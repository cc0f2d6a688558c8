"""Training of a compressed model: AdamW with warm-up and cosine, held-out windows, and a state that survives a kill.

Steps are relative to the size of what they change. At the rate 0.002 a step moves a weight by about 0.2 % of the root
mean square of its matrix. So one rate fits matrices, norms, scales and latent codes of any model.

The order of the windows follows from the seed alone. Paths of a trellis are searched SEARCHES times. At CHECKS points
the held-out loss is measured, the best state is kept, and, if SAVE_SECONDS have passed, everything goes to the journal.
A resume reads it and ends at the same bytes. After PATIENCE points without a lower loss the training ends.

    best = train(student, trained, windows, Schedule.of(1_000_000, 512), folder, report)

Legend: S windows, B windows of a batch, T tokens.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from niwaki.compression.recovery.teacher import Student
from niwaki.compression.recovery.trained import Trained
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RECORD, JournalEntry
from niwaki.config.events import Event, Report
from niwaki.errors import NumericalError
from niwaki.methods.shared.best_state import BestState, cosine
from niwaki.model.anatomy import find_blocks
from niwaki.model.files import write_shard

CHECKS = 16
SEARCHES = 64  # of the paths of a trellis, over all steps; each check has one before it
PATIENCE = 6
SAVE_SECONDS = 60.0
WARMUP_FRAC = 0.05
MAX_NORM = 1.0
BETAS = (0.9, 0.98)
STEPS_WANTED = 400
RATE_AT = 0.003  # at STEPS_WANTED
RATES = (0.001, 0.01)  # at least and at most
BATCH_TOKENS = (2048, 32768)  # of a step, at least and at most
HELD_OUT = 64  # windows at most
PART = "training"


@dataclass(frozen=True)
class Windows:
    """Windows [S, T] of all text: the rows that are held out, and those of every step."""

    ids_ST: Tensor
    held: Sequence[int]
    steps: Sequence[Sequence[int]]

    @classmethod
    def of(cls, sources: Sequence[tuple[Tensor, int]], batch: int, steps: int | None, seed: int) -> "Windows":
        """Hold out an eighth of every source, HELD_OUT together at most, and draw the steps from the others.

        Held out are the last ones: a compression with the same text and seed has learned the first ones. Every source
        comes with the windows that it should give. If it has fewer, it gives them several times, each time in another
        order.
        """
        generator = torch.Generator().manual_seed(seed)
        total = sum(wanted for _, wanted in sources)
        held: list[int] = []
        order: list[int] = []
        first = 0
        for ids_ST, wanted in sources:
            out = max(1, min(len(ids_ST) // 8, round(HELD_OUT * wanted / total)))
            last = first + len(ids_ST) - out
            held += range(last, last + out)
            rows = torch.arange(first, last)
            drawn: list[int] = []
            while len(drawn) < wanted and len(rows):
                drawn += rows[torch.randperm(len(rows), generator=generator)].tolist()
            order += drawn[:wanted]
            first += len(ids_ST)
        mixed = [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]
        if len(sources) == 1:
            mixed = order  # every window once before any again
        count = steps or max(1, len(mixed) // batch)
        while len(mixed) < count * batch:
            mixed += mixed
        rows_of = [mixed[step * batch : (step + 1) * batch] for step in range(count)]
        return cls(torch.cat([ids_ST for ids_ST, _ in sources]), held, rows_of)

    def read(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return windows [B, T] on the device, without a wait."""
        ids_BT = self.ids_ST[list(rows)]
        return ids_BT.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids_BT


@dataclass(frozen=True)
class Schedule:
    """Rate of the steps, windows of a micro-batch, and whether blocks are computed again in the backward pass."""

    rate: float
    micro: int
    recompute: bool
    autocast: bool


def batch_windows(tokens: int, seq_len: int) -> int:
    """Return the windows of one step for a budget of tokens: about STEPS_WANTED steps, within BATCH_TOKENS."""
    low, high = BATCH_TOKENS
    wanted = min(max(tokens // STEPS_WANTED, low), high)
    return max(1, round(wanted / seq_len))


def default_rate(steps: int) -> float:
    """Return the rate for a number of steps: few steps are long ones, because together they must reach as far."""
    low, high = RATES
    return min(max(RATE_AT * math.sqrt(STEPS_WANTED / steps), low), high)


class Trainer:
    """Model in training: its optimizer and its best state."""

    def __init__(self, student: Student, trained: Trained, windows: Windows, schedule: Schedule) -> None:
        self.student, self.trained, self.windows, self.schedule = student, trained, windows, schedule
        self.device = trained.parameters[0].device
        self.sizes = trained.groups
        groups = [{"params": parameters, "lr": 0.0} for parameters in self.sizes.values()]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
        self.step = self.waited = 0
        if schedule.recompute:
            recompute_blocks(student.model)

    def run(self, folder: ResultFolder, report: Report) -> BestState:
        """Train, and return the best state. It is restored in the parameters."""
        steps = len(self.windows.steps)
        every, search_every = max(1, round(steps / CHECKS)), max(1, round(steps / SEARCHES))
        best, saved = self._begin(folder), time.monotonic()
        while self.step < steps and self.waited < PATIENCE:
            self._learn(self.windows.steps[self.step])
            self.step += 1
            due = self.step % every == 0 or self.step == steps
            if due or self.step % search_every == 0:
                self.trained.search()
            if due:
                loss = self.held_out()
                self.waited = 0 if loss < best.error else self.waited + 1
                best.offer(loss)
                report(Event.RECOVER, done=self.step, of=steps, heldout_loss=loss)
                if not loss < float("inf"):
                    raise NumericalError(f"the held-out loss is not finite at step {self.step}: lower the rate")
                if time.monotonic() - saved >= SAVE_SECONDS and self.step < steps:
                    self._save(folder, best)
                    saved = time.monotonic()
        best.restore()
        self.trained.search()
        return best

    def held_out(self) -> float:
        """Return the mean loss of the held-out windows."""
        total = []
        for rows in _parts(self.windows.held, self.schedule.micro):
            with self._arithmetic():
                loss = self.student.loss(rows, self.windows.read(rows, self.device))
            total.append(loss.double() * len(rows))
        return float(torch.stack(total).sum()) / len(self.windows.held)

    def _learn(self, rows: Sequence[int]) -> None:
        """Take one step on windows of the text."""
        factor = _warm(self.step, len(self.windows.steps)) * self.schedule.rate
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = factor * size
        for part in _parts(rows, self.schedule.micro):
            ids_BT = self.windows.read(part, self.device)
            with self._arithmetic():
                self.student.loss(part, ids_BT, backward=len(part) / len(rows))
        self.trained.mask_gradients()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, MAX_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.clamp()

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if not self.schedule.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=not self.schedule.recompute)

    def _begin(self, folder: ResultFolder) -> BestState:
        """Return the state of the journal, or that before the first step."""
        entry = folder.finished.get(PART)
        if entry is None:
            return BestState(self.trained.parameters, self.held_out())
        told: dict[str, Any] = entry.found or {}
        tensors = load_file(folder.path / str(entry.shard), device=str(self.device))
        best = BestState(self.trained.parameters, told["start"])
        with torch.no_grad():
            for number, parameter in enumerate(self.trained.parameters):
                parameter.copy_(tensors[f"{number}.best"])
            best.error = float("inf")
            best.offer(told["best"])
            for number, parameter in enumerate(self.trained.parameters):
                parameter.copy_(tensors[f"{number}.now"])
                moments = {name: tensors[f"{number}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
                state = {name: torch.empty_like(parameter).copy_(one) for name, one in moments.items()}  # its layout
                step = torch.tensor(float(told["step"]), device=self.device)
                self.optimizer.state[parameter] = {"step": step, **state}
        self.step, self.waited = told["step"], told["waited"]
        self.trained.search()
        return best

    def _save(self, folder: ResultFolder, best: BestState) -> None:
        """Write everything that a resume needs to the journal."""
        tensors: dict[str, Tensor] = {}
        for number, (parameter, kept) in enumerate(zip(self.trained.parameters, best.kept, strict=True)):
            state = self.optimizer.state[parameter]
            tensors |= {f"{number}.now": parameter.detach(), f"{number}.best": kept}
            tensors |= {f"{number}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        before = folder.finished.get(PART)
        shard = f"{RECORD}/journal/{PART}-{self.step:06d}.safetensors"
        sha256 = write_shard(folder.path / shard, tensors)
        told = {"step": self.step, "waited": self.waited, "start": best.start_error, "best": best.error}
        folder.finish_part(PART, JournalEntry(shard=shard, sha256=sha256, found=told))
        if before is not None:
            (folder.path / str(before.shard)).unlink(missing_ok=True)


def recompute_blocks(model: Any) -> None:
    """Compute every block again in the backward pass, so that only its input stays in memory."""
    for block in find_blocks(model)[1]:
        _recompute(block)


def _recompute(block: nn.Module) -> None:
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward


def _parts(rows: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(rows), count):
        yield rows[first : first + count]


def _warm(step: int, steps: int) -> float:
    """Return the factor of the rate: it rises over the first steps, and falls with the cosine."""
    warm = max(1, round(WARMUP_FRAC * steps))
    return min(1.0, (step + 1) / warm) * cosine(step, steps)
