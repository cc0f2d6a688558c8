"""Plots of a report: plotly figures without the colours of the page. Each has a text summary and a table.

Candidates have different colours and markers. The colours of Okabe and Ito, and cividis for amounts, are
distinguishable with colour blindness. The browser sets the colours of text and grid, because the page can be light or
dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from niwaki.measure.report.layers import Measure
from niwaki.measure.schema import Estimate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon")
LABEL = 26  # characters of a label that leave room for a plot on a phone
GLYPHS = dict(zip(MARKERS, "●■◆▲✚★⬢", strict=True)) | {"x": "✖"}
GREY = "#7f8894"
_MARGIN = {"l": 64, "r": 18, "t": 14, "b": 54}


@dataclass(frozen=True)
class Mark:
    """Colour and marker of a model in every plot."""

    name: str
    color: str
    glyph: str


@dataclass(frozen=True)
class Plot:
    """A figure for the page. `json` is the plotly figure, `columns` and `rows` are its table.

    `note` is the text below it, `summary` the description for screen readers.
    """

    id: str
    title: str
    note: str
    summary: str
    height: int
    json: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Point:
    """A model in a trade-off: both values may have an interval."""

    name: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Axis:
    """Title and number format of an axis. `reference`: the value of the dense model, `limit`: that of a gate."""

    title: str
    form: str = ".2f"
    prefix: str = ""
    reference: float | None = None
    limit: float | None = None


def library() -> str:
    """Return plotly.js. The package ships no smaller bundle."""
    return str(get_plotlyjs())


def color(number: int) -> str:
    """Return the colour of a candidate by its number."""
    return COLORS[number % len(COLORS)]


def mark(name: str, number: int) -> Mark:
    """Return the mark of a candidate by its number."""
    return Mark(name, color(number), GLYPHS[MARKERS[number % len(MARKERS)]])


def dense_mark(name: str) -> Mark:
    """Return the mark of the dense model."""
    return Mark(name, GREY, GLYPHS["x"])


def tradeoff(points: Sequence[Point], dense: str, x: Axis, y: Axis, limit: str) -> go.Figure:
    """Plot every candidate and the dense model, with intervals and the limits of the gates."""
    figure = go.Figure()
    marker = {"color": GREY, "size": 12, "symbol": "x", "line": {"width": 0}}
    figure.add_scatter(x=[x.reference], y=[y.reference], name=_plain(dense), mode="markers", marker=marker)
    for number, point in enumerate(points):
        figure.add_scatter(
            x=[point.x.value],
            y=[point.y.value],
            error_x=_bars([point.x]),
            error_y=_bars([point.y]),
            name=_plain(point.name),
            mode="markers",
            marker={"color": color(number), "size": 12, "symbol": MARKERS[number % len(MARKERS)]},
        )
    wide = _wide([point.y.value for point in points])
    _limits(figure, x, y, limit, log_y=wide)
    x_values = [
        x.reference or 0,
        *(end for p in points for end in (p.x.low, p.x.value, p.x.high) if end is not None and math.isfinite(end)),
    ]
    margin = 0.08 * max(max(x_values) - min(x_values), 0.1)
    figure.update_xaxes(
        title=x.title, tickformat=x.form, tickprefix=x.prefix, range=[min(x_values) - margin, max(x_values) + margin]
    )
    figure.update_yaxes(title=y.title, tickformat=y.form, tickprefix=y.prefix, type="log" if wide else "linear")
    return _laid_out(figure)


def forest(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[Estimate | None]]], x: Axis, limit: str
) -> go.Figure:
    """Plot an estimate with its interval for every group and candidate, the candidates of a group in rows."""
    figure = go.Figure()
    step = 0.6 / max(len(series), 1)
    for number, (name, estimates) in enumerate(series):
        known = [(place, one) for place, one in enumerate(estimates) if one is not None]
        figure.add_scatter(
            x=[one.value for _, one in known],
            y=[place + (number - (len(series) - 1) / 2) * step for place, _ in known],
            error_x=_bars([one for _, one in known]),
            name=_plain(name),
            mode="markers",
            marker={"color": color(number), "size": 9, "symbol": MARKERS[number % len(MARKERS)]},
            customdata=[groups[place] for place, _ in known],
            hovertemplate="%{customdata}: %{x:.3f}<extra>%{fullData.name}</extra>",
        )
    wide = _wide([one.value for _, estimates in series for one in estimates if one is not None])
    _limits(figure, x, Axis(""), limit, log_x=wide)
    figure.update_xaxes(title=x.title, tickformat=x.form, type="log" if wide else "linear")
    figure.update_yaxes(
        tickvals=list(range(len(groups))),
        ticktext=[_plain(group if len(group) <= LABEL else f"…{group[1 - LABEL :]}") for group in groups],
        range=[len(groups) - 0.4, -0.6],
        automargin=True,
        showgrid=False,
        zeroline=False,
    )
    return _laid_out(figure)


def heatmap(measure: Measure, block: str, form: str, top: float | None) -> go.Figure:
    """Plot a cell for every projection and block, with numbers in the cells if they fit."""
    small = len(measure.blocks) <= 12
    shown = [[None if value is None else format(value, form) for value in row] for row in measure.values]
    figure = go.Figure(
        go.Heatmap(
            x=[str(index) for index in measure.blocks],
            y=[
                _plain(projection.removeprefix("self_attn.").removeprefix("mlp.")) for projection in measure.projections
            ],
            z=measure.values,
            text=shown,
            customdata=[[name] * len(measure.blocks) for name in map(_plain, measure.projections)],
            texttemplate="%{text}" if small else "",
            hovertemplate=block + " %{x}, %{customdata}: %{text}<extra></extra>",
            hoverongaps=False,
            colorscale="Cividis",
            zmin=0,
            zmax=top if top is not None else max(measure.known),
            xgap=1,
            ygap=1,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": form, "len": 1},
        )
    )
    figure.update_xaxes(title=block, type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(margin={"l": 20, "r": 10})
    return _laid_out(figure)


def growth(series: Sequence[tuple[str, int, dict[int, float]]], block: str, title: str) -> go.Figure:
    """Plot a line over depth for every candidate, (name, number of the candidate, error by block)."""
    figure = go.Figure()
    for name, number, errors in series:
        figure.add_scatter(
            x=list(errors),
            y=list(errors.values()),
            name=_plain(name),
            mode="lines+markers",
            line={"color": color(number), "width": 2},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 8},
        )
    wide = _wide([value for _, _, errors in series for value in errors.values() if value > 0])
    deepest = max((place for _, _, errors in series for place in errors), default=0)
    figure.update_xaxes(title=block, tickformat="d", tick0=0, dtick=max(1, math.ceil(deepest / 10)))
    figure.update_yaxes(title=title, type="log" if wide else "linear", rangemode="tozero", tickformat="~g")
    return _laid_out(figure)


def _laid_out(figure: go.Figure) -> go.Figure:
    margin = {**_MARGIN, **{k: v for k, v in figure.layout.margin.to_plotly_json().items() if v is not None}}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        margin=margin,
        autosize=True,
        showlegend=False,  # the page has a legend above the plot, which can wrap
        dragmode=False,
        hovermode="closest",
    )
    figure.update_xaxes(fixedrange=True, title_standoff=8, title_font_size=13)
    figure.update_yaxes(fixedrange=True, title_standoff=8, title_font_size=13)
    return figure


def _bars(estimates: Sequence[Estimate]) -> dict[str, object]:
    """Return error bars, of length 0 for an estimate without an interval."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if one.high is None or not math.isfinite(one.high) else one.high - one.value for one in estimates],
        "arrayminus": [0 if one.low is None else one.value - one.low for one in estimates],
        "thickness": 1.6,
        "width": 5,
    }


