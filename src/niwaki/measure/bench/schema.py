"""Record of a benchmark: the content of its JSON file, with every round.

Every variant was timed in turns with the dense model, so a cell holds the rounds of both. The dense row holds its
rounds in the turns of all variants. A field that was not measured is None or empty, never a guess.

    bench = read_bench("bench.json")
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError, field_validator

from niwaki.compression.run_record import first_problem
from niwaki.errors import InputError, format_problem
from niwaki.measure.intervals import median_interval
from niwaki.measure.schema import Environment, Estimate, Frozen
from niwaki.model.files import write_text

CONFIDENCE = 0.95
FORMATS = (1, 2)  # a file of format 1 is read as format 2
DENSE = "dense"


class Cell(Frozen):
    """One kind of work, decode or prefill: `sequences` with `tokens` in total per round.

    `speedup` is the median over rounds of dense seconds / seconds of the variant. `read_bytes`: weights that a step
    reads. `bandwidth_share`: their rate as a share of the measured memory bandwidth. `kernel`: the code that
    multiplied. `note`: a remark for readers.
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
    """One variant of the model, or the `reason` why it was not measured. `detail`: a remark about this model.

    `source`: the folder of a result, None for a variant made here. `weight_bytes`: all weights in memory, embeddings
    and LM head included. `peak_bytes`: the same plus the max growth of the process (CPU) or of the device during the
    work. `bandwidth_bytes_per_s`: the mean of one measurement before the work and one after it.
    """

    variant: str
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
        """Return all cells."""
        return (*self.decode, *([] if self.prefill is None else [self.prefill]))

    def columns(self, settings: "Workload") -> list[Cell | None]:
        """Return the cells in the columns of a table: every batch, then the prompt; None for a missing one."""
        by_batch = {cell.sequences: cell for cell in self.decode}
        return [*map(by_batch.get, settings.batches), *([self.prefill] if settings.prompt_tokens else [])]


class Workload(Frozen):
    """Work of every variant: `new_tokens` after `context` tokens per batch, and one prefill of `prompt_tokens`.

    Each kind of work has `rounds` turns, or fewer: no turn begins after `seconds`.
    """

    batches: tuple[int, ...]
    context: int
    new_tokens: int
    prompt_tokens: int
    rounds: int
    seconds: float


class BenchSettings(Workload):
    """Resolved settings of a benchmark. `steps`: the kind of decode steps, CUDA graphs or one call after another."""

    device: str
    dtype: str
    threads: int
    steps: str


class Bench(Frozen):
    """A whole benchmark. Quality is not part of it."""

    format: Literal[2] = 2
    version: str
    date: str
    model: str
    architecture: str
    blocks: int
    parameters: int
    random_weights: bool
    quality: str
    environment: Environment
    settings: BenchSettings
    rows: tuple[Row, ...] = ()

    @field_validator("format", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if problem := format_problem(value, FORMATS):
            raise ValueError(f"it {problem}")
        return value


def read_bench(path: str | Path) -> Bench:
    """Read a bench.json of format 2 or 1, which called a variant a form. Raises InputError for any other file."""
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] == 1:
            rows = [
                {"variant" if key == "form" else key: value for key, value in row.items()} for row in content["rows"]
            ]
            content |= {"format": 2, "rows": rows}
        return Bench.model_validate_json(json.dumps(content))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}. Expected the JSON file of a benchmark") from error
    except ValidationError as error:
        raise InputError(f"{path} is not a benchmark of this niwaki ({first_problem(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a benchmark of this niwaki ({str(error).splitlines()[0]})") from error


def write_bench(path: Path, bench: Bench) -> None:
    """Write a benchmark as JSON."""
    write_text(path, bench.model_dump_json(indent=1) + "\n")


def make_cell(
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
    """Return a cell from the seconds of every round of `steps` forwards, each of which reads `read_bytes`."""
    speeds = [tokens / each for each in seconds]
    ratios = [dense / own for dense, own in zip(dense_seconds, seconds, strict=True)]
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
    """Return the dense row with its rounds in the turns of all other rows."""
    rows = [row for row in others if row.variant != DENSE]
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


def merge_benches(old: Bench, new: Bench) -> Bench:
    """Merge two benchmarks of one model with equal settings. New cells replace old ones.

    Raises InputError if the two do not belong in one table.
    """
    for name in ("model", "parameters", "random_weights"):
        if getattr(old, name) != getattr(new, name):
            raise InputError(f"{name} was {getattr(old, name)}, now it is {getattr(new, name)}: not the same table")
    same = ["device", "dtype", "threads", "steps"]
    same += ["context", "new_tokens"] if old.settings.batches and new.settings.batches else []
    same += ["prompt_tokens"] if old.settings.prompt_tokens and new.settings.prompt_tokens else []
    for name in same:
        before, after = getattr(old.settings, name), getattr(new.settings, name)
        if before != after:
            raise InputError(f"{name} was {before}, now it is {after}: not the same table")
    if old.environment.accelerator != new.environment.accelerator:
        raise InputError(f"the device was {old.environment.accelerator}, now it is {new.environment.accelerator}")
    rows = {row.variant: row for row in old.rows}
    for row in new.rows:
        rows[row.variant] = _joined(rows[row.variant], row) if row.variant in rows else row
    decoded = new.settings if new.settings.batches else old.settings
    kept = {name: getattr(decoded, name) for name in ("batches", "context", "new_tokens")}
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
