"""Gates: limits that a candidate must keep, judged by the end of an interval and not by the measured value.

The name of a gate is `max_` or `min_` and a metric (`measure.metrics`). It passes only if the far end of the interval
keeps the limit. It fails, with a reason, if the interval crosses the limit or nothing was measured. Too few independent
units for the confidence also fail. Gates read a finished comparison and measure nothing.

    confidence: 0.95
    correction: bonferroni
    max_perplexity_ratio: 1.05
    max_decode_latency_ratio: 0.8

Without a correction every single verdict has this confidence. One candidate needs no correction. It must pass all its
gates, and a bad one passes all of them by chance no more often than one of them. Of many candidates or lines, some pass
by chance more often. `bonferroni` divides the error rate by the number of verdicts that come from intervals.

(Holm's steps would need intervals at every level, and a comparison has them at one.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from niwaki.config.targets import parse_bytes
from niwaki.errors import InputError, unknown
from niwaki.measure.intervals import min_units
from niwaki.measure.metrics import METRICS
from niwaki.measure.schema import Candidate, Comparison, ComparisonSettings, Estimate, Verdict

CONFIDENCE = 0.95
_REMEDY = {
    "data": "give --data FILE",
    "tasks": "give --tasks FILE",
    "speed": "leave --rounds above 0",
    "file": "",
}
_MORE = {"data": "more text", "tasks": "more questions", "speed": "more --rounds", "file": ""}


class Gates(BaseModel):
    """Limits of a gate file. `confidence` is two-sided: of each interval, or with a correction of all together."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    confidence: float = Field(default=CONFIDENCE, ge=0.5, le=0.999)
    correction: Literal["none", "bonferroni"] = "none"
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, gt=0)
    min_top1_agreement: float | None = Field(default=None, gt=0, lt=1)
    max_accuracy_loss: float | None = Field(default=None, ge=-1, le=1)
    max_accuracy_norm_loss: float | None = Field(default=None, ge=-1, le=1)
    max_prefill_latency_ratio: float | None = Field(default=None, gt=0)
    max_decode_latency_ratio: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)
    max_bytes_ratio: float | None = Field(default=None, gt=0)

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _bytes_of(cls, value: Any) -> Any:
        return float(parse_bytes(value)) if isinstance(value, str) else value

    @property
    def limits(self) -> dict[str, float]:
        """Return the gates that are set, by name."""
        values = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in values.items() if value is not None}


LIMITS = tuple(name for name in Gates.model_fields if name.startswith(("max_", "min_")))


def each_confidence(gates: Gates, settings: ComparisonSettings, candidates: int) -> float:
    """Return the confidence of each single interval that these gates judge."""
    if gates.correction == "none":
        return gates.confidence
    files = {"data": len(settings.data), "tasks": len(settings.tasks), "speed": int(settings.rounds > 0)}
    verdicts = candidates * sum(files.get(METRICS[name.partition("_")[2]].needs, 0) for name in gates.limits)
    return 1 - (1 - gates.confidence) / max(verdicts, 1)


@dataclass(frozen=True)
class Measurement:
    """One value of a metric on the file `about`, with its interval. An exact value has none."""

    metric: str
    about: str
    estimate: Estimate

    @property
    def exact(self) -> bool:
        """Return whether the value is counted, and has no interval."""
        return METRICS[self.metric].exact


