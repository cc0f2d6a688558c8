"""Puts the measurements beside the pages: links to benchmarks/results work in the repository and on the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Every JSON and SVG of the benchmarks becomes a file of the site."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """From docs/ the folder is one step further up than on the site."""
    return markdown.replace("(../../benchmarks/results/", "(../results/").replace(
        "(../benchmarks/results/", "(results/"
    )
