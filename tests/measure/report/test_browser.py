"""The page in Chromium: no error, no request, plots that are seen, everything reached by keyboard.

`make test-browser` installs what drives the browser; the browser itself comes from the system.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from niwaki.measure.report.page import render
from support.chromium import chromium
from support.reports import candidate, comparison, layers_for, without_evidence

pytestmark = pytest.mark.browser
WIDTHS = (1280, 768, 390, 320)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = comparison()
    made = {language: render(found, layers_for(found), language) for language in ("en", "ja")}
    found = comparison(*(candidate(f"candidate-{n}-with-a-long-name", 1 + 0.01 * n) for n in range(9)))
    made["many"] = render(found, layers_for(found), "en")
    made["bare"] = render(without_evidence(), {"bare": None}, "ja")
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


class Opened:
    """An open page, with everything it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


PLOTS = """() => [...document.querySelectorAll('.canvas')].map((node) => {
  const box = node.querySelector('svg.main-svg')?.getBoundingClientRect();
  const marks = node.querySelectorAll('.point, .heatmaplayer image, .js-line, .scatterlayer path').length;
  return {id: node.id, left: box?.left, right: box?.right, width: box?.width, height: box?.height, marks};
})"""


@pytest.mark.parametrize("name", ["en", "ja", "many", "bare"])
@pytest.mark.parametrize("width", WIDTHS)
def test_plots_are_seen_and_nothing_flows_over(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    opened = Opened(browser, pages[name], width=width)
    assert opened.complaints == [] and opened.requests == [pages[name].as_uri()]
    plots = opened.ask(PLOTS)
    assert len(plots) >= (1 if name == "bare" else 9)
    for plot in plots:
        assert plot["marks"] > 0 and plot["height"] > 150, plot
        assert plot["width"] > 200 and plot["left"] >= 0 and plot["right"] <= width, plot
    assert opened.ask("document.documentElement.scrollWidth") <= width


TICKS = """() => [...document.querySelectorAll('.canvas')].map((node) => ['xtick', 'ytick'].map(
  (name) => [...node.querySelectorAll(`.${name} text`)].map((one) => one.textContent)))"""


@pytest.mark.parametrize("spread", [0.001, 0.05, 30.0])
def test_no_two_ticks_of_an_axis_read_alike(browser: Any, tmp_path: Path, spread: float) -> None:
    found = comparison(*(candidate(f"c{n}", 1 + spread * n, bytes_ratio=1 - 0.01 * n) for n in range(3)))
    (tmp_path / "page.html").write_text(render(found, layers_for(found), "en"), encoding="utf-8")
    ticks = [axis for plot in Opened(browser, tmp_path / "page.html").ask(TICKS) for axis in plot]
    assert all(len(axis) >= 2 for axis in ticks)
    assert [axis for axis in ticks if len(set(axis)) < len(axis)] == []


def test_texts_of_models_run_nowhere(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["en"])
    said: list[str] = []
    opened.page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    opened.page.locator(".nsewdrag").first.hover()
    opened.page.wait_for_timeout(200)
    assert said == [] and opened.ask("document.images.length") == 0 and opened.complaints == []


def test_a_script_that_slipped_in_would_not_run_and_nothing_could_be_fetched(browser: Any, tmp_path: Path) -> None:
    text = render(comparison(), layers_for(comparison()), "en")
    path = tmp_path / "page.html"
    path.write_text(text.replace("</main>", "<script>window.slipped = 1</script></main>"), encoding="utf-8")
    opened = Opened(browser, path)
    assert opened.ask("window.slipped") is None
    blocked = opened.ask("fetch('https://example.org/').then(() => 'fetched', () => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in one for one in opened.complaints)


FOCUSED = """() => {
  const node = document.activeElement, style = getComputedStyle(node);
  return {tag: node.tagName, id: node.id, text: node.textContent.trim().slice(0, 40),
          seen: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2};
}"""


@pytest.mark.parametrize("name", ["en", "ja"])
def test_everything_is_reached_and_seen_by_keyboard(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened = Opened(browser, pages[name])
    wanted = opened.ask(
        "[...document.querySelectorAll('a, button, summary, .scroll, pre')].filter((n) => n.checkVisibility()).length"
    )
    reached = []
    for _ in range(wanted + 5):
        opened.page.keyboard.press("Tab")
        focus = opened.ask(FOCUSED)
        if focus["tag"] == "BODY":
            break
        reached.append(focus)
    assert len(reached) == wanted and all(one["seen"] for one in reached)
    assert reached[0]["tag"] == "A" and [one["id"] for one in reached[1:3]] == ["theme", "print"]
    assert "copy" in [one["id"] for one in reached]


def test_tables_open_and_sort_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["en"])
    page = opened.page
    summary = page.locator("#layers > details > summary").first
    summary.focus()
    page.keyboard.press("Enter")
    table = page.locator("#layers > details").first.locator("table")
    errors = table.locator("tbody tr td:nth-child(10)")
    assert errors.all_inner_texts() == ["0.031", "0.03", "0.021", "0.02", "0.011", "0.01"]
    head = table.locator("th").nth(9)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert errors.all_inner_texts() == ["0.01", "0.011", "0.02", "0.021", "0.03", "0.031"]


def test_the_command_is_copied(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["en"])
    opened.page.locator("#copy").click()
    opened.page.locator("#copy-status", has_text="Copied").wait_for(state="attached")
    assert opened.page.locator("#copy").inner_text() == "Copied"


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
  };
  const low = [];
  for (const node of document.querySelectorAll('main *, header *')) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    if (!own || node.closest('svg, script, [aria-hidden]') || !node.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(back(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([node.className || node.tagName, ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_both_be_read(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    opened = Opened(browser, pages["en"], scheme=scheme)
    text = "getComputedStyle(document.querySelector('.canvas .xtick text')).fill"
    before, ink = opened.ask("getComputedStyle(document.body).backgroundColor"), opened.ask(text)
    assert opened.ask(CONTRAST) == []
    assert opened.page.locator("#theme").get_attribute("aria-pressed") == str(scheme == "dark").lower()
    opened.page.locator("#theme").click()
    assert opened.ask("getComputedStyle(document.body).backgroundColor") != before
    assert opened.ask(text) != ink  # plots follow
    assert opened.ask(CONTRAST) == []


def test_it_prints_in_light_and_comes_back(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["en"], scheme="dark")
    before = opened.ask("getComputedStyle(document.body).backgroundColor")
    document = opened.page.pdf(format="A4")
    assert document.startswith(b"%PDF") and len(document) > 50_000
    assert opened.ask("document.documentElement.dataset.theme") is None
    assert opened.ask("getComputedStyle(document.body).backgroundColor") == before
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("header.top").is_visible() and not opened.page.locator("nav").is_visible()
    assert opened.page.locator(".verdict").is_visible()
    assert opened.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.complaints == []
