"""What is looked at before a request is read: size and kind of its headers and body, its key, and its patience.

A layer around the application, so that no route can be without it. The body is counted while it arrives, decompresses
nothing, and has to arrive in time. A server without keys answers to names of this machine only, so that no web page
reaches it under a name of its own. `OPEN` paths need no key.

    application = Guard(application, Keys(["secret"]), Bounds())
"""

import asyncio
import ipaddress
import json
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from niwaki.errors import InputError
from niwaki.serve.http.api_errors import OVERLOADED, RefusalError
from niwaki.serve.http.keys import Keys

HEADER_BYTES = 16 * 2**10
ARRIVING_BYTES = 32 * 2**20  # of all bodies that are not complete yet: what waits in memory for their rest
OPEN = frozenset({"/health", "/ready"})
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True)
class Bounds:
    """What a body may be: bytes, and seconds until it is there."""

    body_bytes: int = 2 * 2**20
    body_s: float = 30.0


def check_open(host: str, keys: object, otherwise: str = "") -> None:
    """Raises InputError where everybody in a network could ask without a key; `otherwise`: what else would help."""
    if not (is_local(host) or keys):
        raise InputError(f"{host} can be reached from other machines: give --api-key-file FILE{otherwise}")


class LimitsMiddleware:
    """The application behind its limits. `challenge`: how a 401 asks for a key; `here`: without keys, only for here."""

    def __init__(self, app: Any, keys: Keys, bounds: Bounds, *, here: bool = True, challenge: str = "Bearer") -> None:
        self.app, self.keys, self.bounds = app, keys, bounds
        self.here, self.challenge = here and not keys, challenge
        self.arriving = _Arriving()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counted = _Counted(receive, self.bounds, self.arriving)
        try:
            self._check(scope)
            await self.app(scope, counted, send)
        except RefusalError as refused:
            await self._refuse(refused, send)
        finally:
            counted.end()

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise RefusalError(431, f"the headers take more than {HEADER_BYTES} bytes")
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if scope["path"] not in OPEN and not self.keys.accept(authorization):
            raise RefusalError(
                401, "no valid API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )
        if self.here and not is_local(_name(headers.get(b"host", b""))):
            raise RefusalError(403, "without keys this server answers to localhost only, not to other names for it")
        if any(_CONTROL.search(value) for value in headers.values()):
            raise RefusalError(400, "expected headers without control characters")
        if scope["method"] == "POST":
            self._check_body(headers)

    def _check_body(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.bounds.body_bytes:
            raise _too_large(self.bounds)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusalError(415, "compressed bodies are not read: send the JSON as it is")
        # A browser sends this type to another site only after asking, which is not answered.
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise RefusalError(415, "expected a body with content-type application/json")

    async def _refuse(self, refused: RefusalError, send: Any) -> None:
        body = json.dumps(refused.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
        if refused.status == 401:
            headers["WWW-Authenticate"] = self.challenge
        coded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": refused.status, "headers": coded})
        await send({"type": "http.response.body", "body": body})


class _Arriving:
    """Bytes of bodies whose rest is still to come."""

    total = 0


class _Counted:
    """A body that may neither be too large nor come too late, nor be one of too many."""

    def __init__(self, receive: Any, bounds: Bounds, arriving: _Arriving) -> None:
        self.receive, self.bounds, self.until = receive, bounds, time.monotonic() + bounds.body_s
        self.arriving = arriving
        self.seen, self.complete = 0, False

    async def __call__(self) -> Any:
        if self.complete:  # what follows is the client hanging up, whenever that is
            return await self.receive()
        try:
            async with asyncio.timeout(max(self.until - time.monotonic(), 0)):
                message = await self.receive()
        except TimeoutError:
            raise RefusalError(408, "the body did not arrive in time") from None
        size = len(message.get("body", b""))
        self.seen += size
        self.arriving.total += size
        if self.seen > self.bounds.body_bytes:
            raise _too_large(self.bounds)
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


def _too_large(bounds: Bounds) -> RefusalError:
    return RefusalError(413, f"expected a body of at most {bounds.body_bytes} bytes")


def _name(host: bytes) -> str:
    """Of a header Host, without the port; empty if there is none in it."""
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def is_local(host: str) -> bool:
    """Whether a name or address is of this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
