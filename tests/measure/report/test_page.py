"""The page as a file: whole, self-contained, escaped, in both languages."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import niwaki
from niwaki.errors import InputError
from niwaki.measure.report.layers import Layers, layers_of
from niwaki.measure.report.page import MAX_LINES, PAGE, render, write_page
from niwaki.measure.schema import Comparison
from support.models import tiny_llama, write_texts
from support.reports import EVIL, candidate, comparison, layers_for, lines, records, without_evidence

LOADING = {"src", "href", "data", "poster", "srcset", "action", "formaction", "background", "ping", "xlink:href"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the texts of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        last = self.inside[-1] if self.inside else ""
        if last == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif last == "style":
            self.styles.append(data)
        else:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]


def page_of(found: Comparison, language: str = "en", layers: dict[str, Layers | None] | None = None) -> Page:
    return Page(render(found, layers or layers_for(found), language))


@pytest.fixture(scope="module", params=["en", "ja"])
def page(request: pytest.FixtureRequest) -> Page:
    return page_of(comparison(), request.param)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "audio", "video"), tag
        for name in LOADING & set(attributes):
            assert (attributes[name] or "").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert not [style for style in page.styles if "url(" in style or "@import" in style]
    own = page.scripts[-1][1]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", own)


def test_the_policy_allows_the_two_scripts_and_no_address(page: Page) -> None:
    policy = next(one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy")
    rules = dict(part.strip().split(" ", 1) for part in (policy or "").split(";"))
    code = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code]
    assert len(code) == 2 and rules["script-src"].split() == hashes
    assert rules["default-src"] == "'none'" and "http" not in (policy or "")
    assert code[0].lstrip().startswith("/**\n* plotly.js")


def test_texts_of_models_and_data_are_escaped(page: Page) -> None:
    assert page.text.count(EVIL) > 10  # shown as text: prompts, questions, tokens, names, notes, recipes, command
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert not page.named("img")
    plots = [text for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert plots and not [text for text in plots if "<" in text]
    legends = {trace.get("name") for text in plots for trace in json.loads(text)["data"]}
    assert f"evil{EVIL.replace('<', '&lt;')}" in legends


def test_structure_for_people_who_do_not_see_it(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert [tags.count(tag) for tag in ("h1", "main", "footer", "nav")] == [1, 1, 1, 1]
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(set(page.ids)) == len(page.ids)
    named = {one.get("aria-labelledby") for one in page.named("section")}
    assert None not in named and named <= set(page.ids)
    assert {(one["href"] or "")[1:] for one in page.named("a")} <= set(page.ids)
    plots = [one for one in page.named("div") if one.get("role") == "img"]
    assert len(plots) == len(page.named("figure")) == 9
    assert all(len(one["aria-label"] or "") > 20 for one in plots)
    assert all(one.get("scope") in ("col", "row") for one in page.named("th"))
    regions = [one for one in page.named("div") if one.get("role") == "region"]
    assert all(one.get("tabindex") == "0" and one.get("aria-label") for one in regions)


def test_sections_and_language(page: Page) -> None:
    wanted = [
        "summary",
        "tradeoff",
        "gates",
        "measured",
        "quality",
        "tasks",
        "layers",
        "generations",
        "worst",
        "reproduce",
    ]
    assert [one["id"] for one in page.named("section")] == [*wanted, "environment"]
    language = page.named("html")[0]["lang"]
    assert language in ("en", "ja")
    shown = {"en": ["22 November 2026, 21:30 UTC", "Perplexity ratio"], "ja": ["2026年11月22日", "パープレキシティ比"]}
    assert all(text in page.text for text in shown[language or ""])


def test_every_plot_has_its_numbers_as_a_table() -> None:
    page = page_of(comparison())
    text = " ".join(page.text.split())
    for number in ("1.050 1.040 to 1.060", "×1.25 ×0.91 to ×1.43", "4.25", "62%", "0.011", "0.6"):
        assert number in text, number


def test_what_was_not_measured_is_left_out_and_said() -> None:
    found = without_evidence()
    page = page_of(found, layers={"bare": None})
    assert [one["id"] for one in page.named("section")] == [
        "summary", "tradeoff", "measured", "tasks", "layers", "reproduce", "environment",
    ]  # fmt: skip
    assert "nothing was judged" in page.text and "were not measured (--rounds 0)" in page.text
    assert "there is no record of its matrices" in page.text
    empty = page_of(found, layers={"bare": layers_of(records([]))})
    assert "No matrix was changed" in empty.text


def test_a_large_model_shows_the_worst_matrices_and_says_how_many_there_are() -> None:
    many = [{**line, "block": block} for block in range(150) for line in lines()[:2]]
    many[77]["error"] = 7.5
    found = comparison(candidate("four", 1.05))
    page = page_of(found, layers={"four": layers_of(records(many))})
    assert f"{MAX_LINES} of 300 shown; all are in niwaki/blocks.jsonl." in page.text
    first = page.text.index("Every matrix of four")
    assert "7.5" in page.text[first : first + 900]


def test_a_comparison_writes_the_page_in_the_language_asked_for(tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path / "dense")
    niwaki.compress(dense, tmp_path / "out", method="magnitude", target="0.3", device="cpu")
    data = write_texts(tmp_path / "data.jsonl", count=3)
    settings = {"data": data, "seq_len": 32, "max_tokens": 640, "rounds": 0, "device": "cpu"}
    report = tmp_path / "report"
    with pytest.raises(InputError, match="language"):
        niwaki.compare(dense, tmp_path / "out", report=report, lang="xx", **settings)
    assert not report.exists()
    niwaki.compare(dense, tmp_path / "out", report=report, lang="ja", **settings)
    page = Page((report / PAGE).read_text(encoding="utf-8"))
    assert page.named("html")[0]["lang"] == "ja" and "out の全行列" in page.text
    assert {path.name for path in report.iterdir()} == {"report.html", "compare.json", "junit.xml"}


def test_a_broken_record_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    dense = tiny_llama(tmp_path / "dense")
    niwaki.compress(dense, tmp_path / "out", method="magnitude", target="0.3", device="cpu")
    (tmp_path / "out" / "niwaki" / "blocks.jsonl").write_text("{")
    data = write_texts(tmp_path / "data.jsonl", count=3)
    steps: list[str] = []
    with pytest.raises(InputError, match=r"blocks.jsonl is not a record"):
        niwaki.compare(
            dense, tmp_path / "out", data=data, seq_len=32, report=tmp_path / "report", device="cpu",
            progress=lambda event, **_: steps.append(event),
        )  # fmt: skip
    assert not steps and not (tmp_path / "report").exists()


def test_the_page_is_one_file_of_about_five_megabytes(tmp_path: Path) -> None:
    write_page(tmp_path / PAGE, comparison(candidate("four", 1.05)), [layers_of(records(lines()))])
    assert [path.name for path in tmp_path.iterdir()] == [PAGE]
    assert 4e6 < (tmp_path / PAGE).stat().st_size < 6e6
