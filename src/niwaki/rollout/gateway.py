"""Gateway: one request in, one answer out, from the side of its key. Copies and audits run in the background.

- If the canary refuses, breaks or is late before its first byte, the dense model answers. The client does not notice.
  It counts as an error if the dense model then answers. A stream that breaks off after the first byte also breaks off
  for the client, and counts.
- Copies go to the canary after the answer is complete. Only a limited number runs at once; others are dropped and
  counted.
- When a client disconnects, its upstream is told at once.
- Rules of important requests run in a thread. What they have not decided within `ROUTE_S` goes to dense.

    gateway = Gateway(settings, controller, stable, canary, keys, auditor); app.build(gateway)
"""

import asyncio
import json
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from niwaki.rollout import answers
from niwaki.rollout.answers import UnreadableError
from niwaki.rollout.auditing import Auditor, Background
from niwaki.rollout.chat_template import ChatTemplate
from niwaki.rollout.controller import Controller
from niwaki.rollout.counters import AnswerTimes
from niwaki.rollout.http_client import Headers, UpstreamError
from niwaki.rollout.routing import UNDECIDED, Route, RoutedRequest, choose, sticky_key
from niwaki.rollout.settings import RolloutSettings
from niwaki.rollout.streaming import AnswerRecorder, ForwardedResponse
from niwaki.rollout.upstream import UpstreamResponse, UpstreamServer
from niwaki.serve.http.api_errors import RefusalError
from niwaki.serve.http.disconnect import CLIENT_CLOSED, DisconnectedError, run_until_disconnect
from niwaki.serve.http.keys import Keys

CLOSE_S = 5.0  # for the last writes to the state
ROUTE_S = 1.0  # for the rules of one request, which may wait for those of others
ROUTE_THREADS = 2
log = logging.getLogger("niwaki.rollout")


@dataclass
class GatewayRequest:
    """Request with its parsed body and its route. `texts` is None if it has no single text."""

    path: str
    body: bytes
    payload: dict[str, Any]
    headers: Headers
    texts: list[dict[str, str]] | None
    route: Route