def _limits(figure: go.Figure, x: Axis, y: Axis, name: str, *, log_x: bool = False, log_y: bool = False) -> None:
    """Draw dotted lines at the dense model, and dashed ones with a name at the limits."""
    for add, axis in ((figure.add_vline, x), (figure.add_hline, y)):
        if axis.reference is not None:
            add(axis.reference, line={"width": 1, "dash": "dot"})
        if axis.limit is not None:
            add(axis.limit, line={"width": 1.5, "dash": "dash"})
    about = {"text": name, "showarrow": False, "font": {"size": 12}}
    if x.limit is not None:  # annotations, unlike lines, are placed by the logarithm
        at = math.log10(x.limit) if log_x else x.limit
        figure.add_annotation(x=at, y=0, yref="paper", xanchor="left", yanchor="bottom", xshift=3, **about)
    if y.limit is not None:
        at = math.log10(y.limit) if log_y else y.limit
        figure.add_annotation(y=at, x=1, xref="paper", xanchor="right", yanchor="bottom", **about)


def _wide(values: Sequence[float]) -> bool:
    """Check whether only a logarithmic axis can show all values."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return len(positive) == len(values) > 0 and max(positive) / min(positive) > 20


def _plain(text: str) -> str:
    """Escape a text, because plotly interprets some HTML tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
