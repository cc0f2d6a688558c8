"""Dashboard of a running roll-out: share, verdicts, latency, agreement, skipped requests, disagreements.

All files of the page come from the gateway, and its content security policy forbids any other source. It requests
`/rollout/data` every two seconds. The data holds texts of requests only if they are kept, and the page inserts them as
text, never as markup. Its style is that of `niwaki.measure.report.page`. plotly.js is one file that the browser caches.

Confidence bands are those of the last verdict, so a view needs no arithmetic. Cost: milliseconds in another thread, and
4.8 MB of plotly.js, once.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from niwaki.rollout.controller import Controller
from niwaki.rollout.decision import Finding, assess
from niwaki.rollout.histogram import Interval
from niwaki.rollout.signals import SIGNALS
from niwaki.rollout.store import RolloutState, Store

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
    "report.css": ("measure/report/templates/report.css", "text/css"),
    "dashboard.css": ("rollout/templates/dashboard.css", "text/css"),
    "dashboard.js": ("rollout/templates/dashboard.js", "text/javascript"),
}


@dataclass(frozen=True)
class Asset:
    """File of the page."""

    content: str
    kind: str


@dataclass(frozen=True)
class DashboardState:
    """Copy of the state that the page shows, which the running gateway does not change."""

    store: Store
    state: RolloutState
    share: float
    limits: Mapping[str, float]
    intervals: list[Interval]
    findings: tuple[Finding, ...] | None
    alarms: list[str]
    since: int
    drift: dict[str, dict[str, float]]


def page() -> str:
    """Return the page, which is the same for every roll-out."""
    return _read("rollout/templates/dashboard.html")


def asset(name: str) -> Asset | None:
    """Return a file of the page, or None for an unknown name."""
    if name == "plotly.js":
        from plotly.offline import get_plotlyjs

        return Asset(str(get_plotlyjs()), "text/javascript")
    if name not in _ASSETS:
        return None
    path, kind = _ASSETS[name]
    return Asset(_read(path), kind)


def snapshot(controller: Controller) -> DashboardState:
    """Return a copy of the state of a controller."""
    drifts = {"prompts": controller.watch.surprise, "agreement": controller.watch.agreement}
    return DashboardState(
        store=controller.store,
        state=controller.state,
        share=controller.share,
        limits=controller.limits,
        intervals=controller.intervals_now(),
        findings=None if controller.verdict is None else controller.verdict.findings,
        alarms=list(controller.watch.alarms[-3:]),
        since=controller.watch.since,
        drift={name: {"strength": drift.strength, "seen": drift.seen} for name, drift in drifts.items()},
    )


def view(current: DashboardState, now: float, *, keep_texts: bool, skipped_frac: float | None = None) -> dict[str, Any]:
    """Return the data of the page as JSON. `skipped_frac`: share of the weights that a contextual canary skips.

    Raise OutputError if the store cannot be read.
    """
    state, intervals = current.state, current.intervals
    policy = state.policy
    requests, skipped = Counter[str](), Counter[str]()
    for interval in intervals:
        requests.update(interval.requests)
        skipped.update(interval.skipped)
    findings = current.findings
    if findings is None:  # no verdict since the start of the gateway
        findings = tuple(assess(policy, current.limits, intervals, name, current.since) for name in current.limits)
    decisions = current.store.decisions(state, _DECISIONS)
    return {
        "now": now,
        "rollout": state.id,
        "identity": state.identity,
        "status": state.status,
        "share": current.share,
        "step": state.step,
        "steps": list(policy.steps),
        "begun": state.begun,
        "interval_s": policy.interval_s,
        "confidence": policy.confidence,
        "findings": [{**one.as_json(), "side": SIGNALS[one.signal].limit} for one in findings],
        "requests": dict(requests),
        "skipped": dict(skipped.most_common()),
        "alarms": current.alarms,
        "drift": current.drift,
        "decisions": [{**one, "share": policy.steps[one["step"]]} for one in decisions],
        "audits": current.store.audits(state, _AUDITS),
        "keep_texts": keep_texts,
        "skipped_frac": skipped_frac,
    }


def _read(path: str) -> str:
    return (files("niwaki") / path).read_text(encoding="utf-8")
