"""Middleware that counts how requests for answers end, refusals included.

application = RequestMetricsMiddleware(LimitsMiddleware(application, keys, limits), metrics)
"""

import time
from typing import Any

from niwaki.serve.prometheus import Metrics

COUNTED = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
OUTCOME_OF = {401: "unauthorized", 429: "rejected", 503: "unavailable", 504: "timeout", 500: "failed"}


class RequestMetricsMiddleware:
    """ASGI application that counts the outcome and the seconds of each request of COUNTED."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI connection."""
        route = COUNTED.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def send_and_note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            outcome = scope.get("state", {}).get("outcome") or _outcome(status)
            self.metrics.count_request(route, outcome, time.monotonic() - began)


def _outcome(status: int) -> str:
    """Return the outcome of a status, for a request that set no outcome itself."""
    if status == 0:
        return "cancelled"
    return OUTCOME_OF.get(status, "invalid" if status >= 400 else "answered")
