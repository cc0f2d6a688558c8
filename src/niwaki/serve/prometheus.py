"""Metrics of a server for Prometheus. Labels come from fixed sets, so no client can add series.

metrics = Metrics()
metrics.count_request("chat", "answered", 1.2)
body = metrics.text()
"""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from niwaki.runtime.contextual.sequence import Decision, Record
from niwaki.serve.http.protocol import REFUSALS

CONTENT_TYPE = CONTENT_TYPE_LATEST
ROUTES = ("chat", "completions")
OUTCOMES = ("answered", "invalid", "unauthorized", "rejected", "unavailable", "timeout", "cancelled", "failed")
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """Counters, histograms and gauges of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "niwaki_requests_total",
            "Requests for chats and completions, by outcome.",
            ["route", "outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "niwaki_request_seconds", "Seconds from the first byte of a request to the last of its answer.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "niwaki_prompt_tokens_total", "Tokens of prompts after prefill.", registry=self.registry
        )
        self.written_tokens = Counter("niwaki_written_tokens_total", "Tokens of answers.", registry=self.registry)
        self.steps = Counter(
            "niwaki_steps_total", "Steps that generated a token of every running sequence.", registry=self.registry
        )
        self.first_token = Histogram(
            "niwaki_first_token_seconds", "Seconds from the start in the queue to the first token.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.token = Histogram(
            "niwaki_token_seconds",
            "Seconds between two tokens of one answer.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "niwaki_queue_seconds", "Seconds in the queue.", buckets=SECONDS, registry=self.registry
        )
        self._skipped = Histogram(
            "niwaki_skipped_frac", "Share of the weights that each answer of a contextual model skipped.",
            buckets=SHARES, registry=self.registry,
        )  # fmt: skip
        self._contextual_tokens = Counter(
            "niwaki_contextual_tokens_total", "Tokens of answers of a contextual model, by the weights that ran.",
            ["weights"], registry=self.registry,
        )  # fmt: skip
        self._decisions = Counter(
            "niwaki_gate_decisions_total", "Decisions of a contextual model: sparse, or the reason for dense.",
            ["decision"], registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "niwaki_refused_connections_total", "Connections that were refused before a route saw a request.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self._create_series()

    def _create_series(self) -> None:
        """Create every series at 0."""
        for route in ROUTES:
            for outcome in OUTCOMES:
                self._requests.labels(route, outcome)
            self._seconds.labels(route)
        for decision in Decision:
            self._decisions.labels(decision)
        for reason in REFUSALS:
            self._refusals.labels(reason)
        for weights in ("part", "all"):
            self._contextual_tokens.labels(weights)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def count_request(self, route: str, outcome: str, seconds: float) -> None:
        """Count a request that ended."""
        self._requests.labels(route, outcome).inc()
        self._seconds.labels(route).observe(seconds)

    def count_refusal(self, reason: str) -> None:
        """Count a connection that the protocol refused, by one of REFUSALS."""
        self._refusals.labels(reason).inc()

    def count_contextual(self, record: Record) -> None:
        """Count a finished sequence of a contextual model."""
        self._decisions.labels(record.decision).inc()
        self._skipped.observe(record.skipped_frac[-1] if record.sparse_tokens else 0.0)
        self._contextual_tokens.labels("part").inc(record.sparse_tokens)
        self._contextual_tokens.labels("all").inc(record.dense_tokens)

    def text(self) -> bytes:
        """Return all metrics in the exposition format."""
        return generate_latest(self.registry)
