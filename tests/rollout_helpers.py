"""Two fake upstreams in this process, and a gateway before them that runs on a fake clock.

A fake model writes one word per token. Its distribution is made up: the word it finds most likely behind a text follows
from a hash of the text, and a share of places `differs` from what another model finds there.
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

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from niwaki.rollout.app import build
from niwaki.rollout.gateway import Gateway
from niwaki.rollout.running import assemble
from niwaki.rollout.settings import Settings, settings_from
from niwaki.rollout.store import Store

WORDS = "moss stone rain branch bench river garden autumn saw bark".split()
LIMITS = {
    "error_rate": 0.002, "prefill_latency_ratio": 1.5, "decode_latency_ratio": 1.5, "top1_agreement": 0.9,
    "perplexity_ratio": 1.1,
}  # fmt: skip


class Clock:
    """A clock that only moves when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Model:
    """An OpenAI-compatible server of a made-up model, with what can be wrong with it."""

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
    headers: list[dict[str, str]] = field(default_factory=list)
    scored: int = 0
    left: int = 0
    words: int = 8

    def best(self, text: str) -> str:
        """The word this model finds most likely behind a text."""
        place = zlib.crc32(text.encode())
        off = (place % 1000) / 1000 < self.differs
        return WORDS[(place // 1000 + off) % len(WORDS)]

    def write(self, prompt: str) -> list[str]:
        """The words of an answer, each with a space before it."""
        words: list[str] = []
        for _ in range(self.words):
            words.append(" " + self.best(prompt + "".join(words)))
        return words

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        return Starlette(routes=routes)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.name}]})

    async def _completions(self, request: Request) -> Response:
        payload = await request.json()
        if payload.get("echo"):
            self.scored += 1
            return JSONResponse(self._echo(payload) if self.scores else {"choices": [{"text": "", "logprobs": None}]})
        self.asked.append(payload)
        self.headers.append(dict(request.headers))
        if self.waits is not None:
            try:
                await self.waits()
            except asyncio.CancelledError:
                self.left += 1
                raise
        if self.status != 200 or self.rng.random() < self.errors:
            return JSONResponse({"error": {"message": "broken"}}, self.status if self.status != 200 else 500)
        chat = "messages" in payload
        prompt = "".join(f"{m['role']}: {m['content']}\n" for m in payload["messages"]) + "assistant: " if chat else payload["prompt"]
        words = self.write(prompt)
        if payload.get("stream"):
            return StreamingResponse(self._events(words, chat), media_type="text/event-stream")
        self.clock.now += 0.1 * self.slow * len(words) * self.rng.lognormvariate(0, 0.2)
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(words)}} if chat else {"index": 0, "text": "".join(words)}
        return JSONResponse({"model": self.name, "choices": [choice], "usage": {"completion_tokens": len(words)}})

    async def _events(self, words: list[str], chat: bool) -> AsyncIterator[bytes]:
        for place, word in enumerate(words):
            self.clock.now += 0.1 * self.slow * self.rng.lognormvariate(0, 0.2)
            if self.breaks_after is not None and place == self.breaks_after:
                raise RuntimeError("broken off")
            choice = {"index": 0, "delta": {"content": word}} if chat else {"index": 0, "text": word}
            yield b"data: " + json.dumps({"model": self.name, "choices": [choice]}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

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


def _tokens(text: str) -> list[str]:
    """Words with the space before them."""
    tokens = [text[:1]]
    for character in text[1:]:
        if character in " \n":
            tokens.append(character)
        else:
            tokens[-1] += character
    return tokens


@dataclass
class Setup:
    """A gateway between a client and two fake upstreams."""

    gateway: Gateway
    stable: Model
    canary: Model
    clock: Clock
    client: httpx.AsyncClient

    async def ask(self, number: int, *, stream: bool = False, chat: bool = False, **more: Any) -> httpx.Response:
        """A request of user `number`."""
        prompt = f"the {WORDS[number % 10]} of the {WORDS[number // 10 % 10]} number {number} is"
        text = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {"model": "m", **text, "max_tokens": 8, "temperature": 0, "stream": stream, "user": f"u{number}", **more}
        return await self.client.post(path, json=body)

    async def interval(self, requests: int, first: int = 0, **how: Any) -> list[httpx.Response]:
        """So many requests, their audits and copies, then the end of the interval."""
        answers = [await self.ask(first + number, **how) for number in range(requests)]
        await self.gateway.background.idle()
        self.clock.now += self.gateway.controller.state.policy.interval_s
        self.gateway.controller.tick(self.clock.now)
        return answers


def settings(**values: Any) -> Settings:
    """Settings of small steps, for tests."""
    policy = {"steps": [0.05, 0.25, 0.5, 1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5}
    given = {
        "stable": {"url": "http://stable"}, "canary": {"url": "http://canary"}, "policy": policy,
        "sampling": {"audit_frac": 1.0},
    }  # fmt: skip
    return settings_from({**given, **values})


def make(folder: Path, own: Settings | None = None, *, keys: tuple[str, ...] = (), limits: dict[str, float] | None = None) -> Setup:
    """A gateway on a store in `folder` before two equal models."""
    clock = Clock()
    stable, canary = Model("dense", clock), Model("small", clock, rng=random.Random(8))
    transports = tuple(httpx.ASGITransport(app=model.app()) for model in (stable, canary))
    gateway = assemble(
        own or settings(), LIMITS if limits is None else limits, Store.open(folder / "rollout.sqlite"), keys=keys,
        now=clock.now, transports=transports, clock=clock,
    )  # fmt: skip
    gateway.rng = random.Random(3)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=build(gateway, tick_s=None)), base_url="http://gateway")
    return Setup(gateway, stable, canary, clock, client)
