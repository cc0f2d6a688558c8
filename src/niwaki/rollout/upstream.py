"""One OpenAI-compatible server: it gets requests unchanged, and returns answers as bytes with their times.

An `UpstreamResponse` starts with its first byte, or with all bytes if the answer is not a stream. Until then the
gateway can send the request to the other server. Answers are requested without compression and passed on unchanged.

    response = await server.open("/v1/completions", body, headers, first_byte_s=30)
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
from niwaki.rollout.answers import starts_with_error
from niwaki.rollout.http_client import Headers, HttpClient, HttpSender, OpenResponse, UpstreamError
from niwaki.rollout.settings import RequestLimits, Upstream

# Headers of one connection, and headers that the gateway sets itself.
_HOP_HEADERS = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"accept-encoding", b"expect",
    b"date", b"server",
}  # fmt: skip
MAX_BYTES = 64_000_000  # of an answer that is not a stream
Clock = Callable[[], float]


@dataclass
class UpstreamResponse:
    """Answer whose first bytes arrived. `chunks` yields all bytes, the first included."""

    status: int
    headers: Headers
    stream: bool
    first: bytes
    sent_at: float
    first_byte_at: float
    opened: OpenResponse
    silence_s: float

    @property
    def ok(self) -> bool:
        """Check that it is an answer and not an error."""
        return 200 <= self.status < 300 and not (self.stream and starts_with_error(self.first))

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes as they arrive. Raise UpstreamError if they break off or pause for too long."""
        yield self.first
        while self.stream:
            async with _timeout(self.silence_s):
                chunk = await self.opened.read_chunk()
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """End the answer, and tell the server that no one reads it."""
        self.opened.close()


class UpstreamServer:
    """Upstream with its connection pool."""

    def __init__(
        self,
        upstream: Upstream,
        bounds: RequestLimits,
        *,
        sender: HttpSender | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.upstream, self.bounds, self.clock = upstream, bounds, clock
        self.key = _key(upstream)
        self.sender: HttpSender = HttpClient(upstream.url, bounds.connect_s) if sender is None else sender

    def body(self, payload: Mapping[str, Any], body: bytes) -> bytes:
        """Return the bytes to send: the body, with the model name of this server if it has one."""
        if self.upstream.model is None or payload.get("model") == self.upstream.model:
            return body
        return json.dumps({**payload, "model": self.upstream.model}).encode()

    async def open(self, path: str, body: bytes, headers: Headers, first_byte_s: float) -> UpstreamResponse:
        """Send a request and wait for the first byte. Raise UpstreamError."""
        return await self._request("POST", path, body, headers, first_byte_s)

    async def _request(
        self, method: str, path: str, body: bytes, headers: Headers, first_byte_s: float
    ) -> UpstreamResponse:
        sent_at = self.clock()
        async with _timeout(first_byte_s):
            opened = await self.sender.send(method, path, self._headers(headers), body)
            try:
                return await self._read_first(opened, sent_at)
            except BaseException:
                opened.close()
                raise

    async def _read_first(self, opened: OpenResponse, sent_at: float) -> UpstreamResponse:
        headers, kind = [], b""
        for name, value in opened.headers:
            lowered = name.lower()
            kind = value if lowered == b"content-type" else kind
            if lowered not in _HOP_HEADERS:
                headers.append((name, value))
        stream = kind.startswith(b"text/event-stream")
        first = await opened.read_chunk()
        if stream and not first:
            raise UpstreamError("the upstream server returned an empty stream")
        while not stream and (chunk := await opened.read_chunk()):
            first += chunk
            if len(first) > MAX_BYTES:
                raise UpstreamError("the upstream server did not finish its answer")
        return UpstreamResponse(
            opened.status, headers, stream, first, sent_at, self.clock(), opened, self.bounds.silence_s
        )

    async def request_json(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a small request of the gateway itself, and return the JSON object. Raise UpstreamError."""
        body = json.dumps({**payload, **({"model": self.upstream.model} if self.upstream.model else {})}).encode()
        reply = await self.open(path, body, [(b"content-type", b"application/json")], timeout_s)
        reply.close()
        if not reply.ok:
            raise UpstreamError(f"status {reply.status}")
        try:
            value = json.loads(reply.first)
        except ValueError as error:
            raise UpstreamError("not JSON") from error
        if not isinstance(value, dict):
            raise UpstreamError("no object")
        return value

    async def models(self, headers: Headers, timeout_s: float) -> UpstreamResponse:
        """Return the list of models of the server."""
        reply = await self._request("GET", "/v1/models", b"", headers, timeout_s)
        reply.close()
        return reply

    async def skipped_frac(self, timeout_s: float) -> float | None:
        """Return the mean share of weights that a contextual model skipped, from the metrics of `niwaki serve`."""
        try:
            reply = await self._request("GET", "/metrics", b"", [], timeout_s)
        except UpstreamError:
            return None
        reply.close()
        text = reply.first[:1_000_000].decode("utf-8", "replace")
        values = dict(re.findall(r"^niwaki_skipped_frac_(sum|count)(?:\{\})? (\S+)$", text, re.M))
        count = float(values.get("count", 0))
        return float(values["sum"]) / count if count and "sum" in values else None

    async def close(self) -> None:
        """Close all connections."""
        await self.sender.close()

    def _headers(self, headers: Headers) -> Headers:
        passed = [(name, value) for name, value in headers if name.lower() not in _HOP_HEADERS]
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
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """Raise UpstreamError after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise UpstreamError("timeout") from error