def load_gates(path: str | Path) -> Gates:
    """Read the gates of a YAML file. Raises InputError for any other content; it suggests a name for a misspelt one."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the gates {path}: {error.strerror} (`niwaki gate --init` writes such a file)"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected gates such as max_perplexity_ratio: 1.05, one per line")
    for name, value in content.items():
        if name not in Gates.model_fields:
            raise InputError(f"{path}: {unknown('gate', str(name), Gates.model_fields)}")
        if value is None:
            raise InputError(f"{path}: {name}: expected a number, got nothing: give a limit or remove the line")
    try:
        gates = Gates(**content)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {first['loc'][0]}: {first['msg']} (got {first['input']!r})") from error
    if not gates.limits:
        raise InputError(f"{path} holds no gate: choose from {', '.join(LIMITS)}")
    return gates


def measurements(candidate: Candidate) -> Iterator[Measurement]:
    """Yield every measured value of a candidate under the stable name of its metric.

    A value that an older compare.json lacks is None, and is not measured.
    """
    for metric, about, estimate in _estimates(candidate):
        if estimate is not None:
            yield Measurement(metric, about, estimate)


def _estimates(candidate: Candidate) -> Iterator[tuple[str, str, Estimate | None]]:
    """Yield the name of each metric, the file that it is about, and its value."""
    of_data = [name for name, metric in METRICS.items() if metric.needs == "data"]
    for data in candidate.data:
        for metric in of_data:
            yield metric, data.data, getattr(data.whole, metric)
    for task in candidate.tasks:
        yield "accuracy_loss", task.task, task.accuracy.loss
        yield "accuracy_norm_loss", task.task, task.accuracy_norm.loss
    if candidate.speed is not None:
        for metric, throughput in candidate.speed.throughputs.items():
            yield metric, "", throughput.latency_ratio
    for metric, value in (("bytes", float(candidate.model.file_bytes)), ("bytes_ratio", candidate.bytes_ratio)):
        yield metric, "", Estimate(value=value, low=value, high=value, units=1)


def judge(candidate: Candidate, gates: Gates, confidence: float, verdict_confidence: float | None = None) -> Candidate:
    """Return the candidate with a verdict per gate and file.

    `confidence` is that of its intervals; `verdict_confidence` is required of a verdict (default: that of the gates).
    """
    required = gates.confidence if verdict_confidence is None else verdict_confidence
    measured = list(measurements(candidate))
    verdicts: list[Verdict] = []
    for gate, limit in gates.limits.items():
        metric = gate.partition("_")[2]
        own = [one for one in measured if one.metric == metric]
        verdicts += [_verdict(gate, limit, one, required, confidence) for one in own]
        if not own:
            reason = f"not measured: {METRICS[metric].meaning}, {_REMEDY[METRICS[metric].needs]}"
            verdicts.append(_failure(gate, "", limit, None, required, reason))
    passed = all(verdict.passed for verdict in verdicts)
    return candidate.model_copy(update={"gates": tuple(verdicts), "passed": passed})


def judge_comparison(comparison: Comparison, gates: Gates) -> Comparison:
    """Return the comparison with the verdicts of these gates; earlier verdicts are dropped."""
    each = each_confidence(gates, comparison.settings, len(comparison.candidates))
    candidates = tuple(judge(candidate, gates, comparison.confidence, each) for candidate in comparison.candidates)
    stated = {"confidence": gates.confidence} | ({} if gates.correction == "none" else {"each_confidence": each})
    return comparison.model_copy(
        update={
            "candidates": candidates,
            "gate": {**stated, **gates.limits},
            "passed": all(candidate.passed for candidate in candidates),
        }
    )


def _verdict(gate: str, limit: float, one: Measurement, wanted: float, confidence: float) -> Verdict:
    value, metric = one.estimate.value, METRICS[one.metric]
    upper = metric.limit == "max"
    bound = one.estimate.high if upper else one.estimate.low
    if one.exact:
        passed = value <= limit if upper else value >= limit
        reason = f"{shown(value)} {'keeps' if passed else 'exceeds'} {shown(limit)}"
        return Verdict(
            gate=gate, about=one.about, limit=limit, measured=value, bound=value, confidence=wanted, passed=passed,
            reason=reason,
        )  # fmt: skip
    problem = _missing_data(one, wanted, confidence)
    if problem or bound is None or not math.isfinite(bound):
        return _failure(gate, one.about, limit, value, wanted, problem or "its interval has no end")
    passed = bound <= limit if upper else bound >= limit
    side, at = ("at most", "up to") if upper else ("at least", "down to")
    if passed:
        reason = f"{side} {shown(bound)} at {wanted:.4g} confidence, limit {shown(limit)}"
    elif (value <= limit) if upper else (value >= limit):
        more = _MORE[metric.needs]
        reason = (
            f"measured {shown(value)}, but at {wanted:.4g} confidence it may be {at} {shown(bound)}, limit "
            f"{shown(limit)}: too few data to pass, {more} may be enough"
        )
    else:
        reason = f"measured {shown(value)}, limit {shown(limit)}"
    return Verdict(
        gate=gate, about=one.about, limit=limit, measured=value, bound=bound, confidence=wanted, passed=passed,
        reason=reason,
    )  # fmt: skip


def _missing_data(one: Measurement, wanted: float, confidence: float) -> str:
    """Return the reason why an interval has too few data for the wanted confidence, empty if it has enough."""
    estimate, needs = one.estimate, METRICS[one.metric].needs
    if wanted > confidence + 1e-12:
        return f"measured at {confidence:.4g} confidence, the gate asks for {wanted:.4g}: compare again with this gate"
    if needs == "speed":
        return "" if estimate.low is not None else f"only {estimate.units} rounds for {wanted:.4g} confidence"
    needed = min_units(wanted)
    if estimate.units >= needed and estimate.low is not None:
        return ""
    return f"only {estimate.units} independent units, {wanted:.4g} confidence needs at least {needed}: {_MORE[needs]}"


def _failure(gate: str, about: str, limit: float, measured: float | None, confidence: float, reason: str) -> Verdict:
    return Verdict(
        gate=gate, about=about, limit=limit, measured=measured, bound=None, confidence=confidence, passed=False,
        reason=reason,
    )  # fmt: skip


def shown(value: float) -> str:
    """Format a number: from 10,000 on whole with separators, below with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
