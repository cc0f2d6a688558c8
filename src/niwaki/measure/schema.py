"""Record of a comparison: the content of compare.json, which reports show and gates judge.

A report computes no value again. Every interval has the confidence of the whole comparison (`Comparison.confidence`,
two-sided). A field that was not measured is None or empty, never a guess.

    comparison = read_comparison("report/compare.json")
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from niwaki.compression.run_record import first_problem
from niwaki.errors import InputError, format_problem
from niwaki.model.files import write_text

Kind = Literal["plain", "packed", "structured", "contextual"]
SampleUnit = Literal["document", "window", "question", "round", "file"]

FORMAT: Literal[1] = 1
BUSY_SPREAD = 3.0  # the fastest round of one model over its slowest, above which the machine was busy


class Frozen(BaseModel):
    """Base of the records: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Frozen):
    """A measured value and its interval over `units` independent units. With one unit, `low` and `high` are None."""

    value: float
    low: float | None
    high: float | None
    units: int


class Memory(Frozen):
    """Resident bytes of a fresh process: before loading, after it, and the peak. On CUDA also those of the device."""

    before_bytes: int
    loaded_bytes: int
    peak_bytes: int
    device_loaded_bytes: int | None
    device_peak_bytes: int | None


class Model(Frozen):
    """A model and its files. `source` is as given; method, target and recipe are those of niwaki's record, if any.

    `file_bytes`: weight files, the predictor of a contextual model included. `decoder_bytes`: tensors of the blocks.
    """

    name: str
    source: str
    kind: Kind
    method: str | None
    target: str | None
    recipe: dict[str, Any] | None
    architecture: str
    blocks: int
    file_bytes: int
    decoder_bytes: int
    load_seconds: float | None
    memory: Memory | None


class Throughput(Frozen):
    """Tokens per second of every round, dense and candidate in turns, and the ratio of times (candidate / dense).

    The ratio is the median over rounds. Its interval holds for any distribution of times.
    """

    tokens: int
    dense_tokens_per_s: tuple[float, ...]
    candidate_tokens_per_s: tuple[float, ...]
    dense_median: float
    candidate_median: float
    latency_ratio: Estimate

    @property
    def dense_spread(self) -> float:
        """Return the fastest round of the dense model over its slowest. A large value shows a busy machine."""
        return max(self.dense_tokens_per_s) / min(self.dense_tokens_per_s)


class Speed(Frozen):
    """Prefill of a prompt and decoding after it, one sequence at a time."""

    threads: int
    prefill: Throughput
    decode: Throughput

    @property
    def throughputs(self) -> dict[str, Throughput]:
        """Return both by the names of their metrics."""
        return {"prefill_latency_ratio": self.prefill, "decode_latency_ratio": self.decode}


class Quality(Frozen):
    """Both models on the same predicted tokens. The intervals resample `units`."""

    tokens: int
    units: int
    unit: SampleUnit
    dense_perplexity: float
    perplexity: float
    perplexity_ratio: Estimate
    kl: Estimate
    top1_agreement: Estimate