@dataclass
class Gateway:
    """Both servers, the controller of the roll-out and the work in the background."""

    settings: RolloutSettings
    controller: Controller
    stable: UpstreamServer
    canary: UpstreamServer
    keys: Keys
    auditor: Auditor
    template: ChatTemplate | None = None
    rng: random.Random = field(default_factory=random.Random)
    background: Background = field(default_factory=Background)
    refusals: Counter[str] = field(default_factory=Counter)
    rules: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, ROUTE_THREADS, "niwaki-rules"))

    def count_refusal(self, reason: str) -> None:
        """Count a connection that the protocol refused, by one of its REFUSALS."""
        self.refusals[reason] += 1

    async def answer(self, request: Request, path: str) -> Response:
        """Answer a request to one of the two paths of the interface. Raise RefusalError."""
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        question = await self._question(request, path, body, parse_payload(body))
        try:
            return await run_until_disconnect(request.receive, self._respond(question))
        except DisconnectedError:
            return Response(status_code=CLIENT_CLOSED)
        except UpstreamError as failure:
            raise no_answer() from failure

    async def _respond(self, question: GatewayRequest) -> Response:
        if question.route.side == "canary":
            failed = await self._from_canary(question)
            if not isinstance(failed, str):
                return failed
            reply = await self._open(self.stable, question)
            if reply.ok:  # else the request itself is wrong
                self.controller.counters.count_outcome(failed=True)
                self.controller.counters.count_skipped(f"answered by dense, the canary failed: {failed}")
            return self._forward(question, reply, "fallback")
        return self._forward(question, await self._open(self.stable, question), "stable")

    async def _from_canary(self, question: GatewayRequest) -> Response | str:
        """Return the answer of the canary, or the reason why there is none."""
        try:
            reply = await self._open(self.canary, question)
        except UpstreamError as failure:
            return str(failure)
        if not reply.ok:
            reply.close()
            return f"status {reply.status}"
        return self._forward(question, reply, "canary")

    async def _open(self, server: UpstreamServer, question: GatewayRequest) -> UpstreamResponse:
        bounds = self.settings.bounds
        first = server is self.canary and question.payload.get("stream") is True
        wait_s = bounds.canary_first_byte_s if first else bounds.answer_s
        return await server.open(question.path, server.body(question.payload, question.body), question.headers, wait_s)

    def _forward(self, question: GatewayRequest, reply: UpstreamResponse, side: str) -> Response:
        self.controller.counters.count_request("important" if question.route.important else side)
        chunks = self._record(question, reply, side)
        response = ForwardedResponse(reply, chunks)
        response.raw_headers = list(reply.headers)
        if not reply.stream:
            response.raw_headers.append((b"content-length", str(len(reply.first)).encode()))
        return response

    async def _record(self, question: GatewayRequest, reply: UpstreamResponse, side: str) -> AsyncIterator[bytes]:
        """Yield the chunks of an answer. At its end count it, and start its audit or its copy."""
        counted = reply.ok and not question.route.important and self.controller.active
        copy = counted and (side == "canary" or self._draw(self.settings.sampling.shadow_frac))
        recorder = AnswerRecorder(keep=copy and side == "canary" and self._draw(self.settings.sampling.audit_frac))
        try:
            async for chunk in reply.chunks():
                recorder.add(chunk)
                yield chunk
        except UpstreamError:
            if side == "canary":
                self.controller.counters.count_outcome(failed=True)
            raise
        finally:
            reply.close()
        if not counted:
            return
        times = recorder.times(reply, self.stable.clock())
        complete = recorder.complete(reply)
        if side == "canary":
            self.controller.counters.count_outcome(failed=not complete)
        if side in ("stable", "canary") and complete:
            self.controller.counters.add_times(side, times)
        if side == "canary" and recorder.keep and complete:
            self._audit(question, recorder, reply.stream, "served")
        elif side == "stable" and copy and complete:
            work = partial(self._shadow, question, times)
            self._submit("shadow", self.settings.sampling.max_shadows, work)

    async def _shadow(self, question: GatewayRequest, stable_times: AnswerTimes) -> None:
        """Send a copy of a request to the canary. No client waits for its answer."""
        counters, recorder = (
            self.controller.counters,
            AnswerRecorder(keep=self._draw(self.settings.sampling.audit_frac)),
        )
        try:
            reply = await self._open(self.canary, question)
            try:
                async for chunk in reply.chunks():
                    recorder.add(chunk)
            finally:
                reply.close()
        except UpstreamError:
            counters.count_outcome(failed=True)
            return
        counters.count_request("shadow")
        times = recorder.times(reply, self.canary.clock())
        failed = not reply.ok or not recorder.complete(reply)
        counters.count_outcome(failed=failed)
        if not failed and times.stream == stable_times.stream:
            counters.add_pair(stable_times, times)
        if not failed and recorder.keep:
            self._audit(question, recorder, reply.stream, "shadow")

    def _audit(self, question: GatewayRequest, recorder: AnswerRecorder, stream: bool, how: str) -> None:
        try:
            if question.texts is None or recorder.overlong:
                raise UnreadableError("too long" if recorder.overlong else "a request without one text")
            answer = answers.answer_text(recorder.kept, stream=stream)
        except UnreadableError as unread:
            self.controller.counters.count_skipped(f"not audited: {unread}")
            return
        work = partial(self._audit_text, question, question.texts, answer, how)
        self._submit("audit", self.settings.sampling.max_audits, work)

    async def _audit_text(self, question: GatewayRequest, texts: list[dict[str, str]], answer: str, how: str) -> None:
        """Run the audit of an answer. The chat template renders its dialogue in another process."""
        rendered = question.path == answers.CHAT and self.template is not None
        try:
            if rendered and self.template is not None:
                prompt = await self.template.render(texts)
            else:
                prompt = answers.transcript(question.path, texts)
        except UnreadableError as unread:
            self.controller.counters.count_skipped(f"not audited: {unread}")
            return
        model = str(question.payload.get("model", ""))
        await self.auditor.audit(self.controller, model, prompt, answer, how, rendered=rendered)

    def _submit(self, kind: str, limit: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if not self.background.submit(kind, limit, work):
            self.controller.counters.count_skipped(f"{kind} dropped: {limit} were running")

    async def close(self) -> None:
        """End the work in the background, all connections and the chat template, and write what is not stored yet."""
        await self.background.stop()
        await self.stable.close()
        await self.canary.close()
        if self.template is not None:
            self.template.close()
        self.rules.shutdown(wait=False, cancel_futures=True)
        if not await asyncio.to_thread(self.controller.journal.flush, CLOSE_S):
            log.error("%d writes to the roll-out state are lost", self.controller.journal.kept)

    def _draw(self, share: float) -> bool:
        """Return True with a probability of `share`."""
        return self.rng.random() < share

    async def _question(self, request: Request, path: str, body: bytes, payload: dict[str, Any]) -> GatewayRequest:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            texts = answers.request_texts(path, payload)
        except UnreadableError:
            texts = None
        first = answers.first_text(texts) if texts else body.decode("utf-8", "replace")
        prompt = "\n".join(text["content"] for text in texts) if texts else body.decode("utf-8", "replace")
        key = sticky_key(payload, headers, self.settings.key_header, first)
        routed = RoutedRequest(str(payload.get("model", "")), prompt, headers, key)
        route = await self._route(routed)
        passed: Headers = request.headers.raw
        if self.keys:  # an upstream must not get a key of this gateway
            passed = [(name, value) for name, value in passed if name.lower() != b"authorization"]
        return GatewayRequest(path, body, payload, passed, texts, route)

    async def _route(self, routed: RoutedRequest) -> Route:
        """Return the route of a request. Rules with patterns run in a thread, and never hold up other requests."""
        state = self.controller
        work = partial(choose, routed, share=state.share, salt=state.salt, important=self.settings.important)
        if not self.settings.important:
            return work()
        deciding = asyncio.get_running_loop().run_in_executor(self.rules, work)
        try:
            route = await asyncio.wait_for(deciding, ROUTE_S)
        except TimeoutError:
            route = Route("stable", UNDECIDED, important=True)
        if route.reason == UNDECIDED:
            state.counters.count_skipped("to dense: the rules of important requests took too long")
        return route


def parse_payload(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raise RefusalError for any other body."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusalError(400, "expected a body of JSON") from error
    if not isinstance(payload, dict):
        raise RefusalError(400, "expected a JSON object")
    return payload


def no_answer() -> RefusalError:
    """Return the error of a request that neither side answered. It does not name the servers."""
    return RefusalError(502, "the model does not answer", kind="upstream_error")
