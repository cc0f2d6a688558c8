"""One page that shows a roll-out as it goes: share, verdicts, latency, agreement, what was left out, disagreements.

The page and its parts come from the gateway alone, and its content security policy allows nothing else. It asks for
`/rollout/data` every two seconds; texts of requests are in there only where they are kept, and the page writes them as
text, never as markup. Its style is that of `niwaki.measure.report.page`; plotly.js is one file that the browser keeps.

Bands are those of the last verdict, so that looking costs no arithmetic. Cost: some milliseconds in another thread;
plotly.js is 4.8 MB, once.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from niwaki.rollout.controller import Controller
from niwaki.rollout.decision import Finding, find
from niwaki.rollout.histogram import Interval
from niwaki.rollout.signals import SIGNALS
from niwaki.rollout.store import State, Store

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_DECISIONS, _AUDITS = 300, 6
_ASSETS = {
    "report.css": ("reporting/templates/report.css", "text/css"),
    "dashboard.css": ("rollout/templates/dashboard.css", "text/css"),
    "dashboard.js": ("rollout/templates/dashboard.js", "text/javascript"),
}


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    content: str
    kind: str


@dataclass(frozen=True)
class Seen:
    """What the page shows of the running gateway, copied where nothing changes it meanwhile."""

    store: Store
    state: State
    share: float
    limits: Mapping[str, float]
    intervals: list[Interval]
    findings: tuple[Finding, ...] | None
    alarms: list[str]
    since: int
    drift: dict[str, dict[str, float]]


def page() -> str:
    """The page, the same for every roll-out."""
    return _read("rollout/templates/dashboard.html")


def asset(name: str) -> Asset | None:
    """A file that the page asks for, or None."""
    if name == "plotly.js":
        from plotly.offline import get_plotlyjs

        return Asset(str(get_plotlyjs()), "text/javascript")
    if name not in _ASSETS:
        return None
    path, kind = _ASSETS[name]
    return Asset(_read(path), kind)


def seen(controller: Controller) -> Seen:
    """A copy of what the gateway counts."""
    drifts = {"prompts": controller.watch.surprise, "agreement": controller.watch.agreement}
    return Seen(
        store=controller.store,
        state=controller.state,
        share=controller.share,
        limits=controller.limits,
        intervals=controller.copied(),
        findings=None if controller.verdict is None else controller.verdict.findings,
        alarms=list(controller.watch.alarms[-3:]),
        since=controller.watch.since,
        drift={name: {"strength": drift.strength, "seen": drift.seen} for name, drift in drifts.items()},
    )


def view(now_seen: Seen, now: float, *, keep_texts: bool, skipped_frac: float | None = None) -> dict[str, Any]:
    """Everything the page shows, as JSON. `skipped_frac`: share of a contextual canary's weights.

    Raises OutputError where the store cannot be read.
    """
    state, intervals = now_seen.state, now_seen.intervals
    policy = state.policy
    requests, skipped = Counter[str](), Counter[str]()
    for interval in intervals:
        requests.update(interval.requests)
        skipped.update(interval.skipped)
    findings = now_seen.findings
    if findings is None:  # nothing was judged since the gateway was started
        findings = tuple(find(policy, now_seen.limits, intervals, name, now_seen.since) for name in now_seen.limits)
    decisions = now_seen.store.decisions(state, _DECISIONS)
    return {
        "now": now,
        "rollout": state.id,
        "identity": state.identity,
        "status": state.status,
        "share": now_seen.share,
        "step": state.step,
        "steps": list(policy.steps),
        "begun": state.begun,
        "interval_s": policy.interval_s,
        "confidence": policy.confidence,
        "findings": [{**one.as_json(), "side": SIGNALS[one.signal].limit} for one in findings],
        "requests": dict(requests),
        "skipped": dict(skipped.most_common()),
        "alarms": now_seen.alarms,
        "drift": now_seen.drift,
        "decisions": [{**one, "share": policy.steps[one["step"]]} for one in decisions],
        "audits": now_seen.store.audits(state, _AUDITS),
        "keep_texts": keep_texts,
        "skipped_frac": skipped_frac,
    }


def _read(path: str) -> str:
    return (files("niwaki") / path).read_text(encoding="utf-8")
