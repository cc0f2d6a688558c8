"""HTTP client of one server. It follows no redirect, decompresses nothing and keeps no cookie.

It uses aiohttp, whose parser is compiled: a request takes half a millisecond less than with httpx. Tests use another
`HttpSender`.

    response = await HttpClient("http://127.0.0.1:8001", connect_s=5).send("POST", "/v1/completions", headers, body)
    while chunk := await response.read_chunk(): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import aiohttp

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """Error of a server that is late, broken or gone. The message is a few words for counters and logs."""


class OpenResponse(Protocol):
    """Response whose status and headers arrived."""

    @property
    def status(self) -> int:
        """Return the HTTP status."""

    @property
    def headers(self) -> Headers:
        """Return the headers in their order."""

    async def read_chunk(self) -> bytes:
        """Return the next bytes of the body, empty at its end. Raise UpstreamError if it breaks off."""

    def close(self) -> None:
        """End the response. Its connection is kept for the next request if the body is complete."""


class HttpSender(Protocol):
    """Interface of a client that sends one request."""

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> OpenResponse:
        """Send a request and wait for status and headers. Raise UpstreamError."""

    async def close(self) -> None:
        """Close all connections."""


class HttpClient:
    """Connection pool of one address, on aiohttp."""

    def __init__(self, url: str, connect_s: float) -> None:
        self.url, self.connect_s = url, connect_s
        self.session: aiohttp.ClientSession | None = None

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> "_AiohttpResponse":
        """Send a request and wait for status and headers. Raise UpstreamError."""
        if self.session is None:  # a session belongs to the loop that creates it
            self.session = self._new_session()
        named = [(name.decode("latin-1"), _text(value)) for name, value in headers]
        url = self.url + path
        with _upstream_errors():
            response = await self.session.request(method, url, headers=named, data=body or None, allow_redirects=False)
        return _AiohttpResponse(response)

    async def close(self) -> None:
        """Close all connections."""
        if self.session is not None:
            await self.session.close()

    def _new_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # Servers close idle connections after 5 s. This client closes them first, before the next request.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Content-Type", "User-Agent"),
            auto_decompress=False,
            trust_env=False,
        )


class _AiohttpResponse:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response, self.status = response, response.status
        self.headers: Headers = list(response.raw_headers)

    async def read_chunk(self) -> bytes:
        with _upstream_errors():
            return await self.response.content.readany()

    def close(self) -> None:
        self.response.close()


def _text(value: bytes) -> str:
    """Return a header as text. aiohttp sends UTF-8, so other bytes change."""
    return value.decode("utf-8", "replace")


@contextmanager
def _upstream_errors() -> Iterator[None]:
    """Raise UpstreamError with the kind of an error. Its text may hold addresses."""
    try:
        yield
    except TimeoutError as error:
        raise UpstreamError("timeout") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a header that cannot be sent
        raise UpstreamError(type(error).__name__) from error
