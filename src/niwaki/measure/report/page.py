"""The report of a comparison: one HTML file that opens without a network, in English or Japanese.

    write_page(Path("report/report.html"), comparison, [read_layers(Path("four"))], "ja")

The templates are in templates/, the texts in `english` and `japanese`, the plots in `plots` and `charts`. `views` and
`passages` turn values into texts. This module combines them.

The file loads nothing: its content security policy forbids all addresses. It allows only the two scripts written here,
by their hashes. jinja2 escapes texts of models and data. The size is about 5 MB, 4.8 of them plotly.js, because the
Python package ships no smaller bundle. Cost: about a second.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from niwaki.compression.run_record import MatrixRecord
from niwaki.measure.report import charts, passages, plots, views
from niwaki.measure.report import numbers as show
from niwaki.measure.report.layers import Layers
from niwaki.measure.report.strings import date, strings
from niwaki.measure.report.views import Cell, Texts
from niwaki.measure.schema import Comparison
from niwaki.model.files import write_text
from niwaki.version import __version__

PAGE = "report.html"
MAX_LINES = 200  # of the table of matrices; larger models have thousands
TEMPLATES = "templates"
_SECTIONS = (
    "tradeoff", "gates", "measured", "quality", "tasks", "layers", "generations", "worst", "reproduce", "environment",
)  # fmt: skip
_COLUMNS: Mapping[str, Callable[[Texts, MatrixRecord], str]] = {  # of the table of matrices: heading and cell
    "block_column": lambda t, line: str(line.block),
    "matrix": lambda t, line: line.matrix,
    "target": lambda t, line: line.target,
    "stored_as": lambda t, line: line.kind,
    "shape": lambda t, line: "×".join(map(str, line.shape)),
    "bits": lambda t, line: f"{line.bits:.2f}",
    "zeros": lambda t, line: Cell(show.percent(line.zeros_frac), line.zeros_frac),
    "bytes": lambda t, line: Cell(f"{line.bytes:,}", line.bytes),
    "error_before": lambda t, line: _error_cell(t, line.error_before_update),
    "error_after": lambda t, line: _error_cell(t, line.error),
    "remark": lambda t, line: line.note,
}


def write_page(path: Path, comparison: Comparison, records: Sequence[Layers | None], language: str = "en") -> None:
    """Write the page, complete or not at all. `records`: the layers of every candidate, None if unknown."""
    layers = {one.model.name: record for one, record in zip(comparison.candidates, records, strict=True)}
    write_text(path, render(comparison, layers, language))


def render(comparison: Comparison, layers: Mapping[str, Layers | None], language: str) -> str:
    """Return the page in a language. `layers`: the record of every candidate, by name."""
    t = strings(language)
    environment = Environment(
        loader=PackageLoader("niwaki.measure.report", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, library = _read("report.js"), plots.library()
    content = _content(t, comparison, layers)
    present = {key for key, value in content["present"].items() if value}
    return environment.get_template("page.html.j2").render(
        **content,
        t=t,
        lang=language,
        version=__version__,
        sections=[(name, t[name]) for name in _SECTIONS if name in present],
        policy=_policy(library, script),
        css=Markup(_read("report.css")),
        script=Markup(script),
        plotly=Markup(library),
    )


def _content(t: Texts, comparison: Comparison, layers: Mapping[str, Layers | None]) -> dict[str, Any]:
    quality, tasks = charts.quality(t, comparison), passages.tasks(t, comparison)
    texts, worst, gated = passages.generations(t, comparison), passages.worst(t, comparison), views.gates(t, comparison)
    own = {"gates": gated, "quality": quality.rows, "tasks": tasks.rows, "generations": texts, "worst": worst}
    cards = views.cards(t, comparison)
    always = dict.fromkeys(("tradeoff", "measured", "layers", "reproduce", "environment"), True)
    return {
        "comparison": comparison,
        "dense": comparison.dense,
        "about": _about(t, comparison),
        "headline": views.headline(t, comparison),
        "cards": cards,
        "rows": 4 + max(len(card["metrics"]) for card in cards),
        "confidence": f"{100 * comparison.confidence:.4g}%",
        "tradeoff": [_inline(plot) for plot in charts.tradeoffs(t, comparison)],
        "gated": gated,
        "gate_confidence": f"{100 * _judged_at(comparison):.4g}%",
        "measured": views.measured(t, comparison),
        "quality": {"columns": quality.columns, "rows": quality.rows, "plots": _inlined(quality.more["plots"])},
        "tasks": {"columns": tasks.columns, "rows": tasks.rows, "flips": tasks.more["flips"]},
        "growth": _growth(t, comparison, layers),
        "layers": [_layers(t, number, *one) for number, one in enumerate(layers.items())],
        "generations": texts,
        "worst": worst,
        "legend": passages.legend(),
        "recipes": _recipes(comparison),
        "pairs_columns": (t["setting"], t["setting_value"]),
        "settings": _settings(t, comparison),
        "environment": _environment(t, comparison),
        "present": always | own,
    }


def _about(t: Texts, comparison: Comparison) -> str:
    environment = comparison.environment
    machine = environment.accelerator or f"{environment.processor} × {environment.cores}"
    return t["about"].format(
        date=date(t, comparison.date), accelerator=machine, command_seconds=f"{comparison.seconds:.0f}"
    )


def _growth(t: Texts, comparison: Comparison, layers: Mapping[str, Layers | None]) -> dict[str, Any]:
    growth = charts.growths(t, comparison, layers)
    return {"plots": _inlined(growth.more["plots"]), "notes": growth.notes}


def _layers(t: Texts, number: int, name: str, layers: Layers | None) -> dict[str, Any]:
    if layers is None or not layers.lines:
        return {"name": name, "note": t["no_record" if layers is None else "no_lines"], "plots": [], "rows": []}
    lines = sorted(layers.lines, key=lambda line: -(line.error or 0))
    more = ""
    if len(lines) > MAX_LINES:
        more = t["and_more"].format(shown=MAX_LINES, total=len(lines), file="niwaki/blocks.jsonl")
    return {
        "name": name,
        "note": "",
        "plots": _inlined(charts.heatmaps(t, number, layers)),
        "title": t["cut_table"].format(name=name),
        "columns": tuple(t[key] for key in _COLUMNS),
        "rows": [tuple(cell(t, line) for cell in _COLUMNS.values()) for line in lines[:MAX_LINES]],
        "more": more,
    }


def _error_cell(t: Texts, error: float | None) -> str:
    return t["missing"] if error is None else Cell(f"{error:.2g}", error)


def _recipes(comparison: Comparison) -> list[dict[str, str]]:
    return [
        {
            "name": candidate.model.name,
            "text": yaml.safe_dump(candidate.model.recipe, sort_keys=False, allow_unicode=True),
        }
        for candidate in comparison.candidates
        if candidate.model.recipe
    ]


def _settings(t: Texts, comparison: Comparison) -> list[tuple[str, str]]:
    rows = []
    for name, value in comparison.settings.model_dump().items():
        shown = t["comma"].join(value) if isinstance(value, tuple) else value
        if shown in (None, ""):
            shown = t["all"] if name in ("max_tokens", "limit") else t["none"]
        rows.append((t.get(f"set_{name}", name), f"{shown:,}" if type(shown) is int else str(shown)))
    return rows


def _environment(t: Texts, comparison: Comparison) -> list[tuple[str, str]]:
    about = comparison.environment
    rows = [
        (t["env_processor"], f"{about.processor} ({about.machine})"),
        (t["env_cores"], str(about.cores)),
        (t["env_memory"], show.size(about.memory_bytes)),
        (t["env_accelerator"], about.accelerator or t["none"]),
        (t["env_system"], about.system),
        (t["env_architecture"], comparison.dense.architecture),
        ("Python", about.python),
    ]
    return [*rows, *about.versions.items()]


def _inlined(own_plots: list[plots.Plot]) -> list[dict[str, Any]]:
    return [_inline(plot) for plot in own_plots]


def _inline(plot: plots.Plot) -> dict[str, Any]:
    """Return a plot for the template. Its JSON is put into a script unescaped, so no text in it may end the script."""
    safe = json.dumps(json.loads(plot.json), ensure_ascii=False).replace("<", "\\u003c")
    return {**vars(plot), "json": Markup(safe)}


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"  # noqa: E501


def _read(name: str) -> str:
    return (files("niwaki.measure.report") / TEMPLATES / name).read_text(encoding="utf-8")


def _judged_at(comparison: Comparison) -> float:
    """Return the confidence of the intervals that were judged."""
    stated = comparison.gate or {}
    return stated.get("each_confidence", stated.get("confidence", comparison.confidence))
