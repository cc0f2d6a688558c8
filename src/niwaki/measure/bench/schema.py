"""What a benchmark found, as it stands in its JSON file: rounds, bytes and what ran, nothing that is computed again.

Every form was timed in turns with the dense model, so a cell holds the rounds of both. The dense row is made of the
rounds of all others. Fields that were not measured are None or empty, never a guess.

    Bench.model_validate_json(Path("bench.json").read_text())
"""

from collections.abc import Iterable, Sequence
from statistics import median

from niwaki.errors import InputError
from niwaki.measure.intervals import median_interval
from niwaki.measure.schema import Environment, Estimate, Frozen

FORMAT = 1
CONFIDENCE = 0.95
DENSE = "dense"


class Cell(Frozen):
    """One kind of work: `sequences` that write, or read a prompt, `tokens` in all, at every round.

    `speedup` is the median over rounds of dense seconds over those of the form. `read_bytes`: weights that a step
    reads; `bandwidth_share`: what they are of the measured rate of the memory. `kernel`: what multiplied. `note`: what
    else a reader should know.
    """

    sequences: int
    tokens: int
    tokens_per_s: tuple[float, ...]
    dense_tokens_per_s: tuple[float, ...]
    median_tokens_per_s: float
    spread_frac: float
    speedup: Estimate
    kernel: str
    read_bytes: int | None = None
    bandwidth_share: float | None = None
    note: str = ""


class Row(Frozen):
    """One form of the model, or why there is none (`reason`). `detail`: what of it follows from this model. `source` is
    the folder of a result, None for a form made here.

    `weight_bytes`: all weights in memory, embeddings and head too; `peak_bytes`: these and the most that the process
    (CPU) or the device grew by while it read and wrote. `bandwidth_bytes_per_s` was measured before and after it.
    """

    form: str
    about: str
    detail: str = ""
    source: str | None = None
    reason: str = ""
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    decode: tuple[Cell, ...] = ()
    prefill: Cell | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All that was timed."""
        return (*self.decode, *([] if self.prefill is None else [self.prefill]))

    def columns(self, settings: "Settings") -> list[Cell | None]:
        """What was timed by the columns of a table: every batch, then the prompt; None where a piece is missing yet."""
        by_batch = {cell.sequences: cell for cell in self.decode}
        return [*map(by_batch.get, settings.batches), *([self.prefill] if settings.prompt_tokens else [])]


class Settings(Frozen):
    """What was asked. `steps`: how tokens were written, as CUDA graphs or one call after another."""

    device: str
    dtype: str
    threads: int
    batches: tuple[int, ...]
    context: int
    new_tokens: int
    prompt_tokens: int
    rounds: int
    seconds: float
    steps: str


class Bench(Frozen):
    """A whole benchmark; quality is no part of it."""

    format: int = FORMAT
    version: str
    date: str
    model: str
    architecture: str
    blocks: int
    parameters: int
    random_weights: bool
    quality: str
    environment: Environment
    settings: Settings
    rows: tuple[Row, ...]


def cell(
    sequences: int,
    tokens: int,
    dense_seconds: Sequence[float],
    seconds: Sequence[float],
    kernel: str,
    steps: int = 1,
    read_bytes: int | None = None,
    bandwidth: float | None = None,
    note: str = "",
) -> Cell:
    """A cell from the seconds of every round; a round is `steps` forwards, each of which reads `read_bytes`."""
    speeds = [tokens / each for each in seconds]
    ratios = [theirs / ours for theirs, ours in zip(dense_seconds, seconds, strict=True)]
    value, low, high = median_interval(ratios, CONFIDENCE)
    share = None
    if read_bytes is not None and bandwidth is not None:
        share = round(read_bytes * steps / median(seconds) / bandwidth, 4)
    return Cell(
        sequences=sequences,
        tokens=tokens,
        tokens_per_s=tuple(speeds),
        dense_tokens_per_s=tuple(tokens / each for each in dense_seconds),
        median_tokens_per_s=median(speeds),
        spread_frac=(max(speeds) - min(speeds)) / median(speeds),
        speedup=Estimate(value=value, low=low, high=high, units=len(ratios)),
        kernel=kernel,
        read_bytes=read_bytes,
        bandwidth_share=share,
        note=note,
    )


def with_all_rounds(dense: Row, others: Iterable[Row]) -> Row:
    """The dense row with its rounds in the turns of all other rows."""
    rows = [row for row in others if row.form != DENSE]
    cells = [cell for row in rows for cell in row.decode]
    decode = [_pooled(own, [cell for cell in cells if cell.sequences == own.sequences]) for own in dense.decode]
    prefill = dense.prefill
    if prefill is not None:
        prefill = _pooled(prefill, [row.prefill for row in rows if row.prefill is not None])
    return dense.model_copy(update={"decode": tuple(decode), "prefill": prefill})


def _pooled(own: Cell, others: Sequence[Cell]) -> Cell:
    speeds = tuple(speed for other in others for speed in other.dense_tokens_per_s)
    if not speeds:
        return own
    share = own.bandwidth_share
    pooled = median(speeds)
    return own.model_copy(
        update={
            "tokens_per_s": speeds,
            "dense_tokens_per_s": speeds,
            "median_tokens_per_s": pooled,
            "spread_frac": (max(speeds) - min(speeds)) / pooled,
            "speedup": Estimate(value=1.0, low=1.0, high=1.0, units=len(speeds)),
            "bandwidth_share": None if share is None else round(share * pooled / own.median_tokens_per_s, 4),
        }
    )


def merged(old: Bench, new: Bench) -> Bench:
    """Two benchmarks of one model in one setting as one: what the new one timed takes the place of the old.

    Raises InputError if they cannot stand in one table.
    """
    for what in ("model", "parameters", "random_weights"):
        if getattr(old, what) != getattr(new, what):
            raise InputError(f"{what} was {getattr(old, what)}, now it is {getattr(new, what)}: not the same table")
    same = ["device", "dtype", "threads", "steps"]
    same += ["context", "new_tokens"] if old.settings.batches and new.settings.batches else []
    same += ["prompt_tokens"] if old.settings.prompt_tokens and new.settings.prompt_tokens else []
    for what in same:
        before, after = getattr(old.settings, what), getattr(new.settings, what)
        if before != after:
            raise InputError(f"{what} was {before}, now it is {after}: not the same table")
    if old.environment.accelerator != new.environment.accelerator:
        raise InputError(f"the device was {old.environment.accelerator}, now it is {new.environment.accelerator}")
    rows = {row.form: row for row in old.rows}
    for row in new.rows:
        rows[row.form] = _joined(rows[row.form], row) if row.form in rows else row
    wrote = new.settings if new.settings.batches else old.settings
    kept = {name: getattr(wrote, name) for name in ("batches", "context", "new_tokens")}
    kept["prompt_tokens"] = new.settings.prompt_tokens or old.settings.prompt_tokens
    settings = new.settings.model_copy(update=kept)
    dense = with_all_rounds(rows.pop(DENSE), rows.values())
    return new.model_copy(update={"settings": settings, "rows": (dense, *rows.values())})


def _joined(old: Row, new: Row) -> Row:
    peaks = [row.peak_bytes for row in (old, new) if row.peak_bytes is not None]
    return new.model_copy(
        update={
            "decode": new.decode or old.decode,
            "prefill": new.prefill or old.prefill,
            "peak_bytes": max(peaks, default=None),
            "bandwidth_bytes_per_s": new.bandwidth_bytes_per_s if new.decode else old.bandwidth_bytes_per_s,
        }
    )
