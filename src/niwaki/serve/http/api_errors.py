"""Errors of the API, in the format that OpenAI clients expect.

raise RefusalError(429, "the queue is full", kind="rate_limit_error", retry_s=3)
"""

from typing import Any

INVALID, OVERLOADED, INTERNAL = "invalid_request_error", "overloaded_error", "server_error"


class RefusalError(Exception):
    """Refusal of a request: HTTP status, one clear line, and the parameter that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_s = retry_s
        self.closes = closes or status in (408, 413)  # the rest of the body is not read

    @property
    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        headers = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        if self.closes:
            headers["Connection"] = "close"
        return headers


def timed_out(part: str, limit_s: float) -> RefusalError:
    """Return the refusal of a request whose part took longer than its limit."""
    return RefusalError(504, f"{part} took longer than {limit_s:g} s", kind="timeout_error", code="timeout")


def draining() -> RefusalError:
    """Return the refusal of a server that shuts down."""
    return RefusalError(503, "the server is shutting down: send this to another one", kind=OVERLOADED, retry_s=1)