class DataQuality(Frozen):
    """One data file, whole and by the `domain` of its documents (empty if no document has one).

    `skipped` are the rows that could not be used, by reason; `revision` is the commit of a data set of the hub.
    """

    data: str
    whole: Quality
    domains: dict[str, Quality]
    skipped: dict[str, int] = {}
    revision: str | None = None

    @model_serializer(mode="wrap")
    def _where_it_says_something(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields without rows that were not skipped, and without a commit that there is not."""
        absent = {name for name in ("skipped", "revision") if not getattr(self, name)}
        return {name: value for name, value in dump(self).items() if name not in absent}


class PairedAccuracy(Frozen):
    """Answers of both models to the same questions. `loss`: dense accuracy − candidate accuracy.

    `mcnemar_p`: exact two-sided McNemar test of no difference. The lists hold positions of questions in the file.
    """

    dense_accuracy: float
    accuracy: float
    loss: Estimate
    mcnemar_p: float
    right_to_wrong: tuple[int, ...]
    wrong_to_right: tuple[int, ...]


class Flip(Frozen):
    """A question that only one of the models answers correctly, by likelihood."""

    question: int
    context: str
    right: str
    dense: str
    candidate: str


class TaskQuality(Frozen):
    """One task file, scored by likelihood and by likelihood per character. `flips`: the first ones, with texts."""

    task: str
    questions: int
    accuracy: PairedAccuracy
    accuracy_norm: PairedAccuracy
    flips: tuple[Flip, ...]


class Generation(Frozen):
    """A prompt that both models continue greedily, as token strings. `diverges_at`: the first different token."""

    prompt: str
    dense: tuple[str, ...]
    candidate: tuple[str, ...]
    dense_text: str
    candidate_text: str
    diverges_at: int | None


class TokenDivergence(Frozen):
    """One predicted token: its text, the KL divergence there, and the most likely token of each model."""

    token: str
    kl: float
    dense_top1: str
    candidate_top1: str
    dense_nll: float
    candidate_nll: float


class Example(Frozen):
    """A passage of the data and the text before it. `kl` is the mean over its tokens."""

    data: str
    domain: str | None
    before: str
    kl: float
    tokens: tuple[TokenDivergence, ...]


class Verdict(Frozen):
    """One gate on one file. `bound`: the judged end of the interval, None if the gate could not be judged."""

    gate: str
    about: str
    limit: float
    measured: float | None
    bound: float | None
    confidence: float
    passed: bool
    reason: str


class Scoring(Frozen):
    """The path of text through the candidate.

    `streamed`: block by block, every token. `runtime` (contextual): the first `first_tokens` of every window are a
    prompt. It runs with all weights and is not compared. The other tokens run with the weights that the prompt selects.
    `dense_windows` of `windows` ran with all weights; the others skipped `skipped_frac` of the weights on average.
    """

    how: Literal["streamed", "runtime"]
    first_tokens: int
    windows: int
    dense_windows: int
    skipped_frac: float


class Candidate(Frozen):
    """All results of one candidate against the dense model. `passed` is None without gates."""

    model: Model
    scoring: Scoring
    bytes_ratio: float
    data: tuple[DataQuality, ...]
    tasks: tuple[TaskQuality, ...]
    speed: Speed | None
    generations: tuple[Generation, ...]
    worst: tuple[Example, ...]
    gates: tuple[Verdict, ...]
    passed: bool | None


class ComparisonSettings(Frozen):
    """Resolved settings of a comparison. `dtype` is for quality; speed and texts use the stored dtype.

    `bos`: whether every window, question and prompt began with the beginning-of-text token. Files without it had none.
    `shots`: solved questions before every question of a task, drawn by `seed`; absent if there are none.
    """

    data: tuple[str, ...]
    tasks: tuple[str, ...]
    prompts: str | None
    field: str
    seq_len: int
    max_tokens: int | None
    limit: int | None
    shots: int = 0
    rounds: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    device: str
    dtype: str
    logit_bytes: int | None = None
    bos: Literal["on", "off"] = "off"

    @model_serializer(mode="wrap")
    def _as_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields; those of an earlier file as it holds them."""
        absent = {"bos", "logit_bytes"} - self.model_fields_set | (set() if self.shots else {"shots"})
        return {name: value for name, value in dump(self).items() if name not in absent}


class Environment(Frozen):
    """The machine and the package versions of a measurement."""

    machine: str
    processor: str
    cores: int
    memory_bytes: int
    accelerator: str | None
    system: str
    python: str
    versions: dict[str, str]


class Comparison(Frozen):
    """One dense model and its candidates. `passed`: all gates of all candidates pass, None without gates."""

    format: Literal[1] = FORMAT
    kind: Literal["niwaki comparison"] = "niwaki comparison"
    date: str
    command: str
    seconds: float
    confidence: float
    settings: ComparisonSettings
    environment: Environment
    dense: Model
    candidates: tuple[Candidate, ...]
    gate: dict[str, float] | None = None
    passed: bool | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if problem := format_problem(value, (FORMAT,)):
            raise ValueError(f"it {problem}")
        return value


def read_comparison(path: str | Path) -> Comparison:
    """Read a compare.json. Raises InputError for any other file."""
    try:
        return Comparison.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}. Expected the compare.json of a report") from error
    except ValidationError as error:
        raise InputError(f"{path} is not a comparison of this niwaki ({first_problem(error)})") from error


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison as JSON."""
    write_text(path, comparison.model_dump_json(indent=1) + "\n")
