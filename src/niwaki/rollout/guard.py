"""What a request has to be before it is looked at: from somebody with a key, small enough, JSON, not too slow.

Nothing of a request is logged. Refusals have the form of the OpenAI interface and name no upstream.

    guard = Guard(Keys(["secret"]), Bounds()); guard.allows(headers)
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from niwaki.keys import Keys
from niwaki.rollout.settings import Bounds

HEADER_BYTES = 32_768  # of a request's head; ours are far smaller


class RefusedError(Exception):
    """A request that goes nowhere: status and a line for who sent it."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class Guard:
    """The keys that are accepted (none: everybody is) and the bounds of a body."""

    def __init__(self, keys: Keys, bounds: Bounds) -> None:
        self.keys, self.bounds = keys, bounds

    def allows(self, headers: Mapping[str, str]) -> bool:
        """Whether a request carries a key."""
        return self.keys.accept(headers.get("authorization", ""))

    def check_head(self, request: Request) -> None:
        """Raises RefusedError for a head that is too long; the server itself stops reading somewhat later."""
        if sum(len(name) + len(value) for name, value in request.headers.raw) > HEADER_BYTES:
            raise RefusedError(431, f"expected headers of at most {HEADER_BYTES} bytes")

    async def body(self, request: Request) -> bytes:
        """The body, or RefusedError."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "expected a body without Content-Encoding")
        length = request.headers.get("content-length", "0")
        most = self.bounds.body_bytes
        if not length.isascii() or not length.isdigit() or int(length[:20]) > most:
            raise RefusedError(413, f"expected a body of at most {most} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.bounds.body_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise RefusedError(413, f"expected a body of at most {most} bytes")
        except TimeoutError as error:
            raise RefusedError(408, f"the body did not come within {self.bounds.body_s:g} s") from error
        except ClientDisconnect as error:
            raise RefusedError(400, "the client left") from error
        return bytes(body)


def payload_of(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, or RefusedError."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "expected a body of JSON") from error
    if not isinstance(found, dict):
        raise RefusedError(400, "expected a JSON object")
    return found


def refusal(status: int, said: str) -> JSONResponse:
    """An error as clients of the interface expect it."""
    kind = {401: "authentication_error", 502: "upstream_error"}.get(status, "invalid_request_error")
    headers = {"WWW-Authenticate": 'Basic realm="niwaki rollout", charset="UTF-8"'} if status == 401 else {}
    return JSONResponse({"error": {"message": said, "type": kind, "code": status}}, status, headers)
