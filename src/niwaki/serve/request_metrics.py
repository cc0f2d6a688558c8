"""How requests to the writing routes end, counted: a layer around everything else, refusals included.

application = Outcomes(Guard(application, keys, bounds), metrics)
"""

import time
from typing import Any

from niwaki.serve.metrics import Metrics

COUNTED = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
OUTCOME_OF = {401: "unauthorized", 429: "rejected", 503: "unavailable", 504: "timeout", 500: "failed"}


class Outcomes:
    """The application, watched."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Of ASGI."""
        route = COUNTED.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            outcome = scope.get("state", {}).get("outcome") or _outcome(status)
            self.metrics.answered(route, outcome, time.monotonic() - began)


def _outcome(status: int) -> str:
    """What a status says, for requests that nothing else is known of."""
    if status == 0:
        return "cancelled"
    return OUTCOME_OF.get(status, "invalid" if status >= 400 else "answered")
