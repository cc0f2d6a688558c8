"""The report of a comparison as one HTML file that opens without a network, in English or Japanese.

    write_page(Path("report/report.html"), comparison, [Path("four")], "ja")

Templates lie in templates/, texts in `english` and `japanese`, plots in `plots` and `charts`, what is shown as texts
in `views` and `passages`; `page` puts them together. The file is about 5 MB, 4.8 of them plotly.js: the Python package
ships no smaller bundle. Cost: about a second.
"""

from collections.abc import Sequence
from pathlib import Path

from niwaki.comparing.evidence import Comparison
from niwaki.reporting.layers import read_layers
from niwaki.reporting.page import render
from niwaki.reporting.strings import LANGUAGES, check_language
from niwaki.writing import write_text

PAGE = "report.html"


def write_page(path: Path, found: Comparison, folders: Sequence[Path], language: str = "en") -> None:
    """Writes the page, whole or not at all. `folders`: where the files of every candidate lie.

    Raises InputError for an unknown language and CheckpointError for a broken record of a candidate.
    """
    check_language(language)
    names = [one.model.name for one in found.candidates]
    layers = {name: read_layers(folder) for name, folder in zip(names, folders, strict=True)}
    write_text(path, render(found, layers, language))


__all__ = ["LANGUAGES", "PAGE", "check_language", "write_page"]
