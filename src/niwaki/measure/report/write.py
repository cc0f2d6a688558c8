"""The report of a comparison as one HTML file that opens without a network, in English or Japanese.

    write_page(Path("report/report.html"), comparison, [read_layers(Path("four"))], "ja")

Templates lie in templates/, texts in `english` and `japanese`, plots in `plots` and `charts`, what is shown as texts
in `views` and `passages`; `page` puts them together. The file is about 5 MB, 4.8 of them plotly.js: the Python package
ships no smaller bundle. Cost: about a second.
"""

from collections.abc import Sequence
from pathlib import Path

from niwaki.measure.report.layers import Layers, read_layers
from niwaki.measure.report.page import render
from niwaki.measure.report.strings import LANGUAGES, check_language
from niwaki.measure.schema import Comparison
from niwaki.model.files import write_text

PAGE = "report.html"


def write_page(path: Path, found: Comparison, records: Sequence[Layers | None], language: str = "en") -> None:
    """Writes the page, whole or not at all. `records`: what was done to every candidate, None where that is unknown."""
    layers = {one.model.name: record for one, record in zip(found.candidates, records, strict=True)}
    write_text(path, render(found, layers, language))


__all__ = ["LANGUAGES", "PAGE", "Layers", "check_language", "read_layers", "write_page"]
