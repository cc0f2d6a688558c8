"""Plots of a comparison with titles and summaries in a language, and the table of the quality of texts.

`quality` returns this table with its plots. The other tables of a report are in `views`, `passages` and `page`.
"""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from niwaki.measure.description import short_name
from niwaki.measure.report import numbers as show
from niwaki.measure.report import plots
from niwaki.measure.report.layers import Layers, Measure
from niwaki.measure.report.plots import Axis, Plot, Point
from niwaki.measure.report.views import Cell, Grid, Texts, estimate
from niwaki.measure.schema import Candidate, Comparison, DataQuality, Estimate, Quality, TaskQuality

NUMBER_FORMATS = {"kept": ".0%", "zeros": ".1%", "bits": ".2f", "error": ".2g"}
TOPS = {"kept": 1.0, "zeros": 1.0, "error": None}


def tradeoffs(t: Texts, comparison: Comparison) -> list[Plot]:
    """Plot bytes and speed against the quality on every data file, or on every task if there is no text."""
    trade_offs = []
    for place, (file, key) in enumerate(_qualities(comparison)):
        about = {"file": short_name(file, [one for one, _ in _qualities(comparison)])}
        y = Axis(
            t[f"axis_{key}"].format(**about), ".3~f", reference=1, limit=_limit(comparison, "max_perplexity_ratio")
        )
        if key == "loss":
            y = Axis(t["axis_loss"].format(**about), ".2~%", reference=0, limit=_limit(comparison, "max_accuracy_loss"))
        x = Axis(t["axis_bytes"], ".2~%", reference=1, limit=_byte_limit(comparison))
        points = [
            Point(one.model.name, _exact(one.bytes_ratio), _quality(one, file, key)) for one in comparison.candidates
        ]
        trade_offs.append(_tradeoff(t, comparison, f"bytes-{place}", "tradeoff_bytes", "better_left", points, x, y))
        latency = _limit(comparison, "max_decode_latency_ratio")
        x = Axis(t["axis_speed"], ".3~f", "×", reference=1, limit=None if latency is None else 1 / latency)
        points = [
            Point(one.model.name, show.speedup(one.speed.decode.latency_ratio), _quality(one, file, key))
            for one in comparison.candidates
            if one.speed is not None
        ]
        if points:
            trade_offs.append(
                _tradeoff(t, comparison, f"speed-{place}", "tradeoff_speed", "better_right", points, x, y)
            )
    return trade_offs


def _tradeoff(
    t: Texts, comparison: Comparison, name: str, title: str, better: str, points: list[Point], x: Axis, y: Axis
) -> Plot:
    def x_text(value: float) -> str:
        return show.percent(value) if x.form.endswith("%") else show.factor(value)

    def y_text(value: float) -> str:
        return show.percent(value) if y.form.endswith("%") else show.ratio(value)

    exact = title == "tradeoff_bytes"
    sides = [(x_text(p.x.value) if exact else estimate(t, p.x, x_text), estimate(t, p.y, y_text)) for p in points]
    lines = [t["point_summary"].format(name=p.name, x=x_text(p.x.value), y=y_text(p.y.value)) for p in points]
    return Plot(
        id=f"plot-{name}",
        title=t[title],
        note=t[better],
        summary=f"{t['plot_of'].format(x=x.title, y=y.title)} {'; '.join(lines)}.",
        height=350,
        json=_json(plots.tradeoff(points, comparison.dense.name, x, y, t["limit_line"])),
        columns=(t["candidate"], x.title, y.title),
        rows=tuple((point.name, *side) for point, side in zip(points, sides, strict=True)),
        legend=(plots.dense_mark(comparison.dense.name), *_marks(comparison)),
    )


