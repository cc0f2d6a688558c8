"""Hooks that put the measurements beside the pages, so that links to them work in the repository and on the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Return the files of the site with every JSON and SVG of the benchmarks."""
    for path in sorted(path for path in RESULTS.rglob("*") if path.is_file()):
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to the measurements fit the site."""
    return markdown.replace("(../../benchmarks/results/", "(../results/").replace(
        "(../benchmarks/results/", "(results/"
    )
