"""The addresses of the gateway: the two of the interface, models, the dashboard, health and metrics.

`/health` and `/ready` are open to everybody and say nothing else; all others want a key if there are any. The dashboard
and its data only read.

    uvicorn.run(build(gateway))
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from niwaki.rollout import dashboard
from niwaki.rollout.answers import CHAT, COMPLETIONS
from niwaki.rollout.gateway import Gateway
from niwaki.rollout.guard import RefusedError, refusal
from niwaki.rollout.metrics import exposition
from niwaki.rollout.upstream import UpstreamError

log = logging.getLogger("niwaki.rollout")
TICK_S = 1.0
Endpoint = Callable[[Request], Awaitable[Response]]


def build(gateway: Gateway, *, tick_s: float | None = TICK_S, now: Callable[[], float] = time.time) -> Starlette:
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

    def kept(endpoint: Endpoint) -> Endpoint:
        """Only with a key, and every refusal in one form."""

        async def guarded(request: Request) -> Response:
            if not gateway.guard.allows(request.headers):
                return refusal(401, "expected a key of this gateway")
            try:
                gateway.guard.check_head(request)
                return await endpoint(request)
            except RefusedError as refused:
                return refusal(refused.status, str(refused))

        return guarded

    async def completions(request: Request) -> Response:
        return await gateway.answer(request, COMPLETIONS)

    async def chat(request: Request) -> Response:
        return await gateway.answer(request, CHAT)

    async def models(request: Request) -> Response:
        try:
            raw = [] if gateway.guard.digests else [h for h in request.headers.raw if h[0] == b"authorization"]
            reply = await gateway.stable.models(raw, gateway.settings.bounds.silence_s)
        except UpstreamError:
            return refusal(502, "the model does not answer")
        return Response(reply.first, reply.status, media_type="application/json")

    async def metrics(_: Request) -> Response:
        return Response(exposition(gateway.controller), media_type="text/plain; version=0.0.4")

    async def page(_: Request) -> Response:
        return Response(dashboard.page(), media_type="text/html", headers=dashboard.HEADERS)

    async def asset(request: Request) -> Response:
        found = dashboard.asset(request.path_params["name"])
        if found is None:
            return refusal(404, "no such file")
        return Response(found.content, media_type=found.kind, headers={"Cache-Control": "private, max-age=86400"})

    async def data(_: Request) -> Response:
        keep_texts = gateway.settings.sampling.keep_texts
        skipped = await gateway.canary.skipped_frac(0.5) if gateway.controller.active else None
        view = await asyncio.to_thread(
            dashboard.view, dashboard.seen(gateway.controller), now(), keep_texts=keep_texts, skipped_frac=skipped
        )
        return JSONResponse(view, headers={"Cache-Control": "no-store"})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_: Request) -> Response:
        try:
            reply = await gateway.stable.models([], gateway.settings.bounds.connect_s)
        except UpstreamError:
            return JSONResponse({"status": "the dense model does not answer"}, 503)
        # 401 is an answer, too: /ready carries no key of a client
        up = reply.status < 500
        return JSONResponse({"status": "ok" if up else "the dense model is not ready"}, 200 if up else 503)

    async def nowhere(_: Request, __: Exception) -> Response:
        return refusal(404, f"expected POST to {COMPLETIONS} or {CHAT}, GET of /v1/models, /rollout or /metrics")

    routes = [
        Route(COMPLETIONS, kept(completions), methods=["POST"]),
        Route(CHAT, kept(chat), methods=["POST"]),
        Route("/v1/models", kept(models)),
        Route("/metrics", kept(metrics)),
        Route("/rollout", kept(page)),
        Route("/rollout/data", kept(data)),
        Route("/rollout/{name}", kept(asset)),
        Route("/health", health),
        Route("/ready", ready),
    ]
    return Starlette(routes=routes, lifespan=living, exception_handlers={404: nowhere, 405: nowhere})


async def _ticking(gateway: Gateway, tick_s: float, now: Callable[[], float]) -> None:
    """Decides in another thread, so that no answer waits for the disk or for arithmetic."""
    controller = gateway.controller
    while True:
        await asyncio.sleep(tick_s)
        try:
            at = now()
            verdict = await asyncio.to_thread(controller.judged, controller.snapshot(at), at)
            controller.apply(verdict, at)
        except Exception as error:
            log.exception("the roll-out could not decide") if not _expected(error) else log.error("%s", error)


def _expected(error: Exception) -> bool:
    from niwaki.errors import NiwakiError

    return isinstance(error, NiwakiError)