def quality(t: Texts, comparison: Comparison) -> Grid:
    """Return the table of every data file, whole and by domain, for every candidate; with a plot if it has rows."""
    groups = list(dict.fromkeys(group for one in comparison.candidates for group, _ in _parts(t, one)))
    rows = []
    for group in groups:
        for candidate in comparison.candidates:
            one = dict(_parts(t, candidate)).get(group)
            if one is not None:
                rows.append((group, candidate.model.name, *_quality_cells(t, one)))
    names = ["data", "candidate", "tokens", "perplexity", "metric_perplexity_ratio"]
    columns = tuple(t[name] for name in [*names, "kl", "agreement"])
    return Grid(columns, tuple(rows), more={"plots": [_forest(t, comparison, groups)] if len(groups) > 1 else []})


def _quality_cells(t: Texts, one: Quality) -> tuple[str, ...]:
    return (
        Cell(f"{one.tokens:,}", one.tokens, t[f"units_of_{one.unit}"].format(count=f"{one.units:,}")),
        Cell(f"{one.perplexity:.3f}", one.perplexity, t["dense_value"].format(value=f"{one.dense_perplexity:.3f}")),
        estimate(t, one.perplexity_ratio, show.ratio),
        estimate(t, one.kl, lambda value: f"{value:.4f}"),
        estimate(t, one.top1_agreement, show.percent),
    )


def _forest(t: Texts, comparison: Comparison, groups: list[str]) -> Plot:
    series = []
    for candidate in comparison.candidates:
        own = dict(_parts(t, candidate))
        series.append((candidate.model.name, [own[g].perplexity_ratio if g in own else None for g in groups]))
    lines = [
        t["plot_line"].format(
            name=name,
            values=t["comma"].join(
                t["plot_value"].format(group=group, value=show.ratio(one.value))
                for group, one in zip(groups, estimates, strict=True)
                if one is not None
            ),
        )
        for name, estimates in series
    ]
    rows = tuple(
        (group, *("" if one is None else estimate(t, one, show.ratio) for one in (own[place] for _, own in series)))
        for place, group in enumerate(groups)
    )
    x = Axis(t["metric_perplexity_ratio"], ".3~f", reference=1, limit=_limit(comparison, "max_perplexity_ratio"))
    return Plot(
        id="plot-quality",
        title=t["quality_plot"],
        note="",
        summary="; ".join(lines),
        height=80 + max(44, 20 * len(series)) * len(groups),
        json=_json(plots.forest(groups, series, x, t["limit_line"])),
        columns=(t["data"], *(name for name, _ in series)),
        rows=rows,
        legend=_marks(comparison),
    )


def growths(t: Texts, comparison: Comparison, layers: Mapping[str, Layers | None]) -> Grid:
    """Plot the error of every block, and the drift from the dense model if it was recorded."""
    growth_plots, notes = [], []
    for name, note in (("growth", "growth_note"), ("drift", "drift_note")):
        series = [
            (candidate.model.name, number, getattr(own, name))
            for number, candidate in enumerate(comparison.candidates)
            if (own := layers[candidate.model.name]) is not None and getattr(own, name)
        ]
        if not series:
            continue
        lines = [_growth_line(t, model, errors) for model, _, errors in series]
        blocks = sorted({block for _, _, errors in series for block in errors})
        growth_plots.append(
            Plot(
                id=f"plot-{name}",
                title=t[name],
                note=t[note],
                summary=f"{'; '.join(lines)}.",
                height=310,
                json=_json(plots.growth(series, t["block"], t["error_axis"])),
                columns=(t["block_column"], *(model for model, _, _ in series)),
                rows=tuple(
                    (str(block), *(_small(errors[block]) if block in errors else "" for _, _, errors in series))
                    for block in blocks
                ),
                legend=tuple(plots.mark(model, number) for model, number, _ in series),
            )
        )
    if not any(own is not None and own.drift for own in layers.values()):
        notes.append(t["drift_missing"])
    return Grid((), (), tuple(notes), {"plots": growth_plots})


