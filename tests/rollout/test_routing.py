"""Who goes where: stable, sticky, in the right shares; importance; settings and limits as they are given."""

import json
import threading
import time
from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.measure.schema import Comparison
from niwaki.rollout.limits import DEFAULTS, limits_from, quality_of
from niwaki.rollout.routing import PATTERN_S, UNDECIDED, RoutedRequest, choose, position, sticky_key
from niwaki.rollout.settings import Important, settings_from
from support.reports import comparison

URLS = {"stable": {"url": "http://127.0.0.1:1"}, "canary": {"url": "http://127.0.0.1:2/v1/"}}


def side(key: str, share: float, salt: str = "1") -> str:
    return choose(RoutedRequest("m", "p", {}, key), share=share, salt=salt, important=()).side


def test_shares_are_met_and_who_is_on_the_canary_stays() -> None:
    keys = [f"user {number}" for number in range(5000)]
    before: set[str] = set()
    for share in (0.0, 0.01, 0.05, 0.25, 0.5, 1.0):
        chosen = {key for key in keys if side(key, share) == "canary"}
        assert before <= chosen and abs(len(chosen) / 5000 - share) < 0.02
        before = chosen
    assert before == set(keys)
    first = {key for key in keys if side(key, 0.05, "1") == "canary"}
    other = {key for key in keys if side(key, 0.05, "2") == "canary"}
    assert len(first & other) < 0.3 * len(first)  # another roll-out meets others first
    assert position("a", "1") == position("a", "1") != position("b", "1")


def test_what_a_request_is_known_by() -> None:
    assert sticky_key({"user": "u"}, {"x-user": "h"}, "X-User", "t") == "header h"
    assert sticky_key({"user": "u"}, {}, "x-user", "t") == "user u"
    assert sticky_key({"user": 3}, {}, "x-user", "t" * 5000) == "text " + "t" * 1000


@pytest.mark.parametrize(
    ("rule", "ask", "expected"),
    [
        ({"header": "x-tier: ^gold$"}, RoutedRequest("m", "p", {"x-tier": "gold"}, "k"), True),
        ({"header": "x-tier: ^gold$"}, RoutedRequest("m", "p", {"x-tier": "golden"}, "k"), False),
        ({"header": "x-tier: gold"}, RoutedRequest("m", "p", {}, "k"), False),
        ({"model": "legal"}, RoutedRequest("legal-7b", "p", {}, "k"), True),
        ({"prompt": "(?i)dose"}, RoutedRequest("m", "what DOSE", {}, "k"), True),
        ({"min_characters": 3}, RoutedRequest("m", "ab", {}, "k"), False),
        ({"min_characters": 2, "model": "x"}, RoutedRequest("m", "ab", {}, "k"), False),  # all conditions have to hold
        ({"min_characters": 2, "model": "m"}, RoutedRequest("m", "ab", {}, "k"), True),
    ],
)
def test_importance(rule: dict[str, object], ask: RoutedRequest, expected: bool) -> None:
    route = choose(ask, share=1.0, salt="1", important=[Important(**rule)])  # type: ignore[arg-type]
    assert (route.important, route.side) == ((True, "stable") if expected else (False, "canary"))


