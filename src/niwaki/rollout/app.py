"""The addresses of the gateway: the two of the interface, models, the dashboard, health and metrics.

`/health` and `/ready` are open to everybody and say nothing else; all others want a key if there are any. The dashboard
and its data only read.

    uvicorn.run(build(gateway))
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from niwaki.errors import NiwakiError
from niwaki.rollout import dashboard
from niwaki.rollout.answers import CHAT, COMPLETIONS
from niwaki.rollout.gateway import Gateway, no_answer
from niwaki.rollout.http_client import UpstreamError
from niwaki.rollout.metrics import exposition
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.http.limits import BodyLimits, LimitsMiddleware

log = logging.getLogger("niwaki.rollout")
TICK_S = 1.0
CHALLENGE = 'Basic realm="niwaki rollout", charset="UTF-8"'  # a browser asks for the key as a password
SKIPPED_S = 0.5  # the most that the dashboard waits for the canary's own metrics
Clock = Callable[[], float]


def build(gateway: Gateway, *, tick_s: float | None = TICK_S, now: Clock = time.time) -> Starlette:
    """The application. Without `tick_s` nothing decides by itself (tests)."""

    @contextlib.asynccontextmanager
    async def living(_: Starlette) -> AsyncIterator[None]:
        ticking = None if tick_s is None else asyncio.create_task(_ticking(gateway, tick_s, now))
        yield
        if ticking is not None:
            ticking.cancel()
        await gateway.background.stop()
        await gateway.stable.close()
        await gateway.canary.close()

    own = _Addresses(gateway, now)
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
    bounds = BodyLimits(gateway.settings.bounds.body_bytes, gateway.settings.bounds.body_s)
    guard = Middleware(LimitsMiddleware, gateway.keys, bounds, challenge=CHALLENGE)
    app = Starlette(
        routes=routes, lifespan=living, middleware=[guard], exception_handlers={404: _nowhere, 405: _nowhere}
    )
    app.router.redirect_slashes = False  # an address is right or it is not
    return app


@dataclass(frozen=True)
class _Addresses:
    """What answers at each address."""

    gateway: Gateway
    now: Clock

    async def completions(self, request: Request) -> Response:
        return await self.gateway.answer(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        return await self.gateway.answer(request, CHAT)

    async def models(self, request: Request) -> Response:
        keyed = bool(self.gateway.keys)
        passed = [] if keyed else [one for one in request.headers.raw if one[0] == b"authorization"]
        try:
            reply = await self.gateway.stable.models(passed, self.gateway.settings.bounds.answer_s)
        except UpstreamError as failure:
            raise no_answer() from failure
        return Response(reply.first, reply.status, media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        return Response(exposition(self.gateway.controller), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        return Response(dashboard.page(), media_type="text/html", headers=dashboard.HEADERS)

    async def asset(self, request: Request) -> Response:
        found = dashboard.asset(request.path_params["name"])
        if found is None:
            raise RefusalError(404, "no such file")
        return Response(found.content, media_type=found.kind, headers={"Cache-Control": "private, max-age=86400"})

    async def data(self, _: Request) -> Response:
        gateway, keep_texts = self.gateway, self.gateway.settings.sampling.keep_texts
        skipped = await gateway.canary.skipped_frac(SKIPPED_S) if gateway.controller.active else None
        seen = dashboard.seen(gateway.controller)
        view = await asyncio.to_thread(dashboard.view, seen, self.now(), keep_texts=keep_texts, skipped_frac=skipped)
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        try:
            reply = await self.gateway.stable.models([], self.gateway.settings.bounds.connect_s)
        except UpstreamError:
            return JSONResponse({"status": "the dense model does not answer"}, 503)
        up = reply.status < 500  # 401 is an answer, too: no key of a client comes with /ready
        return JSONResponse({"status": "ok" if up else "the dense model is not ready"}, 200 if up else 503)


async def _nowhere(_: Request, __: Exception) -> Response:
    raise RefusalError(404, f"expected POST to {COMPLETIONS} or {CHAT}, GET of /v1/models, /rollout or /metrics")


async def _ticking(gateway: Gateway, tick_s: float, now: Clock) -> None:
    """Decides in another thread, so that no answer waits for the disk or for arithmetic."""
    controller = gateway.controller
    while True:
        await asyncio.sleep(tick_s)
        try:
            at = now()
            verdict = await asyncio.to_thread(controller.judged, controller.snapshot(at), at)
            controller.apply(verdict, at)
        except NiwakiError as error:
            log.error("%s", error)
        except Exception:
            log.exception("the roll-out could not decide")
