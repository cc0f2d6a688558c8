"""Answer that streams through the gateway, and the recorder of what an audit needs of it.

recorder = AnswerRecorder(keep=True); recorder.add(chunk); recorder.times(response, now)
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from niwaki.rollout.answers import completion_tokens
from niwaki.rollout.counters import AnswerTimes
from niwaki.rollout.upstream import UpstreamResponse

MAX_RECORDED = 1_000_000  # bytes of an answer that is kept for an audit


@dataclass
class AnswerRecorder:
    """Recorder of an answer: number of events, its last bytes, and all its bytes if `keep` is set."""

    keep: bool
    kept: bytes = b""
    events: int = 0
    tail: bytes = b""
    overlong: bool = False

    def add(self, chunk: bytes) -> None:
        """Record a chunk."""
        self.events += chunk.count(b"data:")
        self.tail = (self.tail + chunk)[-64:]
        if self.keep and len(self.kept) + len(chunk) <= MAX_RECORDED:
            self.kept += chunk
        elif self.keep:
            self.overlong = True

    def complete(self, reply: UpstreamResponse) -> bool:
        """Check that the answer is complete. A stream ends with a marker."""
        return not reply.stream or b"[DONE]" in self.tail

    def times(self, reply: UpstreamResponse, now: float) -> AnswerTimes:
        """Return the times of the answer. An event of a stream counts as a token."""
        if not reply.stream:
            tokens = completion_tokens(reply.first)
            whole = reply.first_byte_at - reply.sent_at
            return AnswerTimes(False, whole, None, whole / tokens if tokens else None)
        whole, tokens = (
            now - reply.sent_at,
            self.events - 2,
        )  # without the first, which has its own time, and the last, [DONE]
        token_s = (now - reply.first_byte_at) / tokens if tokens > 0 else None
        return AnswerTimes(True, whole, reply.first_byte_at - reply.sent_at, token_s)


class ForwardedResponse(StreamingResponse):
    """Response that closes its upstream at the end, also if no client reads it.

    A whole answer arrived already, so it needs no check that its client disconnects.
    """

    def __init__(self, reply: UpstreamResponse, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, reply.status)
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.reply.stream:
                await super().__call__(scope, receive, send)
            else:
                await self.stream_response(send)
        finally:
            self.reply.close()
