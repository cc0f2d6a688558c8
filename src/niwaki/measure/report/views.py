"""What the page shows of a comparison, as texts: headline, cards, gates, measurements. Nothing is measured here.

A template only lays out what these functions return. `t` is the table of texts of a language.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from niwaki.measure.metrics import METRICS
from niwaki.measure.report import numbers as show
from niwaki.measure.report.plots import mark
from niwaki.measure.schema import Candidate, Comparison, Estimate, Model, Verdict

Texts = Mapping[str, str]
SHOWN = 3  # failed gates on a card
SHARES = ("top1_agreement", "accuracy_loss", "accuracy_norm_loss")  # metrics that are read in percent


class Cell(str):
    """A cell of a table with the number to sort by and a second, smaller line."""

    key: float
    sub: str

    def __new__(cls, text: str, key: float, sub: str = "") -> "Cell":
        """The text as it is shown."""
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


def headline(t: Texts, found: Comparison) -> str:
    """The verdict of the whole in a sentence."""
    names = [candidate.model.name for candidate in found.candidates if candidate.passed]
    total = len(found.candidates)
    if found.passed is None:
        return t["headline_none"]
    key = "headline_all" if len(names) == total else "headline_some" if names else "headline_no"
    return t[key].format(total=total, passed=len(names), names=t["comma"].join(names))


def short(file: str, files: Sequence[str]) -> str:
    """The name of a file where it is the only one called so, else its path."""
    names = [Path(one).name for one in files]
    return Path(file).name if names.count(Path(file).name) == 1 else file


def about_model(t: Texts, model: Model) -> str:
    """What was done to a model, in a few words."""
    return " · ".join(filter(None, [t[f"kind_{model.kind}"], model.method, model.target]))


def estimate(t: Texts, found: Estimate, form: Callable[[float], str]) -> str:
    """A value in a cell, with its interval below."""
    return Cell(form(found.value), found.value, _interval(t, found, form))


def _interval(t: Texts, found: Estimate, form: Callable[[float], str]) -> str:
    if found.low is None or found.high is None:
        return t["interval_missing"]
    return t["interval"].format(low=form(found.low), high=form(found.high))


def cards(t: Texts, found: Comparison) -> list[dict[str, Any]]:
    """One card for every candidate: bytes, speed, quality, verdict."""
    made = []
    for number, candidate in enumerate(found.candidates):
        failures = [
            {"label": t[f"metric_{_metric(verdict)}"], "reason": reason(t, verdict)}
            for verdict in candidate.gates
            if not verdict.passed
        ]
        made.append(
            {
                "name": candidate.model.name,
                "mark": mark(candidate.model.name, number),
                "about": about_model(t, candidate.model),
                "passed": candidate.passed,
                "metrics": list(_headline_metrics(t, found, candidate)),
                "failures": failures[:SHOWN],
                "more": t["more_gates"].format(count=len(failures) - SHOWN) if len(failures) > SHOWN else "",
                "notes": [_scoring(t, candidate)] if candidate.scoring.how == "runtime" else [],
            }
        )
    return made


def _headline_metrics(t: Texts, found: Comparison, candidate: Candidate) -> Iterator[dict[str, Any]]:
    sizes = (candidate.model.file_bytes, found.dense.file_bytes)
    line = t["size_of"].format(size=show.size(sizes[0]), dense=show.size(sizes[1]))
    yield {"label": t["file_size"], "big": show.change(candidate.bytes_ratio), "unclear": False, "lines": [line]}
    if candidate.speed is not None:
        pace = candidate.speed.decode
        line = t["speed_of"].format(speed=_speed(pace.candidate_median), dense=_speed(pace.dense_median))
        faster = show.speedup(pace.latency_ratio)
        yield _metric_card(t, found, t["writing_speed"], faster, show.factor, 1, [line])
    if candidate.data:
        worst = max(candidate.data, key=lambda data: data.whole.perplexity_ratio.value)
        own = worst.whole
        lines = [t["value_of"].format(value=f"{own.perplexity:.2f}", dense=f"{own.dense_perplexity:.2f}")]
        label = _which(t, "perplexity", worst.data, found.settings.data)
        yield _metric_card(t, found, label, own.perplexity_ratio, show.change, 1, lines)
    if candidate.tasks:
        hardest = max(candidate.tasks, key=lambda task: task.accuracy.loss.value)
        answers, label = hardest.accuracy, _which(t, "accuracy", hardest.task, found.settings.tasks)
        both = {"value": show.percent(answers.accuracy), "dense": show.percent(answers.dense_accuracy)}
        card = _metric_card(
            t, found, label, show.opposite(answers.loss), show.points, 0, [t["value_of"].format(**both)]
        )
        yield card | {"big": t["percentage_points"].format(points=card["big"])}


def _metric_card(
    t: Texts,
    found: Comparison,
    label: str,
    one: Estimate,
    form: Callable[[float], str],
    nothing: float,
    lines: list[str],
) -> dict[str, Any]:
    if one.low is None or one.high is None:
        interval = t["no_interval"].format(units=one.units)
    else:
        confidence = show.percent(found.confidence, 0)
        interval = t["interval_of"].format(confidence=confidence, interval=_interval(t, one, form))
    unclear = one.low is not None and show.unclear(one, nothing)
    return {"label": label, "big": form(one.value), "unclear": unclear, "lines": [*lines, interval]}


def _which(t: Texts, metric: str, file: str, files: Sequence[str]) -> str:
    key = "metric_on_worst" if len(files) > 1 else "metric_on"
    return t[key].format(metric=t[metric], file=short(file, files), count=len(files))


def _scoring(t: Texts, candidate: Candidate) -> str:
    scoring = candidate.scoring
    return t["scored_runtime"].format(
        first=scoring.first_tokens,
        dense=scoring.dense_windows,
        windows=scoring.windows,
        skipped=show.percent(scoring.skipped_frac, 0),
    )


def gates(t: Texts, found: Comparison) -> list[dict[str, Any]]:
    """Every gate of every candidate; nothing without gates."""
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
        for candidate in found.candidates
        if candidate.gates
    ]


def reason(t: Texts, verdict: Verdict) -> str:
    """Why a gate passed or not, told from its numbers."""
    numbers = {
        "limit": _value(verdict, verdict.limit),
        "value": "" if verdict.measured is None else _value(verdict, verdict.measured),
        "bound": "" if verdict.bound is None else _value(verdict, verdict.bound),
        "confidence": show.percent(verdict.confidence, 1 if verdict.confidence > 0.99 else 0),
    }
    upper, measured = verdict.gate.startswith("max_"), verdict.measured
    if measured is None:
        key = "reason_missing"
    elif METRICS[_metric(verdict)].needs == "file":
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
    metric = _metric(verdict)
    if metric == "bytes":
        return show.size(value)
    return show.signed(f"{100 * value:.4g}%") if metric in SHARES else show.number(value)


def measured(t: Texts, found: Comparison) -> Grid:
    """Bytes, loading, memory and speed of the dense model and all candidates."""
    columns = ["model", "file_size", "load_time", "peak_memory", "device_memory", "reading", "writing"]
    models = [found.dense, *(candidate.model for candidate in found.candidates)]
    device = any(model.memory and model.memory.device_peak_bytes is not None for model in models)
    columns = [name for name in columns if device or name != "device_memory"]
    ran = any(candidate.speed for candidate in found.candidates)
    columns = columns if ran else columns[:2]
    rows = [_measured_row(t, found, model, candidate, columns) for model, candidate in
            zip(models, [None, *found.candidates], strict=True)]  # fmt: skip
    note = t["speed_missing"]
    if ran:
        threads = next(candidate.speed.threads for candidate in found.candidates if candidate.speed)
        settings = found.settings
        note = t["speed_note"].format(
            prompt=settings.prompt_tokens, new=settings.new_tokens, rounds=settings.rounds, threads=threads,
            confidence=show.percent(found.confidence, 0),
        )  # fmt: skip
    return Grid(tuple(t[name] for name in columns), tuple(rows), (note,))


def _measured_row(
    t: Texts, found: Comparison, model: Model, candidate: Candidate | None, columns: list[str]
) -> tuple[str, ...]:
    missing, memory = t["missing"], model.memory
    cells = {
        "model": f"{model.name} ({t['dense_model']})" if candidate is None else model.name,
        "file_size": Cell(show.size(model.file_bytes), model.file_bytes, f"{model.file_bytes:,} B"),
        "load_time": missing if model.load_seconds is None else f"{model.load_seconds:.2f} s",
        "peak_memory": missing if memory is None else show.size(memory.peak_bytes),
        "device_memory": show.size(memory.device_peak_bytes) if memory and memory.device_peak_bytes else missing,
        "reading": _pace(t, found, candidate, "prefill"),
        "writing": _pace(t, found, candidate, "decode"),
    }
    return tuple(cells[name] for name in columns)


def _pace(t: Texts, found: Comparison, candidate: Candidate | None, name: str) -> str:
    """Speed of a candidate with its factor; of the dense model the range over the candidates it took turns with."""
    if candidate is None:
        medians = [getattr(one.speed, name).dense_median for one in found.candidates if one.speed]
        ends = list(dict.fromkeys(_speed(value) for value in (min(medians), max(medians)))) if medians else []
        return t["tokens_per_s"].format(value="–".join(ends)) if ends else t["missing"]
    if candidate.speed is None:
        return t["missing"]
    pace = getattr(candidate.speed, name)
    faster = show.speedup(pace.latency_ratio)
    key = "times_alone" if faster.low is None else "times_as_fast"
    sides = {end: show.factor(value or 0) for end, value in (("low", faster.low), ("high", faster.high))}
    factor = t[key].format(factor=show.factor(faster.value), **sides)
    return Cell(t["tokens_per_s"].format(value=_speed(pace.candidate_median)), pace.candidate_median, factor)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"