def _growth_line(t: Texts, name: str, errors: dict[int, float]) -> str:
    first, last, top = min(errors), max(errors), max(errors, key=lambda block: errors[block])
    values = {"first": _small(errors[first]), "last": _small(errors[last]), "top": _small(errors[top])}
    return t["growth_line"].format(name=name, first_block=first, last_block=last, top_block=top, **values)


def heatmaps(t: Texts, number: int, layers: Layers) -> list[Plot]:
    """Plot every measure of the matrices, by block and projection."""
    return [_heatmap(t, f"plot-layers-{number}-{name}", measure) for name, measure in layers.measures.items()]


def _heatmap(t: Texts, name: str, measure: Measure) -> Plot:
    form = NUMBER_FORMATS[measure.name]
    cells = [
        (value, t["map_where"].format(block=block, projection=projection))
        for projection, row in zip(measure.projections, measure.values, strict=True)
        for block, value in zip(measure.blocks, row, strict=True)
        if value is not None
    ]
    (low, low_where), (high, high_where) = min(cells), max(cells)
    shown = [format(value, form) for value in (low, high, sum(measure.known) / len(cells))]
    summary = t["map_range"].format(
        low=shown[0], low_where=low_where, high=shown[1], high_where=high_where, mean=shown[2]
    )
    if shown[0] == shown[1]:
        summary = t["map_uniform"].format(value=shown[0])
    top = (8.0 if high <= 8 else 16.0) if measure.name == "bits" else TOPS[measure.name]
    return Plot(
        id=name,
        title=t[f"measure_{measure.name}"],
        note=summary,
        summary=t["plot_line"].format(name=t[f"measure_{measure.name}"], values=summary),
        height=70 + 34 * len(measure.projections) + 30,
        json=_json(plots.heatmap(measure, t["block"], form, top)),
        columns=(t["matrix"], *map(str, measure.blocks)),
        rows=tuple(
            (projection, *("" if value is None else format(value, form) for value in row))
            for projection, row in zip(measure.projections, measure.values, strict=True)
        ),
    )


def _parts(t: Texts, candidate: Candidate) -> list[tuple[str, Quality]]:
    parts, files = [], [data.data for data in candidate.data]
    for data in candidate.data:
        name = short_name(data.data, files)
        parts.append((t["whole_file"].format(file=name), data.whole))
        for domain, one in data.domains.items():
            parts.append((t["domain_of"].format(file=name, domain=domain), one))
    return parts


def _qualities(comparison: Comparison) -> list[tuple[str, str]]:
    first = comparison.candidates[0]
    return [(one.data, "perplexity") for one in first.data] or [(one.task, "loss") for one in first.tasks]


def _quality(candidate: Candidate, file: str, key: str) -> Estimate:
    results: Sequence[DataQuality | TaskQuality] = candidate.data if key == "perplexity" else candidate.tasks
    for one in results:
        if isinstance(one, DataQuality) and one.data == file:
            return one.whole.perplexity_ratio
        if isinstance(one, TaskQuality) and one.task == file:
            return one.accuracy.loss
    raise KeyError(file)  # every candidate was measured on the same files


def _marks(comparison: Comparison) -> tuple[plots.Mark, ...]:
    return tuple(plots.mark(one.model.name, number) for number, one in enumerate(comparison.candidates))


def _limit(comparison: Comparison, gate: str) -> float | None:
    return None if comparison.gate is None else comparison.gate.get(gate)


def _byte_limit(comparison: Comparison) -> float | None:
    """Return the stricter of the gates on bytes, as a share of the dense model."""
    count, share = _limit(comparison, "max_bytes"), _limit(comparison, "max_bytes_ratio")
    limits = [share, None if count is None else count / comparison.dense.file_bytes]
    return min((limit for limit in limits if limit is not None), default=None)


def _exact(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value, units=1)


def _small(value: float) -> str:
    return f"{value:.2g}"


def _json(figure: go.Figure) -> str:
    return str(figure.to_json())
