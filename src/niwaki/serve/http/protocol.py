"""HTTP/1.1 of uvicorn with a time limit for the headers of a request.

uvicorn.Config(application, http=HttpProtocol)
"""

import asyncio
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # to send the headers of a request


class HttpProtocol(H11Protocol):
    """HTTP/1.1 connection that refuses late headers (408) and large headers (431)."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first headers."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Restart the clock with each request."""
        super().data_received(data)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        if self.late is not None:
            self.late.cancel()

    def send_400_response(self, msg: str) -> None:
        """Send 431 for large headers. uvicorn sends 400 for every error."""
        error = sys.exception()
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        self._refuse(431 if too_large else 400, msg)

    def _wait_for_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self.late is not None:
                self.late.cancel()
                self.late = None
        elif self.late is None:
            self.late = self.loop.call_later(HEADERS_S, self._refuse, 408, "The headers did not arrive in time.")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing() or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(message.encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
