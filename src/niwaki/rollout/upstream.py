"""One OpenAI-compatible server: a request goes out as it came in, the answer comes back as bytes with its times.

A `Reply` is handed over once its first byte is there (a whole answer: all of its bytes), so that whoever asked can
still turn to another server before that. Answers are asked for without compression and passed on unchanged.

    reply = await server.open("/v1/completions", body, headers, first_byte_s=30)
"""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from niwaki.errors import InputError
from niwaki.rollout.answers import failed_at_once
from niwaki.rollout.http_client import Headers, Line, Opened, Sender, UpstreamError
from niwaki.rollout.settings import Bounds, Upstream

# Headers that belong to one connection, and those that are set anew.
_OWN = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"accept-encoding", b"expect",
    b"date", b"server",
}  # fmt: skip
MAX_BYTES = 64_000_000  # of an answer that is read whole
Clock = Callable[[], float]


@dataclass
class Reply:
    """An answer whose first bytes are there. `chunks` yields all of them, the first included."""

    status: int
    headers: Headers
    stream: bool
    first: bytes
    asked: float
    begun: float
    opened: Opened
    silence_s: float

    @property
    def good(self) -> bool:
        """Whether it is an answer and not a refusal."""
        return 200 <= self.status < 300 and not (self.stream and failed_at_once(self.first))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises UpstreamError when they break off, or pause for too long."""
        yield self.first
        while self.stream:
            async with _within(self.silence_s):
                chunk = await self.opened.more()
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Lets the server know that nobody listens any more."""
        self.opened.close()


class Server:
    """A connection pool to one upstream."""

    def __init__(
        self, upstream: Upstream, bounds: Bounds, *, sender: Sender | None = None, clock: Clock = time.perf_counter
    ) -> None:
        self.upstream, self.bounds, self.clock = upstream, bounds, clock
        self.key = _key(upstream)
        self.sender: Sender = Line(upstream.url, bounds.connect_s) if sender is None else sender

    def body(self, payload: Mapping[str, Any], body: bytes) -> bytes:
        """The bytes to send: those that came, or with this server's own name of the model."""
        if self.upstream.model is None or payload.get("model") == self.upstream.model:
            return body
        return json.dumps({**payload, "model": self.upstream.model}).encode()

    async def open(self, path: str, body: bytes, headers: Headers, first_byte_s: float) -> Reply:
        """Asks, and waits for the first byte. Raises UpstreamError."""
        return await self._asked("POST", path, body, headers, first_byte_s)

    async def _asked(self, method: str, path: str, body: bytes, headers: Headers, first_byte_s: float) -> Reply:
        asked = self.clock()
        async with _within(first_byte_s):
            opened = await self.sender.send(method, path, self._headers(headers), body)
            try:
                return await self._begun(opened, asked)
            except BaseException:
                opened.close()
                raise

    async def _begun(self, opened: Opened, asked: float) -> Reply:
        headers, kind = [], b""
        for name, value in opened.headers:
            lowered = name.lower()
            kind = value if lowered == b"content-type" else kind
            if lowered not in _OWN:
                headers.append((name, value))
        stream = kind.startswith(b"text/event-stream")
        first = await opened.more()
        if stream and not first:
            raise UpstreamError("an empty stream")
        while not stream and (chunk := await opened.more()):
            first += chunk
            if len(first) > MAX_BYTES:
                raise UpstreamError("an answer without end")
        return Reply(opened.status, headers, stream, first, asked, self.clock(), opened, self.bounds.silence_s)

    async def ask(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One small question of our own, answered with a JSON object. Raises UpstreamError."""
        body = json.dumps({**payload, **({"model": self.upstream.model} if self.upstream.model else {})}).encode()
        reply = await self.open(path, body, [(b"content-type", b"application/json")], timeout_s)
        reply.close()
        if not reply.good:
            raise UpstreamError(f"status {reply.status}")
        try:
            found = json.loads(reply.first)
        except ValueError as error:
            raise UpstreamError("not JSON") from error
        if not isinstance(found, dict):
            raise UpstreamError("no object")
        return found

    async def models(self, headers: Headers, timeout_s: float) -> Reply:
        """Its list of models."""
        reply = await self._asked("GET", "/v1/models", b"", headers, timeout_s)
        reply.close()
        return reply

    async def skipped_frac(self, timeout_s: float) -> float | None:
        """The mean share of weights that a contextual model of niwaki's own server skipped, as its metrics say."""
        try:
            reply = await self._asked("GET", "/metrics", b"", [], timeout_s)
        except UpstreamError:
            return None
        reply.close()
        text = reply.first[:1_000_000].decode("utf-8", "replace")
        found = dict(re.findall(r"^niwaki_skipped_frac_(sum|count)(?:\{\})? (\S+)$", text, re.M))
        count = float(found.get("count", 0))
        return float(found["sum"]) / count if count and "sum" in found else None

    async def close(self) -> None:
        """Ends all connections."""
        await self.sender.close()

    def _headers(self, headers: Headers) -> Headers:
        passed = [(name, value) for name, value in headers if name.lower() not in _OWN]
        if self.key is not None:
            passed = [(name, value) for name, value in passed if name.lower() != b"authorization"]
            passed.append((b"authorization", b"Bearer " + self.key.encode()))
        return [*passed, (b"accept-encoding", b"identity")]


def _key(upstream: Upstream) -> str | None:
    if upstream.key_env is None:
        return None
    key = os.environ.get(upstream.key_env)
    if not key:
        raise InputError(f"the key of {upstream.url} should be in ${upstream.key_env}, which is not set")
    return key


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """Raises UpstreamError for what takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise UpstreamError("timeout") from error