BAD = {  # patterns that take forever, and texts that they take it for
    r"(a|a)*$": "a" * 40 + "!", r"(a|aa)+$": "a" * 80 + "!", r"(x+x+)+y": "x" * 3000, r"\s+$": " " * 300_000 + "x",
    r"(?:a{1,100}){1,100}b": "a" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("pattern", BAD)
@pytest.mark.parametrize("place", ["prompt", "model", "header"])
def test_what_a_pattern_cannot_decide_in_time_stays_on_dense(pattern: str, place: str) -> None:
    rule = {"header": f"x-tier: {pattern}"} if place == "header" else {place: pattern}
    texts = {"prompt": "p", "model": "m", place: BAD[pattern]}
    ask = RoutedRequest(texts["model"], texts["prompt"], {"x-tier": BAD[pattern]}, "k")
    # A thread that must run meanwhile: a search that holds the interpreter would freeze every request.
    gaps: list[float] = []
    over = threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not over.wait(0.002):
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.process_time()
    route = choose(ask, share=1.0, salt="1", important=[Important(**rule), Important(**rule)])  # type: ignore[arg-type]
    spent = time.process_time() - begin
    over.set()
    watcher.join()
    assert (route.side, route.important, route.reason) == ("stable", True, UNDECIDED)
    assert spent < 3 * PATTERN_S and len(gaps) > 3


def test_settings_of_a_file_and_flags_over_them(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(
        "stable: {url: http://a:1, model: big}\ncanary: {url: http://b:2}\npolicy: {steps: [0.1, 1.0]}\n"
        "important: [{header: 'x-tier: gold'}]\nsampling: {audit_frac: 0.5}\n"
    )
    found = settings_from({"stable": {"url": "http://c:3/v1"}, "sampling": {"shadow_frac": 0.2}}, path)
    assert (found.stable.url, found.stable.model, found.canary.url) == ("http://c:3", "big", "http://b:2")
    assert found.policy.steps == (0.1, 1.0) and found.sampling.audit_frac == 0.5 and found.sampling.shadow_frac == 0.2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stable": {"url": "http://a"}}, "no address of the canary server: give --canary"),
        ({**URLS, "canary": {"url": "ftp://a"}}, "canary.url"),
        ({**URLS, "canary": {"url": "http://user@a"}}, "canary.url"),
        ({**URLS, "policy": {"steps": [0.5, 0.1]}}, "policy.steps"),
        ({**URLS, "important": [{}]}, "expected header, model, prompt or min_characters"),
        ({**URLS, "important": [{"prompt": "("}]}, "regular expression"),
        ({**URLS, "important": [{"header": "gold"}]}, "`name: pattern`"),
        ({**URLS, "sampling": {"audit_frak": 1}}, "audit_frak"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings_from(values)


def test_settings_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the roll-out settings"):
        settings_from(URLS, tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="expected settings"):
        settings_from(URLS, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not YAML"):
        settings_from(URLS, tmp_path / "broken.yaml")


def test_limits_of_a_gate_file_and_of_a_comparison(tmp_path: Path) -> None:
    assert limits_from(None) == DEFAULTS and quality_of(DEFAULTS) == []
    gate = tmp_path / "gate.yaml"
    gate.write_text("min_top1_agreement: 0.85\nmax_bytes_ratio: 0.5\nmax_decode_latency_ratio: 0.9\n")
    found = limits_from(gate, given={"logprob_gap": 0.2})
    assert found == {**DEFAULTS, "decode_latency_ratio": 0.9, "top1_agreement": 0.85, "logprob_gap": 0.2}
    assert quality_of(found) == ["top1_agreement", "logprob_gap"]
    measured: Comparison = comparison()
    report = tmp_path / "compare.json"
    report.write_text(measured.model_dump_json())
    name = measured.candidates[0].model.name
    limits = limits_from(report, candidate=name)
    whole = measured.candidates[0].data[0].whole
    agreement, ratio = whole.top1_agreement, whole.perplexity_ratio
    assert agreement.low is not None and ratio.high is not None
    assert limits["top1_agreement"] < agreement.low and limits["perplexity_ratio"] > ratio.high
    assert limits["error_rate"] == DEFAULTS["error_rate"] and "bytes_ratio" not in limits


def test_limits_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'top1_agreement'"):
        limits_from(None, given={"top1_agrement": 0.9})
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        limits_from(None, given={"top1_agreement": 1.5})
    with pytest.raises(InputError, match="must lie between"):
        limits_from(None, given={"perplexity_ratio": 20.0})
    gate = tmp_path / "gate.yaml"
    gate.write_text("min_top1_agreement: 0.85\n")
    with pytest.raises(InputError, match="has no candidates"):
        limits_from(gate, candidate="four")
    (tmp_path / "compare.json").write_text(json.dumps({"no": "comparison"}))
    with pytest.raises(InputError, match="is not a comparison"):
        limits_from(tmp_path / "compare.json")


def test_the_old_spelling_of_limits_of_copies_and_audits_is_read() -> None:
    sides = {"stable": {"url": "http://a"}, "canary": {"url": "http://b"}}
    old = settings_from({**sides, "sampling": {"most_shadows": 7, "most_audits": 3}})
    assert old == settings_from({**sides, "sampling": {"max_shadows": 7, "max_audits": 3}})
    assert (old.sampling.max_shadows, old.sampling.max_audits) == (7, 3)
