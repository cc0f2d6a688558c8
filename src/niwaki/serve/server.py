"""Process of the server: a model, its engine, the routes and a listening socket, from start to orderly shutdown.

On SIGTERM or Ctrl-C `/ready` returns 503 and new requests are refused. Requests that wait or run get at most `drain_s`
to finish, then the socket closes. A second signal ends the process at once. If the engine stops, the process ends with
exit code 3, so that its supervisor can start another one.

    serve("OUT", ServerSettings(port=8000))
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

from niwaki.compression.verify import check_weights, state_of
from niwaki.data.texts import load_tokenizer
from niwaki.errors import InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.runtime.load import load_checkpoint
from niwaki.serve.app import Service, create_app
from niwaki.serve.engine import Engine, EngineLimits
from niwaki.serve.event_queue import Timeouts
from niwaki.serve.http.keys import Keys
from niwaki.serve.http.limits import BodyLimits, LimitsMiddleware, check_host, check_port, is_loopback
from niwaki.serve.http.protocol import ConnectionLimits, limited_protocol
from niwaki.serve.prometheus import Metrics
from niwaki.serve.prompts import PromptTokenizer
from niwaki.serve.request_metrics import RequestMetricsMiddleware
from niwaki.serve.text import TokenNames

DEFAULT_CONTEXT = 2048  # tokens, for a model whose config has no number of positions
SUSPENDED_S = 1.0  # between two ticks, of which there are ten per second: the process was stopped
ENGINE_STOPPED = 3  # exit code of a fault of our own, as in the command line
log = logging.getLogger("niwaki.serve")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    slots: int = 8
    queue: int = 64
    context: int | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)
    drain_s: float = 30.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    keys: tuple[str, ...] = ()
    without_keys: bool = False
    log_prompts: bool = False
    device: str = "auto"
    dtype: torch.dtype | None = None
    dense: bool = False
    verify: bool = True


def serve(model: str | Path, settings: ServerSettings) -> int:
    """Serve until a signal, and return the exit code. Raise InputError for wrong settings."""
    check(settings)
    server = Server(make_service(model, settings), settings)
    server.run()
    return server.exit_code


def check(settings: ServerSettings) -> None:
    """Raise InputError for wrong settings."""
    counts = {"slots": (settings.slots, 1), "queue": (settings.queue, 1), "context": (settings.context or 2, 2)}
    for name, (value, minimum) in counts.items():
        if value < minimum:
            raise InputError(f"{name} must be at least {minimum}, got {value}")
    settings.connections.check()
    seconds = (*vars(settings.timeouts).values(), settings.drain_s)
    if min(seconds) <= 0:
        raise InputError(f"expected times above 0 s, got {min(seconds):g}")
    alternative = ", or --without-keys if a proxy before the server asks for keys"
    check_host(settings.host, settings.keys or settings.without_keys, alternative)
    check_port(settings.host, settings.port)


def make_service(model: str | Path, settings: ServerSettings) -> Service:
    """Load the model and start its engine. Compare its weights with run.json first."""
    checkpoint = Checkpoint.open(model)  # what is verified from here on is what is loaded
    folder = checkpoint.folder
    if settings.verify:
        log.info("files of %s: %s", model, state_of(folder, check_weights(folder)))
    tokenizer = load_tokenizer(folder)
    decoder = load_checkpoint(checkpoint, device=settings.device, dense=settings.dense, dtype=settings.dtype)
    config = decoder.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    context = settings.context or positions or DEFAULT_CONTEXT
    if positions is not None and context > positions:
        raise InputError(f"context {context} is more than the {positions} positions of the model")
    metrics = Metrics()
    engine = Engine(decoder, tokenizer, EngineLimits(settings.slots, settings.queue, context), metrics)
    prompts = PromptTokenizer(tokenizer, vocabulary=config.vocab_size, context=context)
    engine.start()
    name = settings.name or Path(str(model).rstrip("/")).name
    return Service(engine, prompts, TokenNames(tokenizer), metrics, name, settings.timeouts, settings.log_prompts)


class Server(uvicorn.Server):
    """Server of uvicorn that drains before it ends."""

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        keys = Keys(settings.keys)
        limited = LimitsMiddleware(
            create_app(service, keyed=bool(keys)), keys, BodyLimits(), loopback_only=is_loopback(settings.host)
        )
        app = RequestMetricsMiddleware(limited, service.metrics)
        protocol = limited_protocol(settings.connections, service.metrics.count_refusal)
        super().__init__(
            uvicorn.Config(
                app, host=settings.host, port=settings.port, http=protocol, ws="none", lifespan="off",
                access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=5, backlog=1024,
            )
        )  # fmt: skip
        self.service, self.drain_s = service, settings.drain_s
        self.exit_code = 0
        self._drain_until: float | None = None
        self._last_tick = time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at the second one."""
        if self._drain_until is not None:
            self.should_exit = True
            return
        self.drain()

    def drain(self) -> None:
        """Refuse new requests. The end follows when all are answered, or after `drain_s`."""
        self.service.engine.drain()
        self._drain_until = time.monotonic() + self.drain_s

    async def on_tick(self, counter: int) -> bool:
        """Check ten times per second whether the server must end."""
        engine, now = self.service.engine, time.monotonic()
        if now - self._last_tick > SUSPENDED_S:
            engine.restart_step_clock()
        self._last_tick = now
        if not engine.healthy and not self.should_exit:
            log.error("the engine stopped")
            self.exit_code, self.should_exit = ENGINE_STOPPED, True
        if self._drain_until is not None and (engine.idle or now >= self._drain_until):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Fail the unfinished requests, so that their clients get an error, then shut down."""
        await asyncio.get_running_loop().run_in_executor(None, self.service.close)
        await super().shutdown(sockets)
