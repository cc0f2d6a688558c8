"""Agreement of handbook and code: generated parts are fresh, links work, commands exist."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from niwaki.cli.app import app
from niwaki.config.presets import PRESETS
from niwaki.methods.registry import METHODS

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
    for name in METHODS:
        text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        for part in ("facts", "numbers", "speed", "works", "options"):
            assert f"<!-- generated: {part} {name} -->" in text, f"{name}: {part}"
        for heading in ("**Choose it**", "## Limits"):
            assert heading in text, f"{name}: {heading}"


def test_numbers_are_those_of_the_measurements() -> None:
    found = json.loads((ROOT / "benchmarks/results/quality/quality-quantized-llama-28m.json").read_text())
    row = next(row for row in found["rows"] if row["label"] == "squeeze10" and row["target"] == "2.0bit")
    said = f"| 2.0bit |  | {row['runs'][0]['bits']:.2f} true bits | {row['reviews']['mean']:.2f}\u00a0±\u00a0"
    assert said in (DOCS / "methods/squeeze10.md").read_text(encoding="utf-8")


# A row of the README: its row in whole-model-h100.json, and target and label of its perplexities of the real model.
REAL = ("real-model-smollm2-h200", "real-model-search-smollm2-h200")
GAINS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "`gptq`, 4 bits": ("4bit", [("4bit", "best, half own text")]),
    "`squeeze10`, 1.6 bits": (
        "1.6bit", [("1.75bit", "best, mix self:0.5"), ("1.75bit", "trellis 24 rounds, mix self:0.5")],
    ),
    "2:4 zeros, `--pack auto`": ("2:4", [("2:4", "best, kl"), ("2:4", "best, recovered 3M, self:0.67")]),
    "`comp`, a quarter smaller": (
        "structured", [("0.2", "comp damage, learned, kl 1, half own text"), ("0.2", "comp, recovered 3M")],
    ),
}  # fmt: skip


def result(file: str) -> Any:
    """Return a JSON file of the measurements, which may lie in a folder of benchmarks/results."""
    (path,) = (ROOT / "benchmarks/results").rglob(f"{file}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def variants(file: str) -> dict[str, tuple[float, float, float]]:
    """Return gigabytes, tokens per second and speedup at batch 1 of every variant of a whole model."""
    rows = result(file)["rows"]
    return {
        row.get("variant") or row["form"]: (
            row["weight_bytes"] / 1e9,
            row["decode"][0]["median_tokens_per_s"],
            row["decode"][0]["speedup"]["value"],
        )
        for row in rows
    }


def ratios(target: str, label: str) -> str:
    """Return the perplexities of a row of the real model over dense, as the README prints them."""
    rows = [row for file in REAL for row in result(file)["rows"]]
    row = next(row for row in rows if (row["target"], row["label"]) == (target, label))
    return " / ".join(f"{row['ratio'][text]['mean']:.2f}" for text in ("reviews", "wikitext2"))


def test_the_readme_has_900_words_and_its_numbers_are_those_of_the_measurements() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 850 <= len(text.split()) <= 950, "the rest belongs into docs/measured.md and docs/limits.md"
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines() if row.startswith("| ")}
    gpu, cpu = variants("whole-model-h100"), variants("whole-model-cpu")
    assert rows["dense"] == f"| dense | {gpu['dense'][0]:.2f} GB | {gpu['dense'][1]:.0f} | 1 / 1 |"
    for label, (variant, found) in GAINS.items():
        gigabytes, speed, ratio = gpu[variant]
        said = f"| {label} | {gigabytes:.2f} GB | {speed:.0f} ({ratio:.2f}×) | {ratios(*found[0])}"
        assert rows[label].startswith(said), f"{label}: {said}"
        assert all(ratios(*other) in rows[label] for other in found[1:]), label
    skipping = result("token-skipping-smollm2-h200")["rows"]
    half = [row for row in skipping if (row["label"], row["target"]) == ("shadow", 0.5)]
    times = " / ".join(f"{mean(row[text]['ratio'] for row in half):.2f}" for text in ("reviews", "wikitext2"))
    gigabytes, speed, ratio = gpu["contextual"]
    said = (
        f"| `shadow`, half skipped | {gigabytes:.2f} GB | {speed:.0f} ({ratio:.2f}×) per prompt | {times} per token |"
    )
    assert rows["`shadow`, half skipped"] == said
    assert f"4 bits\nwrite {cpu['4bit'][2]:.2f} and 1.6 bits {cpu['1.6bit'][2]:.2f} times as fast" in text


def test_the_command_line_shows_defaults_and_what_is_required() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    evaluate = text.partition("## evaluate")[2].partition("\n## ")[0]
    assert "| `--seq-len` | `1024` | Tokens per window. |" in evaluate
    assert "niwaki evaluate MODEL [OPTIONS]" in evaluate and '{"pairs": [[context, continuation], ...]' in evaluate
    assert "niwaki compare DENSE OUT... [OPTIONS]" in text
    generate = text.partition("## generate")[2].partition("\n## ")[0]
    assert "| `--seed` | `0` | Seed of the sampling. |" in generate
    assert "| `--to` | required |" in text and "| `--samples` | `128` | Number of calibration windows. |" in text


def test_a_changed_option_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import make_dataclass, replace

    from niwaki.methods import rtn

    page = (DOCS / "methods/rtn.md").read_text(encoding="utf-8")
    changed = replace(rtn.METHOD, config=make_dataclass("Config", [("group", int, 64)]))
    monkeypatch.setattr(rtn, "METHOD", changed)
    assert generator().render(page) != page


class Links(HTMLParser):
    """Parser that collects the addresses that a page loads."""

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
    """Check that no link, anchor or menu entry is broken, and that pages load nothing from elsewhere."""
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
    assert (tmp_path / "site/results/quality/quality-llama-28m.json").is_file()


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    for page in WRITTEN:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def functions_of(path: Path) -> set[str]:
    """Return the names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_")}


