"""What a comparison found: everything that a report shows and a gate judges, as it stands in compare.json.

Nothing in here is computed again: a report only reads it. Every interval has the confidence of the whole comparison
(`Comparison.confidence`, two-sided). Fields that were not measured are None or empty, never a guess.

    Comparison.model_validate_json(Path("report/compare.json").read_text())
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 1
Kind = Literal["plain", "packed", "structured", "contextual"]
Unit = Literal["document", "window", "question", "round", "file"]

BUSY = 3.0  # times that rounds of one model differ when a machine does other things as well


class Frozen(BaseModel):
    """What was found does not change, and holds nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Frozen):
    """A measured value and its interval, from `units` independent pieces; no interval from a single one."""

    value: float
    low: float | None
    high: float | None
    units: int


class Memory(Frozen):
    """Resident bytes of a fresh process before and after loading and at its highest; on CUDA also of the device."""

    before_bytes: int
    loaded_bytes: int
    peak_bytes: int
    device_loaded_bytes: int | None
    device_peak_bytes: int | None


class Model(Frozen):
    """A model and its files. `source` is as given; method, target and recipe are those of niwaki's record, if any.

    `file_bytes`: weight files and what niwaki runs beside them; `decoder_bytes`: what the tensors of the blocks store.
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
    """Tokens a second of every round, dense and candidate in turns, and the ratio of their times (candidate / dense).

    The ratio is the median over rounds; its interval holds for any distribution of times.
    """

    tokens: int
    dense_tokens_per_s: tuple[float, ...]
    candidate_tokens_per_s: tuple[float, ...]
    dense_median: float
    candidate_median: float
    latency_ratio: Estimate

    @property
    def dense_swing(self) -> float:
        """How many times as fast the fastest round of the dense model was as its slowest: what the machine did."""
        return max(self.dense_tokens_per_s) / min(self.dense_tokens_per_s)


class Speed(Frozen):
    """One sequence at a time: reading a prompt, then writing behind it."""

    threads: int
    prefill: Throughput
    decode: Throughput

    @property
    def paces(self) -> dict[str, Throughput]:
        """Both by the names of their metrics."""
        return {"prefill_latency_ratio": self.prefill, "decode_latency_ratio": self.decode}


class Quality(Frozen):
    """Both models on the same predicted tokens. `units`: what was resampled for the intervals."""

    tokens: int
    units: int
    unit: Unit
    dense_perplexity: float
    perplexity: float
    perplexity_ratio: Estimate
    kl: Estimate
    top1_agreement: Estimate


class DataQuality(Frozen):
    """One data file, whole and by the `domain` of its documents (empty if none has one)."""

    data: str
    whole: Quality
    domains: dict[str, Quality]


class Paired(Frozen):
    """Answers of both models to the same questions. `loss`: dense accuracy − candidate's accuracy.

    `mcnemar_p`: exact two-sided McNemar test of no difference. The lists hold positions of questions in the file.
    """

    dense_accuracy: float
    accuracy: float
    loss: Estimate
    mcnemar_p: float
    right_to_wrong: tuple[int, ...]
    wrong_to_right: tuple[int, ...]


class Flip(Frozen):
    """A question that one model answers rightly and the other wrongly, by accuracy."""

    question: int
    context: str
    right: str
    dense: str
    candidate: str


class TaskQuality(Frozen):
    """One task file, by likelihood and by likelihood per character; the first `flips` with their texts."""

    task: str
    questions: int
    accuracy: Paired
    accuracy_norm: Paired
    flips: tuple[Flip, ...]


class Generation(Frozen):
    """A prompt continued greedily by both; token strings. `diverges_at`: first place where they differ, if any."""

    prompt: str
    dense: tuple[str, ...]
    candidate: tuple[str, ...]
    dense_text: str
    candidate_text: str
    diverges_at: int | None


class TokenDivergence(Frozen):
    """One predicted token: what stands there, how far the distributions lie apart and what each found most likely."""

    token: str
    kl: float
    dense_top1: str
    candidate_top1: str
    dense_nll: float
    candidate_nll: float


class Example(Frozen):
    """A passage of the data with the tokens before it; `kl` is the mean over its tokens."""

    data: str
    domain: str | None
    before: str
    kl: float
    tokens: tuple[TokenDivergence, ...]


class Verdict(Frozen):
    """One gate on one file. `bound` is the end of the interval that was judged; None if it could not be."""

    gate: str
    about: str
    limit: float
    measured: float | None
    bound: float | None
    confidence: float
    passed: bool
    reason: str


class Scoring(Frozen):
    """How text went through the candidate.

    `streamed`: block by block, every token. `runtime` (contextual): the first `first_tokens` of every window are read
    with all weights and not compared, the others run as if they were written, on what the prompt needs; `dense_windows`
    of `windows` were answered with all weights anyway, the others skipped `skipped_frac` of them on average.
    """

    how: Literal["streamed", "runtime"]
    first_tokens: int
    windows: int
    dense_windows: int
    skipped_frac: float


class Candidate(Frozen):
    """Everything about one candidate against the dense model. `passed` is None without gates."""

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


class Settings(Frozen):
    """What was asked for, resolved. `dtype` is the arithmetic of quality; speed and texts use the stored one."""

    data: tuple[str, ...]
    tasks: tuple[str, ...]
    prompts: str | None
    field: str
    seq_len: int
    max_tokens: int | None
    limit: int | None
    rounds: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    device: str
    dtype: str


class Environment(Frozen):
    """Where the numbers come from."""

    machine: str
    processor: str
    cores: int
    memory_bytes: int
    accelerator: str | None
    system: str
    python: str
    versions: dict[str, str]


class Comparison(Frozen):
    """One dense model and its candidates. `passed`: all gates of all candidates, None without gates."""

    format: Literal[1] = 1
    kind: Literal["niwaki comparison"] = "niwaki comparison"
    date: str
    command: str
    seconds: float
    confidence: float
    settings: Settings
    environment: Environment
    dense: Model
    candidates: tuple[Candidate, ...]
    gate: dict[str, float] | None
    passed: bool | None
