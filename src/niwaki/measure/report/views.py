"""Texts of a comparison for the page: headline, cards, gates, measurements.

Templates only arrange the results of these functions. `t` is the table of texts of a language.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from niwaki.measure.description import short_name
from niwaki.measure.metrics import METRICS
from niwaki.measure.report import numbers as show
from niwaki.measure.report.plots import mark
from niwaki.measure.schema import Candidate, Comparison, Estimate, Model, Verdict

Texts = Mapping[str, str]
MAX_FAILURES = 3  # failed gates on a card


class Cell(str):
    """A cell of a table, with the number to sort by and a second, smaller line."""

    key: float
    sub: str

    def __new__(cls, text: str, key: float, sub: str = "") -> "Cell":
        """Create the cell with its text."""
        cell = super().__new__(cls, text)
        cell.key, cell.sub = key, sub
        return cell


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first cell of a row is its heading."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


def headline(t: Texts, comparison: Comparison) -> str:
    """Return the overall verdict in one sentence."""
    names = [candidate.model.name for candidate in comparison.candidates if candidate.passed]
    total = len(comparison.candidates)
    if comparison.passed is None:
        return t["headline_none"]
    key = "headline_all" if len(names) == total else "headline_some" if names else "headline_no"
    return t[key].format(total=total, passed=len(names), names=t["comma"].join(names))


def about_model(t: Texts, model: Model) -> str:
    """Describe the compression of a model in a few words."""
    return " · ".join(filter(None, [t[f"kind_{model.kind}"], model.method, model.target]))


def estimate(t: Texts, result: Estimate, form: Callable[[float], str]) -> str:
    """Return a cell with a value and, below it, the interval."""
    return Cell(form(result.value), result.value, _interval(t, result, form))


def _interval(t: Texts, result: Estimate, form: Callable[[float], str]) -> str:
    if result.low is None or result.high is None:
        return t["interval_missing"]
    return t["interval"].format(low=form(result.low), high=form(result.high))


def cards(t: Texts, comparison: Comparison) -> list[dict[str, Any]]:
    """Return one card for every candidate: bytes, speed, quality, verdict."""
    all_cards = []
    for number, candidate in enumerate(comparison.candidates):
        failures = [
            {"label": t[f"metric_{_metric(verdict)}"], "reason": reason(t, verdict)}
            for verdict in candidate.gates
            if not verdict.passed
        ]
        all_cards.append(
            {
                "name": candidate.model.name,
                "mark": mark(candidate.model.name, number),
                "about": about_model(t, candidate.model),
                "passed": candidate.passed,
                "metrics": list(_headline_metrics(t, comparison, candidate)),
                "failures": failures[:MAX_FAILURES],
                "more": _more_gates(t, len(failures) - MAX_FAILURES),
                "notes": [_scoring(t, candidate)] if candidate.scoring.how == "runtime" else [],
            }
        )
    return all_cards


def _more_gates(t: Texts, count: int) -> str:
    return t["more_gates"].format(count=count) if count > 0 else ""


def _headline_metrics(t: Texts, comparison: Comparison, candidate: Candidate) -> Iterator[dict[str, Any]]:
    sizes = (candidate.model.file_bytes, comparison.dense.file_bytes)
    line = t["size_of"].format(size=show.size(sizes[0]), dense=show.size(sizes[1]))
    yield {"label": t["file_size"], "big": show.change(candidate.bytes_ratio), "unclear": False, "lines": [line]}
    if candidate.speed is not None:
        decode = candidate.speed.decode
        line = t["speed_of"].format(speed=_speed(decode.candidate_median), dense=_speed(decode.dense_median))
        speedup = show.speedup(decode.latency_ratio)
        yield _metric_card(t, comparison, t["decode_speed"], speedup, show.factor, 1, [line])
    if candidate.data:
        worst = max(candidate.data, key=lambda data: data.whole.perplexity_ratio.value)
        own = worst.whole
        lines = [t["value_of"].format(value=f"{own.perplexity:.2f}", dense=f"{own.dense_perplexity:.2f}")]
        label = _metric_label(t, "perplexity", worst.data, comparison.settings.data)
        yield _metric_card(t, comparison, label, own.perplexity_ratio, show.change, 1, lines)
    if candidate.tasks:
        hardest = max(candidate.tasks, key=lambda task: task.accuracy.loss.value)
        answers, label = hardest.accuracy, _metric_label(t, "accuracy", hardest.task, comparison.settings.tasks)
        both = {"value": show.percent(answers.accuracy), "dense": show.percent(answers.dense_accuracy)}
        card = _metric_card(
            t, comparison, label, show.opposite(answers.loss), show.points, 0, [t["value_of"].format(**both)]
        )
        yield card | {"big": t["percentage_points"].format(points=card["big"])}


def _metric_card(
    t: Texts,
    comparison: Comparison,
    label: str,
    result: Estimate,
    form: Callable[[float], str],
    no_difference: float,
    lines: list[str],
) -> dict[str, Any]:
    if result.low is None or result.high is None:
        interval = t["no_interval"].format(units=result.units)
    else:
        confidence = show.percent(comparison.confidence, 0)
        interval = t["interval_of"].format(confidence=confidence, interval=_interval(t, result, form))
    unclear = result.low is not None and show.unclear(result, no_difference)
    return {"label": label, "big": form(result.value), "unclear": unclear, "lines": [*lines, interval]}


def _metric_label(t: Texts, metric: str, file: str, files: Sequence[str]) -> str:
    key = "metric_on_worst" if len(files) > 1 else "metric_on"
    return t[key].format(metric=t[metric], file=short_name(file, files), count=len(files))


def _scoring(t: Texts, candidate: Candidate) -> str:
    scoring = candidate.scoring
    return t["scored_runtime"].format(
        first=scoring.first_tokens,
        dense=scoring.dense_windows,
        windows=scoring.windows,
        skipped=show.percent(scoring.skipped_frac, 0),
    )


def gates(t: Texts, comparison: Comparison) -> list[dict[str, Any]]:
    """Return every gate of every candidate, [] without gates."""
    return [
        {
            "name": candidate.model.name,
            "passed": candidate.passed,
            "gates": [
                {
                    "name": verdict.gate,
                    "label": t[f"metric_{_metric(verdict)}"],
                    "about": verdict.about,
                    "passed": verdict.passed,
                    "limit": ("≤ " if verdict.gate.startswith("max_") else "≥ ") + _value(verdict, verdict.limit),
                    "measured": t["missing"] if verdict.measured is None else _value(verdict, verdict.measured),
                    "bound": t["missing"] if verdict.bound is None else _value(verdict, verdict.bound),
                    "reason": reason(t, verdict),
                    "original": verdict.reason if verdict.bound is None else "",
                }
                for verdict in candidate.gates
            ],
        }
        for candidate in comparison.candidates
        if candidate.gates
    ]


def reason(t: Texts, verdict: Verdict) -> str:
    """Return the reason of a verdict, from its numbers."""
    numbers = {
        "limit": _value(verdict, verdict.limit),
        "value": "" if verdict.measured is None else _value(verdict, verdict.measured),
        "bound": "" if verdict.bound is None else _value(verdict, verdict.bound),
        "confidence": show.percent(verdict.confidence, 1 if verdict.confidence > 0.99 else 0),
    }
    upper, measured = verdict.gate.startswith("max_"), verdict.measured
    if measured is None:
        key = "reason_missing"
    elif METRICS[_metric(verdict)].exact:
        key = "reason_exact_pass" if verdict.passed else "reason_exact_fail"
    elif verdict.bound is None:
        key = "reason_small"
    elif verdict.passed:
        key = "reason_pass"
    else:
        kept = measured <= verdict.limit if upper else measured >= verdict.limit
        key = "reason_unsure" if kept else "reason_fail"
    return t[key].format(**numbers)


def _metric(verdict: Verdict) -> str:
    return verdict.gate.partition("_")[2]


def _value(verdict: Verdict, value: float) -> str:
    form = METRICS[_metric(verdict)].form
    if form == "bytes":
        return show.size(value)
    return show.signed(f"{100 * value:.4g}%") if form == "percent" else show.number(value)


def measured(t: Texts, comparison: Comparison) -> Grid:
    """Return the table of bytes, loading, memory and speed of the dense model and all candidates."""
    columns = ["model", "file_size", "load_time", "peak_memory", "device_memory", "prefill", "decode"]
    models = [comparison.dense, *(candidate.model for candidate in comparison.candidates)]
    device = any(model.memory and model.memory.device_peak_bytes is not None for model in models)
    columns = [name for name in columns if device or name != "device_memory"]
    ran = any(candidate.speed for candidate in comparison.candidates)
    columns = columns if ran else columns[:2]
    rows = [_measured_row(t, comparison, model, candidate, columns) for model, candidate in
            zip(models, [None, *comparison.candidates], strict=True)]  # fmt: skip
    note = t["speed_missing"]
    if ran:
        threads = next(candidate.speed.threads for candidate in comparison.candidates if candidate.speed)
        settings = comparison.settings
        note = t["speed_note"].format(
            prompt=settings.prompt_tokens, new=settings.new_tokens, rounds=settings.rounds, threads=threads,
            confidence=show.percent(comparison.confidence, 0),
        )  # fmt: skip
    return Grid(tuple(t[name] for name in columns), tuple(rows), (note,))


def _measured_row(
    t: Texts, comparison: Comparison, model: Model, candidate: Candidate | None, columns: list[str]
) -> tuple[str, ...]:
    missing, memory = t["missing"], model.memory
    cells = {
        "model": f"{model.name} ({t['dense_model']})" if candidate is None else model.name,
        "file_size": Cell(show.size(model.file_bytes), model.file_bytes, f"{model.file_bytes:,} B"),
        "load_time": missing if model.load_seconds is None else f"{model.load_seconds:.2f} s",
        "peak_memory": missing if memory is None else show.size(memory.peak_bytes),
        "device_memory": show.size(memory.device_peak_bytes) if memory and memory.device_peak_bytes else missing,
        "prefill": _throughput(t, comparison, candidate, "prefill"),
        "decode": _throughput(t, comparison, candidate, "decode"),
    }
    return tuple(cells[name] for name in columns)


def _throughput(t: Texts, comparison: Comparison, candidate: Candidate | None, name: str) -> str:
    """Return the speed of a candidate with its speedup; for the dense model the range over all candidates."""
    if candidate is None:
        medians = [getattr(one.speed, name).dense_median for one in comparison.candidates if one.speed]
        rounded = list(dict.fromkeys(_speed(value) for value in (min(medians), max(medians)))) if medians else []
        return t["tokens_per_s"].format(value="–".join(rounded)) if rounded else t["missing"]
    if candidate.speed is None:
        return t["missing"]
    throughput = getattr(candidate.speed, name)
    speedup = show.speedup(throughput.latency_ratio)
    key = "times_alone" if speedup.low is None else "times_as_fast"
    ends = {end: show.factor(value or 0) for end, value in (("low", speedup.low), ("high", speedup.high))}
    factor = t[key].format(factor=show.factor(speedup.value), **ends)
    median = throughput.candidate_median
    return Cell(t["tokens_per_s"].format(value=_speed(median)), median, factor)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"
