"""One request: the events of its job become an answer, whole or as a stream, until the client disconnects.

No byte is sent before the first token. Thus a full queue or a slow prompt is still an HTTP status. An error in a
stream after that is its last event.
"""

import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from niwaki.serve.answers import Answer
from niwaki.serve.engine import Engine
from niwaki.serve.event_queue import EventQueue
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.http.disconnect import CLIENT_CLOSED, DisconnectedError, run_until_disconnect
from niwaki.serve.jobs import Decoded, Event, Finished, Job, Prefilled, Started
from niwaki.serve.request_metrics import OUTCOME_OF
from niwaki.serve.response_models import GenerationResponse, Usage
from niwaki.serve.sampling import TokenScore

DONE = b"data: [DONE]\n\n"
log = logging.getLogger("niwaki.serve")


class RequestHandler:
    """A submitted job, its events and the request that waits for it."""

    def __init__(self, engine: Engine, request: Request, job: Job, events: EventQueue, answer: Answer) -> None:
        self.engine, self.request, self.job, self.events, self.answer = engine, request, job, events, answer
        self.generated = 0

    async def whole(self) -> Response:
        """Return the complete answer."""
        try:
            reply = await run_until_disconnect(self.request.receive, self._collect())
        except DisconnectedError:
            return self._client_closed()
        finally:
            self.engine.cancel(self.job)
        self._log_end("answered")
        return Response(reply.model_dump_json(), media_type="application/json")

    async def stream(self, *, usage: bool) -> Response:
        """Return the answer as server-sent events. Raise RefusalError if the job ends before its first token."""
        events = self.events.receive()
        try:
            first = await run_until_disconnect(self.request.receive, _prefilled(events))
        except DisconnectedError:
            self.engine.cancel(self.job)
            return self._client_closed()
        except BaseException:
            self.engine.cancel(self.job)
            raise
        return _Stream(self, self._lines(first, events, usage))

    async def _collect(self) -> GenerationResponse:
        text: list[str] = []
        scored: list[TokenScore] = []
        reason = ""
        async for event in self.events.receive():
            if isinstance(event, Prefilled):
                scored += event.scored
            elif isinstance(event, Decoded):
                text.append(event.text)
                scored += _scores(event)
            elif isinstance(event, Finished):
                reason, self.generated = event.reason, event.tokens
        return self.answer.whole("".join(text), scored, reason, self._usage())

    async def _lines(self, first: Prefilled, events: AsyncIterator[Event], usage: bool) -> AsyncIterator[bytes]:
        outcome = "cancelled"
        try:
            if (opening := self.answer.opening(first.scored)) is not None:
                yield _line(opening)
            async for event in events:
                if isinstance(event, Decoded) and (event.text or event.scored is not None):
                    yield _line(self.answer.chunk(event.text, _scores(event)))
                elif isinstance(event, Finished):
                    self.generated = event.tokens
                    yield _line(self.answer.closing(event.reason))
            if usage:
                yield _line(self.answer.counts(self._usage()))
            outcome = "answered"
            yield DONE
        except RefusalError as refused:
            outcome = OUTCOME_OF.get(refused.status, "failed")
            yield b"data: " + json.dumps(refused.body).encode() + b"\n\n"
        finally:
            self._log_end(outcome)

    def _usage(self) -> Usage:
        return Usage.of(len(self.job.ids), self.generated)

    def _client_closed(self) -> Response:
        self._log_end("cancelled")
        return Response(status_code=CLIENT_CLOSED)

    def _log_end(self, outcome: str) -> None:
        """Store the outcome for RequestMetricsMiddleware, and log a line without any text of the request."""
        self.request.scope.setdefault("state", {})["outcome"] = outcome
        seconds = time.monotonic() - self.job.submitted
        path = self.request.scope["path"]
        log.info("%s %s: %d + %d tokens, %.2f s", path, outcome, len(self.job.ids), self.generated, seconds)


class _Stream(StreamingResponse):
    """Response that cancels the job when it ends, for any reason."""

    def __init__(self, handler: RequestHandler, lines: AsyncIterator[bytes]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.handler = handler

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.handler.engine.cancel(self.handler.job)


async def _prefilled(events: AsyncIterator[Event]) -> Prefilled:
    """Return the event of the complete prefill."""
    async for event in events:
        if isinstance(event, Prefilled):
            return event
        assert isinstance(event, Started), f"{event} before the prompt was read"
    raise AssertionError("a job ended without a last event")


def _scores(event: Decoded) -> list[TokenScore]:
    return [] if event.scored is None else [event.scored]


def _line(reply: GenerationResponse) -> bytes:
    return b"data: " + reply.model_dump_json().encode() + b"\n\n"
