"""Routes of the gateway: the two of the interface, models, dashboard, health and metrics.

`/health` and `/ready` need no key and reveal nothing else. All other routes need a key if there are keys. The dashboard
and its data only read. No label of a metric comes from a request.

    uvicorn.run(build(gateway))
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from niwaki.errors import OutputError
from niwaki.rollout import dashboard
from niwaki.rollout.answers import CHAT, COMPLETIONS
from niwaki.rollout.gateway import Gateway, no_answer
from niwaki.rollout.http_client import UpstreamError
from niwaki.serve.http.api_errors import OVERLOADED, RefusalError
from niwaki.serve.http.limits import BodyLimits, LimitsMiddleware
from niwaki.serve.http.protocol import REFUSALS

log = logging.getLogger("niwaki.rollout")
TICK_S = 1.0
CHALLENGE = 'Basic realm="niwaki rollout", charset="UTF-8"'  # a browser asks for the key as a password
READ_S = 2.0  # max wait of the dashboard for the state database
MAX_READING = 2  # reads of the dashboard at once. A database that hangs costs these threads and no other
METRICS_S = 0.5  # max wait of the dashboard for the metrics of the canary
SIDES = ("stable", "canary", "fallback", "important", "shadow")
Clock = Callable[[], float]


def build(gateway: Gateway, *, tick_s: float | None = TICK_S, now: Clock = time.time) -> Starlette:
    """Return the application. Without `tick_s` it decides nothing (tests)."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        ticking = None if tick_s is None else asyncio.create_task(_tick_forever(gateway, tick_s, now))
        yield
        if ticking is not None:
            ticking.cancel()
        await gateway.close()

    own = _Routes(gateway, now)
    routes = [
        Route(COMPLETIONS, own.completions, methods=["POST"]),
        Route(CHAT, own.chat, methods=["POST"]),
        Route("/v1/models", own.models),
        Route("/metrics", own.metrics),
        Route("/rollout", own.page),
        Route("/rollout/data", own.data),
        Route("/rollout/{name}", own.asset),
        Route("/health", own.health),
        Route("/ready", own.ready),
    ]
    body_limits = BodyLimits(gateway.settings.bounds.body_bytes, gateway.settings.bounds.body_s)
    limits = Middleware(LimitsMiddleware, gateway.keys, body_limits, challenge=CHALLENGE)
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=[limits], exception_handlers={404: _not_found, 405: _not_found}
    )
    app.router.redirect_slashes = False  # a wrong path gets 404 and no redirect
    return app


