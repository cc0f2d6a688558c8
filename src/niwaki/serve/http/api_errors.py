"""What a client is told when it does not get an answer, in the shape that OpenAI's clients expect.

raise RefusalError(429, "the queue is full", kind="rate_limit_error", retry_s=3)
"""

from typing import Any

INVALID, OVERLOADED, INTERNAL = "invalid_request_error", "overloaded_error", "server_error"


class RefusalError(Exception):
    """A request that ends without an answer: HTTP status, one clear line, and what it was about."""

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
        self.closes = closes or status in (408, 413)  # the rest of the body is not waited for

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that goes out."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it: when to try again."""
        found = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        if self.closes:
            found["Connection"] = "close"
        return found


def too_late(what: str, limit_s: float) -> RefusalError:
    """A time limit that passed."""
    return RefusalError(504, f"{what} took longer than {limit_s:g} s", kind="timeout_error", code="timeout")


def draining() -> RefusalError:
    """The server is on its way out."""
    return RefusalError(503, "the server is shutting down: send this to another one", kind=OVERLOADED, retry_s=1)
