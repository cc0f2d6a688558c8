"""The handbook says what the code does: generated parts are fresh, links lead somewhere, commands exist."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from niwaki.cli.app import app
from niwaki.config.presets import PRESETS
from niwaki.methods.registry import EVERY

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [*PAGES, ROOT / "README.md"]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_generated_parts_are_fresh(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generator().render(text) == text, "stale: run python docs/generate.py"
    assert text.count("<!-- generated:") == text.count("<!-- end -->")


def test_every_method_has_a_page_with_all_its_parts() -> None:
    for name in EVERY:
        text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        for part in ("facts", "numbers", "speed", "works", "options"):
            assert f"<!-- generated: {part} {name} -->" in text, f"{name}: {part}"
        for heading in ("**Choose it**", "## Limits"):
            assert heading in text, f"{name}: {heading}"


def test_numbers_are_those_of_the_measurements() -> None:
    found = json.loads((ROOT / "benchmarks/results/quality-quantized-llama-28m.json").read_text())
    row = next(row for row in found["rows"] if row["label"] == "squeeze10" and row["target"] == "2.0bit")
    said = f"| 2.0bit |  | {row['runs'][0]['bits']:.2f} true bits | {row['reviews']['mean']:.2f}\u00a0±\u00a0"
    assert said in (DOCS / "methods/squeeze10.md").read_text(encoding="utf-8")


ROWS = {
    "`wanda`, 50 % zeros": ("quality-llama-28m", {"method": "wanda", "target": "0.5"}),
    "`sparsegpt`, 2:4": ("quality-llama-28m", {"method": "sparsegpt", "target": "2:4"}),
    "preset `best`, 2:4": ("quality-learned-llama-28m", {"preset": "best", "target": "2:4"}),
    "`squeeze10`, 2 bits": ("quality-quantized-llama-28m", {"label": "squeeze10", "target": "2.0bit"}),
}


def test_the_readme_is_short_and_its_numbers_are_those_of_the_measurements() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 170, "the rest belongs into docs/measured.md and docs/limits.md"
    for label, (file, wanted) in ROWS.items():
        rows = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text(encoding="utf-8"))["rows"]
        row = next(
            row for row in rows if wanted.items() <= row.items() and row.get("allocation", "uniform") == "uniform"
        )
        said = " / ".join(f"{row[data]['mean']:.1f}" for data in ("reviews", "wikitext2"))
        assert f"| {label} | {said} |" in text, f"{label}: {said}"


def test_the_command_line_shows_defaults_and_what_is_required() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    evaluate = text.partition("## evaluate")[2].partition("\n## ")[0]
    assert "| `--seq-len` | `1024` | Tokens per window. |" in evaluate
    assert "niwaki evaluate MODEL [OPTIONS]" in evaluate and '{"pairs": [[context, continuation], ...]' in evaluate
    assert "niwaki compare DENSE OUT... [OPTIONS]" in text
    generate = text.partition("## generate")[2].partition("\n## ")[0]
    assert "| `--seed` | `0` | Seed for sampling. |" in generate
    assert "| `--to` | required |" in text and "| `--samples` | `128` | Calibration windows. |" in text


def test_a_changed_option_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import make_dataclass

    from niwaki.methods import rtn

    page = (DOCS / "methods/rtn.md").read_text(encoding="utf-8")
    monkeypatch.setattr(rtn, "Config", make_dataclass("Config", [("group", int, 64)]))
    assert generator().render(page) != page


class Links(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.loaded.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "preload", "icon", "dns-prefetch"):
            self.loaded.append(given.get("href") or "")


def test_the_site_builds_strictly_and_asks_nobody(tmp_path: Path) -> None:
    """Broken links, missing anchors and pages outside the menu are errors; nothing is loaded from elsewhere."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        links = Links()
        links.feed(page.read_text(encoding="utf-8"))
        assert links.loaded
        assert not [link for link in links.loaded if re.match(r"(https?:)?//", link)], page
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style
    assert (tmp_path / "site/results/quality-llama-28m.json").is_file()


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    for page in WRITTEN:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands_of(page: Path) -> list[str]:
    """Every niwaki command line on a page."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        for text in [line] if line.startswith("$ ") else re.findall(r"`(niwaki [^`]*)`", line):
            found += re.findall(r"(?:^|[;\s])(niwaki [a-z][^;|]*)", text.removeprefix("$ "))
    return found


def test_every_command_line_exists() -> None:
    commands = dict(generator()._leaves(typer.main.get_command(app)))
    counted = 0
    for page in WRITTEN:
        for line in commands_of(page):
            words = line.split()
            if words[1].startswith("-"):
                continue
            called = next((name for name in (" ".join(words[1:3]), words[1]) if name in commands), None)
            if called is None and words[1:] == ["rollout"]:
                continue  # the group itself
            assert called is not None, f"{page.name}: {line}"
            known = {name for option in commands[called].params for name in option.opts} | {"--help"}
            for word in words[2:]:
                if word.startswith("--"):
                    assert word in known, f"{page.name}: {line}: {word}"
                    counted += 1
            if "--method" in words:
                for name in words[words.index("--method") + 1].split("+"):
                    assert name in EVERY, f"{page.name}: {line}"
            if "--preset" in words:
                assert words[words.index("--preset") + 1] in PRESETS
    assert counted > 100


def test_the_menu_lists_every_page_once() -> None:
    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(leaves(menu)) == [str(page.relative_to(DOCS)) for page in PAGES]


LOG = DOCS / "log"
VERDICTS = {"kept", "dropped", "open"}
MAX_ENTRY_LINES = 15


def test_entries_of_the_log_are_short_and_the_index_has_a_verdict_for_each() -> None:
    index = (LOG / "index.md").read_text(encoding="utf-8")
    topics = {path for path in LOG.glob("*.md") if path.name != "index.md"}
    for path in topics:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z-]+\.md", path.name)
        assert f"]({path.name})" in index
        for entry in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            title, *lines = entry.splitlines()
            assert len([line for line in lines if line.strip()]) <= MAX_ENTRY_LINES, f"{path.name}: {title}"
    rows = [line.split(" | ") for line in index.splitlines() if line.startswith("| ") and "| Verdict |" not in line]
    assert len(rows) > 100
    for row in rows:
        assert len(row) == 3 and re.split(r"[ ,]", row[1])[0] in VERDICTS, row
    assert sorted(re.findall(r"^## (.*)$", index, re.M), reverse=True) == re.findall(r"^## (.*)$", index, re.M)
