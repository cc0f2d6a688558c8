"""The dashboard in Chromium: live, nothing asked of others, on a phone, in light and dark, and texts run nowhere."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from niwaki.rollout.app import build
from niwaki.rollout.scoring import Audit
from niwaki.rollout.signals import SIGNALS
from niwaki.rollout.store import Change
from support.chromium import chromium
from support.rollouts import Setup, make, settings

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


EVIL = "</script><img src=x onerror=alert(1)>"


def lived(folder: Path) -> Setup:
    """A roll-out that was widened twice, met drift and keeps texts."""
    policy = {"steps": [0.01, 0.05, 0.25, 0.5, 1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5}
    setup = make(folder, settings(policy=policy, sampling={"keep_texts": True}))
    controller = setup.gateway.controller
    for number in range(1, 5):
        counters = controller.counters
        for place in range(60):
            counters.count_request("canary" if place % 4 == 0 else "stable")
            counters.count_outcome(failed=False)
            counters.add_audit({"top1_agreement": 0.94 + 0.001 * (place % 30), "perplexity_ratio": 1.02})
            counters.open.observe("prefill_latency_ratio", SIGNALS["prefill_latency_ratio"].scaled(0.9 + 0.01 * number))
            counters.open.observe("decode_latency_ratio", SIGNALS["decode_latency_ratio"].scaled(0.7 + 0.01 * place))
        counters.count_skipped("audit dropped: 2 were running")
        counters.count_skipped("not audited: too long")
        setup.clock.now += 61
        controller.tick(setup.clock.now)
    places = tuple(
        (word, word if number % 3 else " other", bool(number % 3)) for number, word in enumerate([" a", EVIL, " b"])
    )
    found = Audit(3, 2 / 3, 0.21, 1.04, places)
    for how in ("served", "shadow"):
        texts = {"prompt": f"Describe {EVIL}", "answer": f" a{EVIL} b", "places": [list(one) for one in places]}
        controller.store.add_audit(controller.state, setup.clock.now, how, 3, found.values(), texts)
    controller.store.note(controller.state, Change("alarm", "running", 2, "the prompts changed"), setup.clock.now)
    return setup


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Setup]]:
    setup = lived(tmp_path_factory.mktemp("rollout"))
    server = uvicorn.Server(uvicorn.Config(build(setup.gateway, tick_s=None), port=0, log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/rollout", setup
    server.should_exit = True
    thread.join(10)


class Opened:
    """An open page, with everything it asked for and complained about."""

    def __init__(self, browser: Any, url: str, *, width: int = 1280, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready]")

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_it_is_seen_whole_and_asks_nobody_else(browser: Any, page: tuple[str, Setup], width: int) -> None:
    url, _ = page
    opened = Opened(browser, url, width=width)
    assert opened.complaints == [] and all(one.startswith(url.removesuffix("/rollout")) for one in opened.requests)
    assert opened.ask("document.documentElement.scrollWidth") <= width
    assert opened.page.locator(".card").count() == 5 and opened.page.locator("figure.plot").count() == 4
    plots = "[...document.querySelectorAll('.canvas')].map((n) => n.querySelectorAll('.scatterlayer path').length)"
    assert all(count > 5 for count in opened.ask(plots))
    inside = """[...document.querySelectorAll('.canvas')].map((n) => [n.querySelector('svg.main-svg'), n.parentElement]
      .map((one) => one.getBoundingClientRect().right))"""
    assert all(plot <= figure for plot, figure in opened.ask(inside))


def test_it_tells_share_verdicts_skips_and_disagreements(browser: Any, page: tuple[str, Setup]) -> None:
    url, setup = page
    opened = Opened(browser, url)
    text = opened.page.inner_text("main")
    share = setup.gateway.controller.share
    assert f"{share:.0%}".replace("%", " %") + " of requests go to the canary" in text
    assert "audit dropped: 2 were running" in text and "the prompts changed" in text and "every limit is kept" in text
    assert "weights that the canary skips per answer, mean" in text and "50 %" in text
    sides = opened.page.locator(".audit").first.locator(".sides > div")
    assert [side.locator("mark").all_inner_texts() for side in sides.all()] == [[" a"], [" other"]]


def test_texts_of_users_and_models_run_nowhere(browser: Any, page: tuple[str, Setup]) -> None:
    opened = Opened(browser, page[0])
    assert EVIL in opened.page.locator(".audit blockquote").first.inner_text()
    assert opened.dialogs == [] and opened.ask("document.images.length") == 0 and opened.complaints == []
    blocked = opened.ask("fetch('https://example.org/').then(() => 'fetched', () => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in one for one in opened.complaints)


def test_it_follows_what_happens_and_says_when_it_cannot(browser: Any, page: tuple[str, Setup]) -> None:
    url, setup = page
    opened = Opened(browser, url)
    before = opened.page.locator("#requests").inner_text()
    setup.gateway.controller.counters.count_request("important")
    opened.page.locator("#requests", has_text="because they are important").wait_for(timeout=5000)
    assert opened.page.locator("#requests").inner_text() != before
    opened.page.context.set_offline(True)
    opened.page.locator("#live", has_text="no connection").wait_for(timeout=6000)
    opened.page.context.set_offline(False)
    opened.page.locator("#live", has_text="live").wait_for(timeout=6000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_switched(browser: Any, page: tuple[str, Setup], scheme: str) -> None:
    opened = Opened(browser, page[0], scheme=scheme)
    back = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.canvas .xtick text')).fill"
    before = opened.ask(back), opened.ask(ink)
    opened.page.locator("#theme").click()
    after = opened.ask(back), opened.ask(ink)
    assert all(one != other for one, other in zip(before, after, strict=True))
