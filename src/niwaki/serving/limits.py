"""What is looked at before a request is read: size and kind of its headers and body, its key, and its patience.

A layer around the application, so that no route can be without it. The body is counted while it arrives, decompresses
nothing, and has to arrive in time. A server without keys may answer to some names only (`hosts`), so that no web page
reaches it under a name of its own. `OPEN` paths need no key.

    application = Guard(application, Keys(["secret"]), metrics)
"""

import asyncio
import json
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from niwaki.keys import Keys
from niwaki.serving.metrics import Metrics
from niwaki.serving.refusals import OVERLOADED, RefusalError

HEADER_BYTES = 16 * 2**10
BODY_BYTES = 2 * 2**20
ARRIVING_BYTES = 32 * 2**20  # of all bodies that are not complete yet: what waits in memory for their rest
BODY_S = 30.0
OPEN = frozenset({"/health", "/ready"})
COUNTED = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
OUTCOME_OF = {401: "unauthorized", 429: "rejected", 503: "unavailable", 504: "timeout", 500: "failed"}


class Guard:
    """The application behind its limits; counts how requests to the writing routes end."""

    def __init__(
        self, application: Any, keys: Keys, metrics: Metrics, *, hosts: Collection[str] = (), body_s: float = BODY_S
    ) -> None:
        self.application, self.keys, self.metrics = application, keys, metrics
        self.hosts, self.body_s = hosts, body_s
        self.arriving = _Arriving()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        counted = _Counted(receive, self.body_s, self.arriving)
        route = COUNTED.get(scope["path"]) if scope["method"] == "POST" else None

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self.application(scope, counted, told)
        except RefusalError as refused:
            await refuse(refused, told)
        finally:
            counted.end()
            if route is not None:
                outcome = scope.get("state", {}).get("outcome") or _outcome(status)
                self.metrics.answered(route, outcome, time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise RefusalError(431, f"the headers take more than {HEADER_BYTES} bytes")
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if scope["path"] not in OPEN and not self.keys.accept(authorization):
            raise RefusalError(
                401, "no valid API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )
        if self.hosts and _name(headers.get(b"host", b"")) not in self.hosts:
            raise RefusalError(403, "without keys this server answers to localhost only, not to other names for it")
        if scope["method"] != "POST":
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY_BYTES:
            raise _too_large()
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusalError(415, "compressed bodies are not read: send the JSON as it is")
        # A browser sends this type to another site only after asking, which is not answered.
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise RefusalError(415, "expected a body with content-type application/json")


def _name(host: bytes) -> str:
    """Of a header Host, without the port; empty if there is none in it."""
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


class _Arriving:
    """Bytes of bodies whose rest is still to come."""

    total = 0


class _Counted:
    """A body that may neither be too large nor come too late, nor be one of too many."""

    def __init__(self, receive: Any, body_s: float, arriving: _Arriving) -> None:
        self.receive, self.until, self.arriving = receive, time.monotonic() + body_s, arriving
        self.seen, self.complete = 0, False

    async def __call__(self) -> Any:
        if self.complete:  # what follows is the client hanging up, whenever that is
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(self.until - time.monotonic(), 0))
        except TimeoutError:
            raise RefusalError(408, "the body did not arrive in time") from None
        size = len(message.get("body", b""))
        self.seen += size
        self.arriving.total += size
        if self.seen > BODY_BYTES:
            raise _too_large()
        if self.arriving.total > ARRIVING_BYTES:
            told = "too many large bodies arrive at once: try again later"
            raise RefusalError(503, told, kind=OVERLOADED, retry_s=1, closes=True)
        if not message.get("more_body", False):
            self.end()
        return message

    def end(self) -> None:
        """Nothing more comes of it."""
        if not self.complete:
            self.complete = True
            self.arriving.total -= self.seen


def _too_large() -> RefusalError:
    return RefusalError(413, f"the body takes more than {BODY_BYTES} bytes")


def _outcome(status: int) -> str:
    """What a status says, for requests that nothing else is known of."""
    if status == 0:
        return "cancelled"
    return OUTCOME_OF.get(status, "invalid" if status >= 400 else "answered")


async def refuse(refused: RefusalError, send: Any) -> None:
    """Sends a refusal."""
    body = json.dumps(refused.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    coded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": coded})
    await send({"type": "http.response.body", "body": body})
