"""Two fake upstreams in this process, and a gateway before them on a fake clock.

A fake model generates one word per token. Its most likely word after a text follows from a hash of the text. At a share
of positions, `differs`, it prefers another word than the other model.
"""

import asyncio
import json
import math
import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from niwaki.rollout.app import build
from niwaki.rollout.controller import Controller
from niwaki.rollout.gateway import Gateway
from niwaki.rollout.http_client import Headers, UpstreamError
from niwaki.rollout.running import assemble
from niwaki.rollout.settings import RolloutSettings, settings_from
from niwaki.rollout.signals import SIGNALS
from niwaki.rollout.start import begin_or_resume
from niwaki.rollout.store import Store

WORDS = ("moss", "stone", "rain", "branch", "bench", "river", "garden", "autumn", "saw", "bark")
LIMITS = {
    "error_rate": 0.002, "prefill_latency_ratio": 1.5, "decode_latency_ratio": 1.5, "top1_agreement": 0.9,
    "perplexity_ratio": 1.1,
}  # fmt: skip


USUAL = {"host": "localhost", "content-type": "application/json"}


class Clock:
    """Clock that only moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Model:
    """OpenAI-compatible server of a fake model, with the faults that it can have."""

    name: str
    clock: Clock
    errors: float = 0.0
    slow: float = 1.0
    differs: float = 0.0
    breaks_after: int | None = None
    scores: bool = True
    status: int = 200
    waits: Callable[[], Awaitable[None]] | None = None
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    asked: list[dict[str, Any]] = field(default_factory=list)
    echoed: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    scored: int = 0
    words: int = 8

    def best(self, text: str) -> str:
        """Return the most likely word of this model after a text."""
        place = zlib.crc32(text.encode())
        off = (place % 1000) / 1000 < self.differs
        return WORDS[(place // 1000 + off) % len(WORDS)]

    def write(self, prompt: str) -> list[str]:
        """Return the words of an answer, each with a space before it."""
        words: list[str] = []
        for _ in range(self.words):
            words.append(" " + self.best(prompt + "".join(words)))
        return words

    async def send(self, method: str, path: str, headers: Headers, body: bytes) -> "FakeResponse":
        """Answer one request, as an `HttpSender`."""
        if path == "/v1/models":
            return _json_response(200, {"object": "list", "data": [{"id": self.name}]})
        if path == "/metrics":
            return FakeResponse(
                200, "text/plain", _one_chunk(b"niwaki_skipped_frac_sum 1.5\nniwaki_skipped_frac_count 3.0\n")
            )
        payload = json.loads(body)
        if payload.get("echo"):
            self.scored += 1
            self.echoed.append(payload)
            found = self._echo(payload) if self.scores else {"choices": [{"text": "", "logprobs": None}]}
            return _json_response(200, found)
        self.asked.append(payload)
        self.headers.append({name.decode().lower(): value.decode() for name, value in headers})
        if self.waits is not None:
            await self.waits()
        if self.status != 200 or self.rng.random() < self.errors:
            return _json_response(self.status if self.status != 200 else 500, {"error": {"message": "broken"}})
        chat = "messages" in payload
        try:
            words = self.write(_prompt(payload))
        except (KeyError, TypeError):
            return _json_response(400, {"error": {"message": "expected a prompt or messages"}})
        if payload.get("stream"):
            return FakeResponse(200, "text/event-stream", self._events(words, chat))
        self._pass(len(words))
        text = {"message": {"role": "assistant", "content": "".join(words)}} if chat else {"text": "".join(words)}
        answer = {"model": self.name, "choices": [{"index": 0, **text}], "usage": {"completion_tokens": len(words)}}
        return _json_response(200, answer)

    async def close(self) -> None:
        """Close nothing."""

    async def _events(self, words: list[str], chat: bool) -> AsyncIterator[bytes]:
        for place, word in enumerate(words):
            self._pass(1)
            if place == self.breaks_after:
                raise UpstreamError("broken off")
            choice = {"index": 0, "delta": {"content": word}} if chat else {"index": 0, "text": word}
            yield b"data: " + json.dumps({"model": self.name, "choices": [choice]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _pass(self, words: int) -> None:
        """Move the clock by the time of some words."""
        self.clock.now += 0.1 * self.slow * words * self.rng.lognormvariate(0, 0.2)

    def _echo(self, payload: dict[str, Any]) -> dict[str, Any]:
        text = payload["prompt"]
        tokens = _tokens(text)
        found: dict[str, list[Any]] = {"tokens": tokens, "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = 0
        for token in tokens:
            best = " " + self.best(text[:at])
            logprob = math.log(0.5 if token == best else 0.01)
            found["text_offset"].append(at)
            found["token_logprobs"].append(logprob if at else None)
            found["top_logprobs"].append({best: math.log(0.5), token: logprob} if at else None)
            at += len(token)
        return {"choices": [{"index": 0, "text": text, "logprobs": found}]}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


class FakeResponse:
    """Response whose status and headers arrived."""

    def __init__(self, status: int, kind: str, body: AsyncIterator[bytes]) -> None:
        self.status, self.body, self.closed = status, body, False
        self.headers: Headers = [(b"content-type", kind.encode())]

    async def read_chunk(self) -> bytes:
        return await anext(self.body, b"")

    def close(self) -> None:
        self.closed = True


async def _one_chunk(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _json_response(status: int, found: dict[str, Any]) -> FakeResponse:
    return FakeResponse(status, "application/json", _one_chunk(_json(found)))


def _prompt(payload: dict[str, Any]) -> str:
    if "messages" not in payload:
        return "" + payload["prompt"]
    return "".join(f"{one['role']}: {one['content']}\n" for one in payload["messages"]) + "assistant: "


def _tokens(text: str) -> list[str]:
    """Return words with the space before them."""
    tokens = [text[:1]]
    for character in text[1:]:
        if character in " \n":
            tokens.append(character)
        else:
            tokens[-1] += character
    return tokens


@dataclass(frozen=True)
class Answer:
    """Response that a client got."""

    status_code: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()

    def json(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Client:
    """Client that calls the application as a server would, without a network, in half the time of a real one."""

    app: Any

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return await self.send("GET", path, b"", headers or {})

    async def post(
        self, path: str, json: Any = None, *, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        return await self.send("POST", path, _json(json) if json is not None else content, headers or {})

    async def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        sent: list[dict[str, Any]] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        never = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not waiting:
                await never.wait()
            return waiting.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "server": ("gateway", 80), "client": ("client", 1),
            "headers": [(name.lower().encode(), value.encode()) for name, value in {**USUAL, **headers}.items()],
        }  # fmt: skip
        await self.app(scope, receive, send)
        found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(one.get("body", b"") for one in sent[1:]))


@dataclass
class Setup:
    """Gateway between a client and two fake upstreams."""

    gateway: Gateway
    stable: Model
    canary: Model
    clock: Clock
    client: Client

    async def ask(self, number: int, *, stream: bool = False, chat: bool = False, **more: Any) -> Answer:
        """Send a request of user `number`."""
        drawn = zlib.crc32(str(number).encode())
        prompt = f"the {WORDS[drawn % 10]} of the {WORDS[drawn // 10 % 10]} number {drawn % 900 + 100} is"
        text = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {"model": "m", **text, "max_tokens": 8, "temperature": 0, "stream": stream, "user": f"u{number}", **more}
        return await self.client.post(path, json=body)

    async def interval(self, requests: int, first: int = 0, **how: Any) -> list[Answer]:
        """Send requests, wait for their audits and copies, then end the interval."""
        answers = [await self.ask(first + number, **how) for number in range(requests)]
        await self.gateway.background.idle()
        self.clock.now += self.gateway.controller.state.policy.interval_s
        self.gateway.controller.tick(self.clock.now)
        return answers


def settings(**values: Any) -> RolloutSettings:
    """Return settings with small steps."""
    policy = {"steps": [0.5, 1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5}
    given = {
        "stable": {"url": "http://stable"}, "canary": {"url": "http://canary"}, "policy": policy,
        "sampling": {"audit_frac": 1.0, "max_audits": 100},
    }  # fmt: skip
    return settings_from({**given, **values})


def make(
    folder: Path,
    own: RolloutSettings | None = None,
    *,
    keys: tuple[str, ...] = (),
    limits: dict[str, float] | None = None,
) -> Setup:
    """Return a gateway with a store in `folder`, before two equal models."""
    clock = Clock()
    stable, canary = Model("dense", clock), Model("small", clock, rng=random.Random(8))
    gateway = assemble(
        own or settings(), LIMITS if limits is None else limits, Store.open(folder / "rollout.sqlite"), keys=keys,
        now=clock.now, senders=(stable, canary), clock=clock,
    )  # fmt: skip
    gateway.rng = random.Random(3)
    return Setup(gateway, stable, canary, clock, Client(build(gateway, tick_s=None)))


def begun(where: str, own: RolloutSettings | None = None, now: float = 0.0) -> Controller:
    """Begin or resume a roll-out on a store."""
    return begin_or_resume(Store.open(where), own or settings(), LIMITS, now)


def feed(controller: Controller, *, failed: bool) -> None:
    """Give a controller the evidence of one interval."""
    for _ in range(60):
        controller.counters.count_outcome(failed=failed)
        controller.counters.add_audit({"top1_agreement": 1.0, "perplexity_ratio": 1.0})
        for name in ("prefill_latency_ratio", "decode_latency_ratio"):
            controller.counters.open.observe(name, SIGNALS[name].scaled(1.0))
