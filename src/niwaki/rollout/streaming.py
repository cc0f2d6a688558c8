"""An answer on its way through: what is kept of it, and what happens when nobody waits for it any more.

taken = Taken(keep=True); taken.add(chunk); taken.times(reply, now)
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from niwaki.rollout.answers import tokens_of
from niwaki.rollout.counters import Times
from niwaki.rollout.upstream import Reply

MAX_COPIED = 1_000_000  # bytes of an answer that are kept to be audited


@dataclass
class Taken:
    """What is kept of an answer that passes by: how many tokens, whether it ended, its bytes if it is to be audited."""

    keep: bool
    kept: bytes = b""
    events: int = 0
    tail: bytes = b""
    overlong: bool = False

    def add(self, chunk: bytes) -> None:
        """One more chunk."""
        self.events += chunk.count(b"data:")
        self.tail = (self.tail + chunk)[-64:]
        if self.keep and len(self.kept) + len(chunk) <= MAX_COPIED:
            self.kept += chunk
        elif self.keep:
            self.overlong = True

    def ended(self, reply: Reply) -> bool:
        """Whether nothing is missing: a stream says so itself."""
        return not reply.stream or b"[DONE]" in self.tail

    def times(self, reply: Reply, now: float) -> Times:
        """How long it took; an event of a stream counts as a token."""
        if not reply.stream:
            tokens = tokens_of(reply.first)
            whole = reply.begun - reply.asked
            return Times(False, whole, None, whole / tokens if tokens else None)
        whole, tokens = now - reply.asked, self.events - 2  # the first has its own time, the last is [DONE]
        written = (now - reply.begun) / tokens if tokens > 0 else None
        return Times(True, whole, reply.begun - reply.asked, written)


class Passing(StreamingResponse):
    """An answer that closes its upstream also when nobody began to read it.

    A whole answer is there already: nobody has to watch whether its client leaves.
    """

    def __init__(self, reply: Reply, chunks: AsyncIterator[bytes]) -> None:
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
