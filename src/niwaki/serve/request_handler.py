"""One request on its way: events become an answer, whole or piece by piece, until its client hangs up.

Nothing goes out before the first token, so that a queue that is full or a prompt that takes too long still is a status
of HTTP; what goes wrong in a stream after that is its last event.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from niwaki.serve.answers import Answer
from niwaki.serve.engine import Engine
from niwaki.serve.event_queue import Inbox
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.jobs import Event, Finished, Job, Read, Started, Wrote
from niwaki.serve.request_metrics import OUTCOME_OF
from niwaki.serve.response_models import Reply, Usage
from niwaki.serve.sampling import Scored

CLOSED = 499  # the status of a request whose client hung up: seen by nobody
DONE = b"data: [DONE]\n\n"
log = logging.getLogger("niwaki.serve")
T = TypeVar("T")


class GoneError(Exception):
    """The client hung up."""


class Exchange:
    """A submitted job and who waits for it."""

    def __init__(self, engine: Engine, request: Request, job: Job, inbox: Inbox, answer: Answer) -> None:
        self.engine, self.request, self.job, self.inbox, self.answer = engine, request, job, inbox, answer
        self.written = 0

    async def whole(self) -> Response:
        """The answer when it is complete."""
        try:
            reply = await self._unless_gone(self._collected())
        except GoneError:
            return self._left()
        finally:
            self.engine.cancel(self.job)
        self._ended("answered")
        return Response(reply.model_dump_json(), media_type="application/json")

    async def stream(self, *, usage: bool) -> Response:
        """The answer as server-sent events. Raises RefusalError if it ends before its first token."""
        events = self.inbox.events()
        try:
            first = await self._unless_gone(_first(events))
        except GoneError:
            self.engine.cancel(self.job)
            return self._left()
        except BaseException:
            self.engine.cancel(self.job)
            raise
        return _Stream(self, self._lines(first, events, usage))

    async def _collected(self) -> Reply:
        text: list[str] = []
        scored: list[Scored] = []
        reason = ""
        async for event in self.inbox.events():
            if isinstance(event, Read):
                scored += event.scored
            elif isinstance(event, Wrote):
                text.append(event.text)
                scored += _scored(event)
            elif isinstance(event, Finished):
                reason, self.written = event.reason, event.tokens
        return self.answer.whole("".join(text), scored, reason, self._usage())

    async def _lines(self, first: Read, events: AsyncIterator[Event], usage: bool) -> AsyncIterator[bytes]:
        outcome = "cancelled"
        try:
            if (opening := self.answer.opening(first.scored)) is not None:
                yield _line(opening)
            async for event in events:
                if isinstance(event, Wrote) and (event.text or event.scored is not None):
                    yield _line(self.answer.piece(event.text, _scored(event)))
                elif isinstance(event, Finished):
                    self.written = event.tokens
                    yield _line(self.answer.closing(event.reason))
            if usage:
                yield _line(self.answer.counts(self._usage()))
            outcome = "answered"
            yield DONE
        except RefusalError as refused:
            outcome = OUTCOME_OF.get(refused.status, "failed")
            yield b"data: " + json.dumps(refused.body).encode() + b"\n\n"
        finally:
            self._ended(outcome)

    async def _unless_gone(self, work: Awaitable[T]) -> T:
        """The result, unless the client hangs up before it is there."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise GoneError
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _usage(self) -> Usage:
        return Usage.of(len(self.job.ids), self.written)

    def _left(self) -> Response:
        self._ended("cancelled")
        return Response(status_code=CLOSED)

    def _ended(self, outcome: str) -> None:
        """For whoever counts, and a line without what was said."""
        self.request.scope.setdefault("state", {})["outcome"] = outcome
        seconds = time.monotonic() - self.job.submitted
        path = self.request.scope["path"]
        log.info("%s %s: %d + %d tokens, %.2f s", path, outcome, len(self.job.ids), self.written, seconds)


class _Stream(StreamingResponse):
    """Takes the job with it, however it ends."""

    def __init__(self, exchange: Exchange, lines: AsyncIterator[bytes]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.engine.cancel(self.exchange.job)


async def _first(events: AsyncIterator[Event]) -> Read:
    """The event that says that the prompt was read."""
    async for event in events:
        if isinstance(event, Read):
            return event
        assert isinstance(event, Started), f"{event} before the prompt was read"
    raise AssertionError("a job ended without an event that says so")


def _scored(event: Wrote) -> list[Scored]:
    return [] if event.scored is None else [event.scored]


def _line(reply: Reply) -> bytes:
    return b"data: " + reply.model_dump_json().encode() + b"\n\n"
