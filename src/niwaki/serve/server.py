"""The process: a model, its engine, the routes and a listening socket, from the first byte to an orderly end.

On SIGTERM (or Ctrl-C) `/ready` turns to 503 and new requests are refused, while those that wait or run are answered,
for at most `drain_s`; then the socket closes. A second signal ends it at once. If the engine dies the process ends with
exit code 1, for its supervisor to start another.

    serve("OUT", Settings(port=8000))
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from niwaki.compression.verify import check_weights
from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError
from niwaki.model.checkpoint import local_folder
from niwaki.runtime.load import load
from niwaki.serve.app import Service, create_app
from niwaki.serve.engine import Engine, Limits
from niwaki.serve.event_queue import Timeouts
from niwaki.serve.http.keys import Keys
from niwaki.serve.http.limits import Bounds, LimitsMiddleware, check_open, is_local
from niwaki.serve.http.protocol import Protocol
from niwaki.serve.metrics import Metrics
from niwaki.serve.prompts import Prompts
from niwaki.serve.request_metrics import Outcomes
from niwaki.serve.text import Names

UNKNOWN_CONTEXT = 2048  # tokens, for models whose config names no number of positions
log = logging.getLogger("niwaki.serve")


@dataclass(frozen=True)
class Settings:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    slots: int = 8
    queue: int = 64
    context: int | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)
    drain_s: float = 30.0
    keys: tuple[str, ...] = ()
    without_keys: bool = False
    log_prompts: bool = False
    device: str = "auto"
    dtype: torch.dtype | None = None
    dense: bool = False
    verify: bool = True


def serve(model: str | Path, settings: Settings) -> int:
    """Serves until a signal; returns the exit code. Raises InputError for settings that cannot be."""
    check(settings)
    server = Server(make_service(model, settings), settings)
    server.run()
    return server.exit_code


def check(settings: Settings) -> None:
    """Raises InputError for settings that cannot be."""
    least = {"slots": settings.slots, "queue": settings.queue, "context": settings.context or 2}
    for name, value in least.items():
        if value < (2 if name == "context" else 1):
            raise InputError(f"{name} must be at least {2 if name == 'context' else 1}, got {value}")
    seconds = (*vars(settings.timeouts).values(), settings.drain_s)
    if min(seconds) <= 0:
        raise InputError(f"expected times above 0 s, got {min(seconds):g}")
    otherwise = ", or --without-keys if something before the server asks for keys"
    check_open(settings.host, settings.keys or settings.without_keys, otherwise)


def make_service(model: str | Path, settings: Settings) -> Service:
    """Loads the model, whose weights are compared with run.json first, and starts its engine."""
    folder = local_folder(str(model))
    if settings.verify:
        checked = check_weights(folder)
        told = "not compressed by niwaki" if checked is None else f"{checked:,} bytes are as they were written"
        log.info("weights of %s: %s", model, told)
    tokenizer = load_tokenizer(folder)
    decoder = load(folder, device=settings.device, dense=settings.dense, dtype=settings.dtype)
    config = decoder.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    context = settings.context or positions or UNKNOWN_CONTEXT
    if positions is not None and context > positions:
        raise InputError(f"context {context} is more than the {positions} positions of the model")
    metrics = Metrics()
    engine = Engine(decoder, tokenizer, Limits(settings.slots, settings.queue, context), metrics)
    prompts = Prompts(tokenizer, vocabulary=config.vocab_size, context=context)
    engine.start()
    name = settings.name or Path(str(model).rstrip("/")).name
    return Service(engine, prompts, Names(tokenizer), metrics, name, settings.timeouts, settings.log_prompts)


ASLEEP_S = 1.0  # without a tick, of which there are ten a second: the process was stopped


class Server(uvicorn.Server):
    """uvicorn with an end in two steps."""

    def __init__(self, service: Service, settings: Settings) -> None:
        keys = Keys(settings.keys)
        app = Outcomes(
            LimitsMiddleware(create_app(service), keys, Bounds(), here=is_local(settings.host)), service.metrics
        )
        super().__init__(
            uvicorn.Config(
                app, host=settings.host, port=settings.port, http=Protocol, ws="none", lifespan="off",
                access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=5, backlog=1024,
            )
        )  # fmt: skip
        self.service, self.drain_s = service, settings.drain_s
        self.exit_code = 0
        self._drained_by: float | None = None
        self._ticked = time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; another one: end."""
        if self._drained_by is not None:
            self.should_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Takes nothing new; the end follows when all is answered, or it is time."""
        self.service.engine.drain()
        self._drained_by = time.monotonic() + self.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        engine, now = self.service.engine, time.monotonic()
        if now - self._ticked > ASLEEP_S:
            engine.woke()
        self._ticked = now
        if not engine.healthy and not self.should_exit:
            log.error("the engine is dead")
            self.exit_code, self.should_exit = 1, True
        if self._drained_by is not None and (engine.idle or now >= self._drained_by):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """What is unfinished fails now, so that its clients are told."""
        await asyncio.get_running_loop().run_in_executor(None, self.service.close)
        await super().shutdown(sockets)
