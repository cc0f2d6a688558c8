"""The gateway: one request in, one answer out, from the side its key falls on; copies and audits run behind it.

- A canary that refuses, breaks or is late before its first byte is answered for by the dense model: nobody sees it, and
  it counts as an error if the dense model then answers. After the first byte nothing can be taken back: a stream that
  breaks off breaks off for the client too, and counts.
- Copies go to the canary after the answer is complete, so many at a time; what does not fit is dropped and counted.
- When a client leaves, its upstream is told at once.

    gateway = Gateway(settings, controller, stable, canary, store); app.build(gateway)
"""

import json
import random
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from niwaki.rollout import answers
from niwaki.rollout.answers import Template, UnreadError
from niwaki.rollout.auditing import Auditor
from niwaki.rollout.background import Background
from niwaki.rollout.controller import Controller
from niwaki.rollout.counters import Times
from niwaki.rollout.http_client import Headers, UpstreamError
from niwaki.rollout.routing import Ask, Route, choose, sticky_key
from niwaki.rollout.settings import Settings
from niwaki.rollout.streaming import Passing, Taken
from niwaki.rollout.upstream import Reply, Server
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.http.disconnect import CLIENT_CLOSED, DisconnectedError, run_until_disconnect
from niwaki.serve.http.keys import Keys


@dataclass
class Question:
    """A request on its way: what was sent, and what was read of it. `texts` is None if it has no single text."""

    path: str
    body: bytes
    payload: dict[str, Any]
    headers: Headers
    texts: list[dict[str, str]] | None
    route: Route