@dataclass(frozen=True)
class _Routes:
    """Handlers of the routes."""

    gateway: Gateway
    now: Clock
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(MAX_READING, "niwaki-dashboard"))
    reading: set[asyncio.Future[dict[str, Any]]] = field(default_factory=set)

    async def completions(self, request: Request) -> Response:
        return await self.gateway.answer(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        return await self.gateway.answer(request, CHAT)

    async def models(self, request: Request) -> Response:
        passed = [] if self.gateway.keys else [one for one in request.headers.raw if one[0] == b"authorization"]
        try:
            reply = await self.gateway.stable.models(passed, self.gateway.settings.bounds.answer_s)
        except UpstreamError as failure:
            raise no_answer() from failure
        return Response(reply.first, reply.status, media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        return Response(exposition(self.gateway), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        return Response(dashboard.page(), media_type="text/html", headers=dashboard.HEADERS)

    async def asset(self, request: Request) -> Response:
        asset = dashboard.asset(request.path_params["name"])
        if asset is None:
            raise RefusalError(404, "no such file")
        return Response(asset.content, media_type=asset.kind, headers={"Cache-Control": "private, max-age=86400"})

    async def data(self, _: Request) -> Response:
        gateway, keep_texts = self.gateway, self.gateway.settings.sampling.keep_texts
        skipped = await gateway.canary.skipped_frac(METRICS_S) if gateway.controller.active else None
        state = dashboard.snapshot(gateway.controller)
        if len(self.reading) >= MAX_READING:
            raise _state_is_away()
        view_of = partial(dashboard.view, state, self.now(), keep_texts=keep_texts, skipped_frac=skipped)
        work = asyncio.get_running_loop().run_in_executor(self.readers, view_of)
        self.reading.add(work)
        work.add_done_callback(self._read)
        try:
            view = await asyncio.wait_for(asyncio.shield(work), READ_S)
        except (TimeoutError, OutputError):
            raise _state_is_away() from None
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    def _read(self, work: asyncio.Future[dict[str, Any]]) -> None:
        """Remove a read that ended. Its error is lost if the dashboard did not wait for it."""
        self.reading.discard(work)
        if not work.cancelled():
            work.exception()

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        try:
            reply = await self.gateway.stable.models([], self.gateway.settings.bounds.connect_s)
        except UpstreamError:
            return JSONResponse({"status": "the dense model does not answer"}, 503)
        up = reply.status < 500  # 401 counts as an answer, because /ready has no key of a client
        return JSONResponse({"status": "ok" if up else "the dense model is not ready"}, 200 if up else 503)


def _state_is_away() -> RefusalError:
    return RefusalError(503, "the state database does not answer", kind=OVERLOADED, retry_s=2)


async def _not_found(_: Request, __: Exception) -> Response:
    raise RefusalError(404, f"expected POST to {COMPLETIONS} or {CHAT}, GET of /v1/models, /rollout or /metrics")


async def _tick_forever(gateway: Gateway, tick_s: float, now: Clock) -> None:
    """Decide in another thread, so that no answer waits for the disk or for arithmetic."""
    controller = gateway.controller
    while True:
        await asyncio.sleep(tick_s)
        try:
            at = now()
            verdict = await asyncio.to_thread(controller.judge, controller.snapshot(at), at)
            controller.apply(verdict, at)
        except Exception:
            log.exception("the roll-out could not decide")


class _RolloutCollector(Collector):
    """Prometheus collector of the counters and the state of a roll-out."""

    def __init__(self, gateway: Gateway) -> None:
        self.controller, self.refusals = gateway.controller, gateway.refusals

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the current roll-out."""
        controller, requests, skipped = self.controller, Counter[str](), Counter[str]()
        for interval in controller.counters.intervals:
            requests.update(interval.requests)
            skipped.update({reason.partition(":")[0]: count for reason, count in interval.skipped.items()})
        sides = GaugeMetricFamily("niwaki_rollout_requests", "Answers of this roll-out, by side.", labels=["side"])
        for side in SIDES:
            sides.add_metric([side], requests[side])
        yield sides
        left_out = GaugeMetricFamily("niwaki_rollout_skipped", "Skipped requests, by reason.", labels=["what"])
        for reason, count in sorted(skipped.items()):
            left_out.add_metric([reason], count)
        yield left_out
        refused = CounterMetricFamily(
            "niwaki_refused_connections",
            "Connections that were refused before a route saw a request.",
            labels=["reason"],
        )
        for reason in REFUSALS:
            refused.add_metric([reason], self.refusals[reason])
        yield refused
        journal = controller.journal
        yield GaugeMetricFamily("niwaki_rollout_kept", "Writes that wait for the database.", value=journal.kept)
        yield GaugeMetricFamily("niwaki_rollout_dropped", "Writes that were too many to keep.", value=journal.dropped)
        yield GaugeMetricFamily("niwaki_rollout_share", "Share of traffic of the canary.", value=controller.share)
        yield GaugeMetricFamily("niwaki_rollout_number", "Number of the roll-out.", value=controller.state.id)
        for finding in controller.verdict.findings if controller.verdict else ():
            if finding.value is not None:
                yield GaugeMetricFamily(f"niwaki_rollout_{finding.signal}", "Value of a signal.", value=finding.value)


def exposition(gateway: Gateway) -> bytes:
    """Return the metrics in the exposition format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_RolloutCollector(gateway))
    return generate_latest(registry)
