"""The routes: requests in, answers out. What a request may be is in `shapes`, what it becomes in `prompts`.

application = create_app(Service(engine, prompts, names, metrics, name="small"))
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from niwaki.serve.answers import Answer, ChatAnswer, TextAnswer
from niwaki.serve.engine import Engine
from niwaki.serve.event_queue import Inbox, Timeouts
from niwaki.serve.http.api_errors import INTERNAL, RefusalError
from niwaki.serve.jobs import Job
from niwaki.serve.metrics import CONTENT_TYPE, Metrics
from niwaki.serve.prompts import Prompts
from niwaki.serve.request_handler import CLOSED, Exchange
from niwaki.serve.request_models import ChatRequest, Common, CompletionRequest
from niwaki.serve.sampling import Sampling
from niwaki.serve.text import Names

DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI has it; a chat may fill the context
log = logging.getLogger("niwaki.serve")
Asked = TypeVar("Asked", bound=Common)


@dataclass(frozen=True)
class Service:
    """One model behind the routes."""

    engine: Engine
    prompts: Prompts
    names: Names
    metrics: Metrics
    name: str
    timeouts: Timeouts = field(default_factory=Timeouts)
    log_prompts: bool = False
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "niwaki-prompts"))
    created: int = field(default_factory=lambda: int(time.time()))

    def close(self) -> None:
        """Ends what runs beside the loop."""
        self.engine.close()
        self.prompts.close()
        self.workers.shutdown(wait=False, cancel_futures=True)


def create_app(service: Service) -> FastAPI:
    """The application, without the limits that lie around it."""
    app = FastAPI(title="niwaki", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_writing(app, service)
    _add_telling(app, service)
    _add_refusing(app)
    return app


def _add_writing(app: FastAPI, service: Service) -> None:
    """The routes that need the model."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await _parsed(request, ChatRequest)
        _check_name(service, asked.model)
        service.engine.check()  # a full queue costs no tokenizing
        ids = await _apart(service, lambda: service.prompts.of_chat(asked.messages))
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        answer = ChatAnswer(service.names, service.name, logprobs=logprobs is not None)
        return await _answered(service, request, asked, ids, asked.token_limit, answer, logprobs)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await _parsed(request, CompletionRequest)
        _check_name(service, asked.model)
        service.engine.check()
        prompt = asked.prompt
        ids = await _apart(service, lambda: service.prompts.of_completion(prompt))
        echo = ""
        if asked.echo:
            echo = prompt if isinstance(prompt, str) else await _apart(service, lambda: service.prompts.text_of(ids))
        wanted = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        answer = TextAnswer(service.names, service.name, logprobs=asked.logprobs is not None, echo=echo)
        return await _answered(service, request, asked, ids, wanted, answer, asked.logprobs)


def _add_telling(app: FastAPI, service: Service) -> None:
    """The routes that tell about the server."""
    engine = service.engine
    about = {"id": service.name, "object": "model", "created": service.created, "owned_by": "niwaki"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(service, name)
        return about

    @app.get("/health")
    async def health() -> Response:
        """Whether the process is worth keeping."""
        return JSONResponse({"status": "ok" if engine.healthy else "dead"}, 200 if engine.healthy else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether it takes requests."""
        taking = engine.healthy and not engine.draining
        return JSONResponse({"status": "ready" if taking else "draining"}, 200 if taking else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_refusing(app: FastAPI) -> None:
    """What becomes of requests that are not answered."""

    @app.exception_handler(RefusalError)
    async def refused(_request: Request, error: RefusalError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, _error: ClientDisconnect) -> Response:
        request.scope.setdefault("state", {})["outcome"] = "cancelled"
        return Response(status_code=CLOSED)

    @app.exception_handler(HTTPException)
    async def not_found(_request: Request, error: HTTPException) -> Response:
        found = RefusalError(error.status_code, f"{error.detail}: this server answers under /v1")
        return JSONResponse(found.body, found.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        found = RefusalError(500, "the server failed on this request", kind=INTERNAL)
        return JSONResponse(found.body, found.status)


async def _parsed(request: Request, kind: type[Asked]) -> Asked:
    """The body as a request of a kind. Raises RefusalError with the first thing that is wrong."""
    body = await request.body()
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:200]
        said = str(first["msg"]).removeprefix("Value error, ")[:300]
        raise RefusalError(400, f"{place}: {said}" if place else said, param=place or None) from None


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise RefusalError(
            404, f"no model {name[:100]!r} here, only {service.name!r}", param="model", code="model_not_found"
        )


async def _apart(service: Service, work: Callable[[], Any]) -> Any:
    """Off the loop: long prompts take their time."""
    return await asyncio.get_running_loop().run_in_executor(service.workers, work)


async def _answered(
    service: Service,
    request: Request,
    asked: Common,
    ids: list[int],
    wanted: int | None,
    answer: Answer,
    logprobs: int | None,
) -> Response:
    """Submits a job, and answers as it goes or when it is done; a client that hangs up takes its job with it."""
    score_prompt = isinstance(asked, CompletionRequest) and bool(asked.echo) and logprobs is not None
    most = service.prompts.checked(ids, wanted)
    if most == 0 and not score_prompt:
        raise RefusalError(
            400, "max_tokens 0 writes nothing: it belongs to echo=true with logprobs", param="max_tokens"
        )
    temperature, top_p = (1.0 if value is None else value for value in (asked.temperature, asked.top_p))
    inbox = Inbox(service.timeouts)
    job = Job(
        ids, Sampling(temperature, top_p, asked.seed), most, inbox.put,
        stops=asked.stops, logprobs=logprobs, score_prompt=score_prompt,
    )  # fmt: skip
    if service.log_prompts:
        log.info("prompt: %r", await _apart(service, lambda: service.prompts.text_of(ids)))
    service.engine.submit(job)
    exchange = Exchange(service.engine, request, job, inbox, answer)
    return await (exchange.stream(usage=asked.usage_in_stream) if asked.stream else exchange.whole())
