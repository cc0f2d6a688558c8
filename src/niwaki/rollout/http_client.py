"""The line to one server: bytes go out, status, headers and bytes come back. Nothing is followed, unpacked or kept.

aiohttp, because its parser is compiled: a request costs the gateway half a millisecond less than with httpx. Tests put
something else with the same two methods in its place.

    opened = await Line("http://127.0.0.1:8001", connect_s=5).send("POST", "/v1/completions", headers, body)
    while chunk := await opened.more(): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import aiohttp

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """A server that did not answer, not in time, or with an error; the message is a few words for counters and logs."""


class Opened(Protocol):
    """An answer whose head is there."""

    @property
    def status(self) -> int:
        """Of HTTP."""

    @property
    def headers(self) -> Headers:
        """As they came."""

    async def more(self) -> bytes:
        """The next bytes of the body, none at its end. Raises UpstreamError."""

    def close(self) -> None:
        """Lets the server know that nobody listens any more; a line that is through is kept for the next request."""


class Sender(Protocol):
    """What a `Server` asks through."""

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> Opened:
        """Asks, and waits for the head of the answer. Raises UpstreamError."""

    async def close(self) -> None:
        """Ends all connections."""


class Line:
    """Connections to one address, kept for a while."""

    def __init__(self, url: str, connect_s: float) -> None:
        self.url, self.connect_s = url, connect_s
        self.session: aiohttp.ClientSession | None = None

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> "_Answer":
        """Of `Sender`."""
        if self.session is None:  # it belongs to the loop that it is made in
            self.session = self._begun()
        named = [(name.decode("latin-1"), _text(value)) for name, value in headers]
        url = self.url + path
        with _reasons():
            found = await self.session.request(method, url, headers=named, data=body or None, allow_redirects=False)
        return _Answer(found)

    async def close(self) -> None:
        """Of `Sender`."""
        if self.session is not None:
            await self.session.close()

    def _begun(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # Servers close idle connections after 5 s; ours go first, so that none is closed while it is taken.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Content-Type", "User-Agent"),
            auto_decompress=False,
            trust_env=False,
        )


class _Answer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response, self.status = response, response.status
        self.headers: Headers = list(response.raw_headers)

    async def more(self) -> bytes:
        with _reasons():
            return await self.response.content.readany()

    def close(self) -> None:
        self.response.close()


def _text(value: bytes) -> str:
    """aiohttp writes UTF-8; what was not does not stay as it came."""
    return value.decode("utf-8", "replace")


@contextmanager
def _reasons() -> Iterator[None]:
    """Errors by their kind without their text, which may hold addresses."""
    try:
        yield
    except TimeoutError as error:
        raise UpstreamError("timeout") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a header that cannot be sent
        raise UpstreamError(type(error).__name__) from error
