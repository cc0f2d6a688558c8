"""HTTP/1.1 of uvicorn with limits: the time for the headers of a request, and the number of connections.

What is refused here never reaches the application, so it is counted here: `REFUSALS` are the reasons.

uvicorn.Config(application, http=limited_protocol(ConnectionLimits(), metrics.count_refusal))
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from niwaki.errors import InputError
from niwaki.serve.http.api_errors import INVALID, OVERLOADED, RefusalError

HEADERS_S = 10.0  # to send the headers of a request
LINGER_S = 1.0  # for a client to read why it is refused. A socket that closes on unread bytes drops the answer
MAX_LINGERING = 64  # connections that wait for that. More are closed at once
REFUSALS = ("connections", "late", "malformed", "large")
_STATUS = {"connections": 503, "late": 408, "malformed": 400, "large": 431}


@dataclass(frozen=True)
class ConnectionLimits:
    """Max open connections: all together, and those of one address."""

    total: int = 1000
    per_address: int = 1000

    def check(self) -> None:
        """Raise InputError for a limit that lets no client in."""
        if min(self.total, self.per_address) < 1:
            raise InputError(f"expected at least 1 connection, got {min(self.total, self.per_address)}")


@dataclass
class _Open:
    """Connections of one server."""

    total: int = 0
    lingering: int = 0
    addresses: Counter[str] = field(default_factory=Counter)


class HttpProtocol(H11Protocol):
    """HTTP/1.1 connection that refuses late headers (408), large headers (431) and connections over a limit (503)."""

    limits: ConnectionLimits | None = None
    open: _Open = _Open()
    count_refusal: Callable[[str], None] | None = None
    late: asyncio.TimerHandle | None = None
    lingering: asyncio.TimerHandle | None = None
    address = ""
    counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first headers, or refuse the connection."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        limits = self.limits
        if limits is not None:
            if self.open.total >= limits.total:
                self._refuse("connections", f"{limits.total} connections are open: try again later")
                return
            if self.open.addresses[self.address] >= limits.per_address:
                self._refuse("connections", f"{limits.per_address} connections of this address are open: close some")
                return
        self.counted = True
        self.open.total += 1
        self.open.addresses[self.address] += 1
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Restart the clock with each request. Drop what follows a refusal."""
        if self.lingering is None:
            super().data_received(data)
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and make room for another connection."""
        super().connection_lost(exc)
        if self.late is not None:
            self.late.cancel()
        if self.lingering is not None:
            self.lingering.cancel()
            self.open.lingering -= 1
        if self.counted:
            self.open.total -= 1
            self.open.addresses[self.address] -= 1
            if not self.open.addresses[self.address]:
                del self.open.addresses[self.address]

    def send_400_response(self, msg: str) -> None:
        """Send 431 for large headers. uvicorn sends 400 for every error."""
        error = sys.exception()
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        self._refuse("large" if too_large else "malformed", msg)

    def _wait_for_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.lingering is not None:
            if self.late is not None:
                self.late.cancel()
                self.late = None
        elif self.late is None:
            self.late = self.loop.call_later(HEADERS_S, self._refuse, "late", "The headers did not arrive in time.")

    def _refuse(self, reason: str, message: str) -> None:
        """Answer with the status of a reason, then close. The application sees a client that disconnected."""
        if self.transport.is_closing() or self.lingering is not None:
            return
        if self.count_refusal is not None:
            self.count_refusal(reason)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope["state"]["outcome"] = "invalid"
            self.cycle.disconnected = True  # it must not answer too
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.open.lingering >= MAX_LINGERING:
            self.transport.close()
            return
        overloaded = reason == "connections"
        kind, retry_s = (OVERLOADED, 1) if overloaded else (INVALID, None)
        refusal = RefusalError(_STATUS[reason], message, kind=kind, retry_s=retry_s, closes=True)
        body = json.dumps(refusal.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | refusal.headers
        bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        events = [h11.Response(status_code=refusal.status, headers=list(headers.items())), h11.EndOfMessage()]
        events[1:1] = [] if bodiless else [h11.Data(body)]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.open.lingering += 1
        self.lingering = self.loop.call_later(LINGER_S, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()


def limited_protocol(limits: ConnectionLimits, count_refusal: Callable[[str], None]) -> type[HttpProtocol]:
    """Return the protocol of one server, which has its own limits and counts its refusals."""
    members = {"limits": limits, "open": _Open(), "count_refusal": staticmethod(count_refusal)}
    return type("LimitedHttpProtocol", (HttpProtocol,), members)
