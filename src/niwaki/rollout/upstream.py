"""One OpenAI-compatible server: a request goes out as it came in, the answer comes back as bytes with its times.

A `Reply` is handed over once its first byte is there (a whole answer: all of its bytes), so that whoever asked can
still turn to another server before that. Answers are asked for without compression and passed on unchanged.

    reply = await server.open("/v1/completions", body, headers, first_byte_s=30)
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from niwaki.errors import InputError
from niwaki.rollout.answers import failed_at_once
from niwaki.rollout.settings import Bounds, Upstream

# Headers that belong to one connection, and those that are set anew.
_OWN = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"accept-encoding", b"expect",
    b"date", b"server",
}  # fmt: skip
MOST_BYTES = 64_000_000  # of an answer that is read whole
Clock = Callable[[], float]
Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """A server that did not answer, not in time, or with an error; the message is a few words for counters and logs."""


@dataclass
class Reply:
    """An answer whose first bytes are there. `chunks` yields all of them, the first included."""

    status: int
    headers: Headers
    stream: bool
    first: bytes
    asked: float
    begun: float
    response: httpx.Response
    rest: AsyncIterator[bytes]
    silence_s: float

    @property
    def good(self) -> bool:
        """Whether it is an answer and not a refusal."""
        return 200 <= self.status < 300 and not (self.stream and failed_at_once(self.first))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises UpstreamError when they break off, or pause for too long."""
        yield self.first
        while True:
            try:
                async with asyncio.timeout(self.silence_s):
                    chunk = await anext(self.rest, b"")
            except (httpx.HTTPError, TimeoutError) as error:
                raise UpstreamError(_reason(error)) from error
            if not chunk:
                return
            yield chunk

    async def close(self) -> None:
        """Lets the server know that nobody listens any more."""
        await self.response.aclose()


class Server:
    """A connection pool to one upstream."""

    def __init__(
        self,
        upstream: Upstream,
        bounds: Bounds,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.upstream, self.bounds, self.clock = upstream, bounds, clock
        self.key = _key(upstream)
        self.client = httpx.AsyncClient(
            base_url=upstream.url,
            transport=transport,
            timeout=httpx.Timeout(None, connect=bounds.connect_s),
            # Servers close idle connections after 5 s; ours go first, so that none is closed while it is taken.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2.0),
            trust_env=False,
            follow_redirects=False,
        )

    def body(self, payload: Mapping[str, Any], body: bytes) -> bytes:
        """The bytes to send: those that came, or with this server's own name of the model."""
        if self.upstream.model is None or payload.get("model") == self.upstream.model:
            return body
        return json.dumps({**payload, "model": self.upstream.model}).encode()

    async def open(self, path: str, body: bytes, headers: Headers, first_byte_s: float) -> Reply:
        """Asks, and waits for the first byte. Raises UpstreamError."""
        request = self.client.build_request("POST", path, content=body, headers=self._headers(headers))
        asked = self.clock()
        try:
            async with asyncio.timeout(first_byte_s):
                response = await self.client.send(request, stream=True)
                try:
                    return await self._begun(response, asked)
                except BaseException:
                    await response.aclose()
                    raise
        except (httpx.HTTPError, TimeoutError) as error:
            raise UpstreamError(_reason(error)) from error

    async def _begun(self, response: httpx.Response, asked: float) -> Reply:
        stream = response.headers.get("content-type", "").startswith("text/event-stream")
        rest = response.aiter_raw()
        first = b""
        if stream:
            first = await anext(rest, b"")
        else:
            async for chunk in rest:
                first += chunk
                if len(first) > MOST_BYTES:
                    raise httpx.ReadError("an answer without end")
        if stream and not first:
            raise httpx.ReadError("an empty stream")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _OWN]
        return Reply(
            response.status_code, headers, stream, first, asked, self.clock(), response, rest, self.bounds.silence_s
        )

    async def ask(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """One small question of our own, answered with a JSON object. Raises UpstreamError."""
        body = json.dumps({**payload, **({"model": self.upstream.model} if self.upstream.model else {})}).encode()
        reply = await self.open(path, body, [(b"content-type", b"application/json")], timeout_s)
        await reply.close()
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
        try:
            async with asyncio.timeout(timeout_s):
                asked = self.clock()
                request = self.client.build_request("GET", "/v1/models", headers=self._headers(headers))
                response = await self.client.send(request, stream=True)
                try:
                    return await self._begun(response, asked)
                finally:
                    await response.aclose()
        except (httpx.HTTPError, TimeoutError) as error:
            raise UpstreamError(_reason(error)) from error

    async def skipped_frac(self, timeout_s: float) -> float | None:
        """The mean share of weights that a contextual model of niwaki's own server skipped, as its metrics say."""
        try:
            answer = await self.client.get("/metrics", headers=self._headers([]), timeout=timeout_s)
        except httpx.HTTPError:
            return None
        found = dict(re.findall(r"^niwaki_skipped_frac_(sum|count)(?:\{\})? (\S+)$", answer.text[:1_000_000], re.M))
        count = float(found.get("count", 0))
        return float(found["sum"]) / count if count and "sum" in found else None

    async def close(self) -> None:
        """Ends all connections."""
        await self.client.aclose()

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


def _reason(error: BaseException) -> str:
    """The kind of an error without its text, which may hold addresses."""
    return "timeout" if isinstance(error, TimeoutError | httpx.TimeoutException) else type(error).__name__