@dataclass
class Gateway:
    """Both servers and everything that is counted."""

    settings: Settings
    controller: Controller
    stable: Server
    canary: Server
    keys: Keys
    auditor: Auditor
    template: Template | None = None
    rng: random.Random = field(default_factory=random.Random)
    background: Background = field(default_factory=Background)

    async def answer(self, request: Request, path: str) -> Response:
        """One request to one of the two paths of the interface. Raises RefusalError."""
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        payload = payload_of(body)
        question = self._question(request, path, body, payload)
        try:
            return await run_until_disconnect(request.receive, self._answered(question))
        except DisconnectedError:
            return Response(status_code=CLIENT_CLOSED)
        except UpstreamError as failure:
            raise no_answer() from failure

    async def _answered(self, question: Question) -> Response:
        if question.route.side == "canary":
            failed = await self._from_canary(question)
            if not isinstance(failed, str):
                return failed
            reply = await self._opened(self.stable, question)
            if reply.good:  # otherwise it was the request
                self.controller.ledger.outcome(failed=True)
                self.controller.ledger.skip(f"answered by dense, the canary failed: {failed}")
            return self._passed_on(question, reply, "fallback")
        return self._passed_on(question, await self._opened(self.stable, question), "stable")

    async def _from_canary(self, question: Question) -> Response | str:
        """The canary's answer, or why there is none."""
        try:
            reply = await self._opened(self.canary, question)
        except UpstreamError as failure:
            return str(failure)
        if not reply.good:
            reply.close()
            return f"status {reply.status}"
        return self._passed_on(question, reply, "canary")

    async def _opened(self, server: Server, question: Question) -> Reply:
        bounds = self.settings.bounds
        first = server is self.canary and question.payload.get("stream") is True
        wait_s = bounds.canary_first_byte_s if first else bounds.answer_s
        return await server.open(question.path, server.body(question.payload, question.body), question.headers, wait_s)

    def _passed_on(self, question: Question, reply: Reply, side: str) -> Response:
        self.controller.ledger.request("important" if question.route.important else side)
        chunks = self._followed(question, reply, side)
        response = Passing(reply, chunks)
        response.raw_headers = list(reply.headers)
        if not reply.stream:
            response.raw_headers.append((b"content-length", str(len(reply.first)).encode()))
        return response

    async def _followed(self, question: Question, reply: Reply, side: str) -> AsyncIterator[bytes]:
        """Passes an answer on, and looks at it once it is over."""
        wanted = reply.good and not question.route.important and self.controller.active
        copy = wanted and (side == "canary" or self._drawn(self.settings.sampling.shadow_frac))
        taken = Taken(keep=copy and side == "canary" and self._drawn(self.settings.sampling.audit_frac))
        try:
            async for chunk in reply.chunks():
                taken.add(chunk)
                yield chunk
        except UpstreamError:
            if side == "canary":
                self.controller.ledger.outcome(failed=True)
            raise
        finally:
            reply.close()
        if not wanted:
            return
        times = taken.times(reply, self.stable.clock())
        ended = taken.ended(reply)
        if side == "canary":
            self.controller.ledger.outcome(failed=not ended)
        if side in ("stable", "canary") and ended:
            self.controller.ledger.timed(side, times)
        if side == "canary" and taken.keep and ended:
            self._audit(question, taken, reply.stream, "served")
        elif side == "stable" and copy and ended:
            self._submit("shadow", self.settings.sampling.max_shadows, self._shadow(question, times))

    async def _shadow(self, question: Question, stable_times: Times) -> None:
        """The same request once more, to the canary; nobody waits for it."""
        ledger, taken = self.controller.ledger, Taken(keep=self._drawn(self.settings.sampling.audit_frac))
        try:
            reply = await self._opened(self.canary, question)
            try:
                async for chunk in reply.chunks():
                    taken.add(chunk)
            finally:
                reply.close()
        except UpstreamError:
            ledger.outcome(failed=True)
            return
        ledger.request("shadow")
        times = taken.times(reply, self.canary.clock())
        failed = not reply.good or not taken.ended(reply)
        ledger.outcome(failed=failed)
        if not failed and times.stream == stable_times.stream:
            ledger.pair(stable_times, times)
        if not failed and taken.keep:
            self._audit(question, taken, reply.stream, "shadow")

    def _audit(self, question: Question, taken: Taken, stream: bool, how: str) -> None:
        try:
            if question.texts is None or taken.overlong:
                raise UnreadError("too long" if taken.overlong else "a request without one text")
            answer = answers.answer_text(taken.kept, stream=stream)
        except UnreadError as unread:
            self.controller.ledger.skip(f"not audited: {unread}")
            return
        prompt = answers.prompt_text(question.path, question.texts, self.template)
        model = str(question.payload.get("model", ""))
        work = self.auditor.audit(self.controller, model, prompt, answer, how)
        self._submit("audit", self.settings.sampling.max_audits, work)

    def _submit(self, kind: str, most: int, work: Coroutine[Any, Any, None]) -> None:
        if not self.background.submit(kind, most, work):
            self.controller.ledger.skip(f"{kind} dropped: {most} were running")

    def _drawn(self, share: float) -> bool:
        return self.rng.random() < share

    def _question(self, request: Request, path: str, body: bytes, payload: dict[str, Any]) -> Question:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            texts = answers.texts_of(path, payload)
        except UnreadError:
            texts = None
        first = answers.first_text(texts) if texts else body.decode("utf-8", "replace")
        prompt = "\n".join(text["content"] for text in texts) if texts else body.decode("utf-8", "replace")
        key = sticky_key(payload, headers, self.settings.key_header, first)
        ask = Ask(str(payload.get("model", "")), prompt, headers, key)
        route = choose(ask, share=self.controller.share, salt=self.controller.salt, important=self.settings.important)
        passed: Headers = request.headers.raw
        if self.keys:  # a key of this gateway is nobody else's business
            passed = [(name, value) for name, value in passed if name.lower() != b"authorization"]
        return Question(path, body, payload, passed, texts, route)


def payload_of(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, or RefusalError."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, "expected a body of JSON") from error
    if not isinstance(found, dict):
        raise RefusalError(400, "expected a JSON object")
    return found


def no_answer() -> RefusalError:
    """What a client hears when neither side has an answer; which servers there are is not its business."""
    return RefusalError(502, "the model does not answer", kind="upstream_error")