@pytest.mark.parametrize("name", ["security.md", "inputs.md"])
def test_every_line_of_a_page_of_promises_names_a_test_that_exists(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w./-]+\.py)(?:::(\w+))?[^`]*`", text)
    assert len(named) > 20
    for path, test in named:
        found = functions_of(ROOT / path)
        assert found and (not test or test in found), f"{name}: {path}::{test}"
    tables = re.findall(r"^\|.*\| Test \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert tables
    for row in (row for table in tables for row in table.splitlines()):
        cell = row.rsplit(" | ", 1)[1]
        assert "`tests/" in cell, f"{name}: {row}"
        whole = re.sub(r"`tests/[\w./-]+\.py(::\w+)?`|`make [\w-]+`|, | \|", "", cell)
        assert not whole.strip(), f"{name}: {cell}"


def test_the_page_of_security_names_tests_and_not_only_files() -> None:
    text = (DOCS / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`tests/[\w./-]+\.py(::\w+)?`", text)
    assert named.count("") <= 1, "a line of the threat model names its test: path::name"


def test_names_and_paths_on_the_pages_exist() -> None:
    moved = re.findall(r"^\| `niwaki.* \| (`niwaki.*) \|$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    for name in re.findall(r"`(niwaki[\w.]+)`", " ".join(moved)):
        assert resolved(name), f"CHANGELOG.md: {name}"
    named = len(moved)
    for page in [*WRITTEN, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:src|tests|benchmarks|docs|examples)/[\w./-]+\.(?:py|cpp|ya?ml|json|md)\b", text):
            if "NAME" not in path and "randomly" not in path:
                assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"(?<![\w/.-])niwaki(?:\.[A-Za-z_]\w*)+", text):
            assert resolved(name), f"{page.name}: {name}"
            named += 1
    assert named > 20


def resolved(name: str) -> bool:
    """Return whether a dotted name is a module of niwaki or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            holder: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            holder = getattr(holder, attribute, None)
        return holder is not None
    return False


def commands_of(page: Path) -> list[str]:
    """Return every niwaki command line on a page."""
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
                    assert name in METHODS, f"{page.name}: {line}"
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


def test_the_glossary_is_one_sorted_page_with_one_meaning_per_word() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8").partition("## Words we do not use")[0]
    words = re.findall(r"^\| (.+?) \| (?!Meaning)", text, re.M)
    assert len(words) > 50
    assert words == sorted(words, key=str.lower) and len({word.lower() for word in words}) == len(words)
