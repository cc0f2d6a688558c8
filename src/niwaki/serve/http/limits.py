"""Middleware that checks a request before a route reads it: headers, key, size and type of the body, time to arrive.

It wraps the application, so that every route has it. It counts the bytes of the body while they arrive and decompresses
nothing. A server without keys answers only to names of this machine. Thus no web page can reach it through a name of
its own. `KEYLESS_PATHS` need no key.

    application = LimitsMiddleware(application, Keys(["secret"]), BodyLimits())
"""

import asyncio
import ipaddress
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from niwaki.errors import InputError
from niwaki.serve.http.api_errors import OVERLOADED, RefusalError
from niwaki.serve.http.keys import Keys

HEADER_BYTES = 16 * 2**10
MAX_PENDING_BYTES = 32 * 2**20  # of all incomplete bodies together
KEYLESS_PATHS = frozenset({"/health", "/ready"})
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True)
class BodyLimits:
    """Max bytes of a body, and max seconds until it is complete."""

    body_bytes: int = 2 * 2**20
    body_s: float = 30.0


def check_host(host: str, keys: object, alternative: str = "") -> None:
    """Raise InputError if other machines could send requests without a key. `alternative` ends the message."""
    if not (is_loopback(host) or keys):
        raise InputError(f"{host} can be reached from other machines: give --api-key-file FILE{alternative}")


def check_port(host: str, port: int) -> None:
    """Raise InputError if no socket can listen at `host`:`port`. This is checked before a model is loaded."""
    if not 0 <= port < 2**16:
        raise InputError(f"port {port} does not exist: expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen at {host}:{port} ({reason.lower()}): choose another host or port") from error


class LimitsMiddleware:
    """ASGI application with limits.

    `challenge`: the WWW-Authenticate header of a 401. `loopback_only`: without keys, refuse other names of the host.
    """

    def __init__(
        self, app: Any, keys: Keys, limits: BodyLimits, *, loopback_only: bool = True, challenge: str = "Bearer"
    ) -> None:
        self.app, self.keys, self.limits = app, keys, limits
        self.loopback_only, self.challenge = loopback_only and not keys, challenge
        self.pending = _PendingBytes()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _LimitedBody(receive, self.limits, self.pending)
        try:
            self._check(scope)
            await self.app(scope, body, send)
        except RefusalError as refused:
            await self._refuse(refused, send)
        finally:
            body.end()

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise RefusalError(431, f"request headers exceed {HEADER_BYTES} bytes")
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        if scope["path"] not in KEYLESS_PATHS and not self.keys.accept(authorization):
            raise RefusalError(
                401, "no valid API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )
        if self.loopback_only and not is_loopback(_host_name(headers.get(b"host", b""))):
            raise RefusalError(403, "without keys this server answers to localhost only, not to its other names")
        if any(_CONTROL.search(value) for value in headers.values()):
            raise RefusalError(400, "expected headers without control characters")
        if scope["method"] == "POST":
            self._check_body(headers)

    def _check_body(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.limits.body_bytes:
            raise _too_large(self.limits)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusalError(415, "compressed bodies are not read: send the JSON as it is")
        # A browser asks before it sends this type to another site, and gets no answer.
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


class _PendingBytes:
    """Count of the bytes of all incomplete bodies."""

    total = 0


class _LimitedBody:
    """Body with limits of its size, its time, and the bytes of all incomplete bodies."""

    def __init__(self, receive: Any, limits: BodyLimits, pending: _PendingBytes) -> None:
        self.receive, self.limits, self.until = receive, limits, time.monotonic() + limits.body_s
        self.pending = pending
        self.received, self.complete = 0, False

    async def __call__(self) -> Any:
        if self.complete:  # the next message is the disconnect of the client
            return await self.receive()
        try:
            async with asyncio.timeout(max(self.until - time.monotonic(), 0)):
                message = await self.receive()
        except TimeoutError:
            raise RefusalError(408, "the body did not arrive in time") from None
        size = len(message.get("body", b""))
        self.received += size
        self.pending.total += size
        if self.received > self.limits.body_bytes:
            raise _too_large(self.limits)
        if self.pending.total > MAX_PENDING_BYTES:
            text = "too many large bodies arrive at once: try again later"
            raise RefusalError(503, text, kind=OVERLOADED, retry_s=1, closes=True)
        if not message.get("more_body", False):
            self.end()
        return message

    def end(self) -> None:
        """End the body: its bytes are not pending any more."""
        if not self.complete:
            self.complete = True
            self.pending.total -= self.received


def _too_large(limits: BodyLimits) -> RefusalError:
    return RefusalError(413, f"expected a body of at most {limits.body_bytes} bytes")


def _host_name(host: bytes) -> str:
    """Return the name in a Host header without the port, or an empty text."""
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Check that a name or address is of the loopback of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
