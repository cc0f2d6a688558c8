"""Routes of the server. The models of requests are in `request_models`, their tokens come from `prompts`.

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
from niwaki.serve.event_queue import EventQueue, Timeouts
from niwaki.serve.http.api_errors import INTERNAL, RefusalError
from niwaki.serve.http.disconnect import CLIENT_CLOSED
from niwaki.serve.jobs import Job
from niwaki.serve.openapi import openapi_document
from niwaki.serve.prometheus import CONTENT_TYPE, Metrics
from niwaki.serve.prompts import PromptTokenizer
from niwaki.serve.request_handler import RequestHandler
from niwaki.serve.request_models import ChatRequest, CompletionRequest, GenerationRequest
from niwaki.serve.sampling import Sampling
from niwaki.serve.text import TokenNames

DEFAULT_TOKENS = 16  # of /v1/completions, as in the OpenAI API. A chat may fill the context
log = logging.getLogger("niwaki.serve")
RequestModel = TypeVar("RequestModel", bound=GenerationRequest)


@dataclass(frozen=True)
class Service:
    """Model that the routes serve, with its engine, tokenizer and metrics."""

    engine: Engine
    prompts: PromptTokenizer
    names: TokenNames
    metrics: Metrics
    name: str
    timeouts: Timeouts = field(default_factory=Timeouts)
    log_prompts: bool = False
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "niwaki-prompts"))
    created: int = field(default_factory=lambda: int(time.time()))

    def close(self) -> None:
        """End the thread, the process and the workers beside the loop."""
        self.engine.close()
        self.prompts.close()
        self.workers.shutdown(wait=False, cancel_futures=True)


def create_app(service: Service, *, keyed: bool = False) -> FastAPI:
    """Return the application with routes and error handlers; `server` adds the middleware, with keys if `keyed`."""
    app = FastAPI(title="niwaki", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_generation_routes(app, service)
    _add_status_routes(app, service, openapi_document(service.name, keyed=keyed))
    _add_error_handlers(app)
    return app


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that need the model."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _parse(request, ChatRequest)
        _check_name(service, body.model)
        service.engine.check()  # a full queue refuses before the prompt is tokenized
        ids = await _in_worker(service, lambda: service.prompts.tokenize_chat(body.messages))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        answer = ChatAnswer(service.names, service.name, logprobs=logprobs is not None)
        return await _generate(service, request, body, ids, body.token_limit, answer, logprobs)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await _parse(request, CompletionRequest)
        _check_name(service, body.model)
        service.engine.check()
        prompt = body.prompt
        begin = body.add_special_tokens is not False
        ids = await _in_worker(service, lambda: service.prompts.tokenize_text(prompt, begin=begin))
        echo, prompt_parts = "", (0, 0)
        if body.echo:
            echo = prompt if isinstance(prompt, str) else await _in_worker(service, lambda: service.prompts.decode(ids))
            if isinstance(prompt, str):
                prompt_parts = await _in_worker(service, lambda: (service.prompts.added(prompt, ids), len(ids)))
        wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        answer = TextAnswer(
            service.names, service.name, logprobs=body.logprobs is not None, echo=echo, prompt_parts=prompt_parts
        )
        return await _generate(service, request, body, ids, wanted, answer, body.logprobs)


def _add_status_routes(app: FastAPI, service: Service, document: dict[str, Any]) -> None:
    """Add the routes about the server."""
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
        """Return 200 while the engine runs, else 503."""
        return JSONResponse({"status": "ok" if engine.healthy else "dead"}, 200 if engine.healthy else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Return 200 while the server takes requests, else 503."""
        is_ready = engine.healthy and not engine.draining
        return JSONResponse({"status": "ready" if is_ready else "draining"}, 200 if is_ready else 503)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI) -> None:
    """Add the handlers of requests that get no answer."""

    @app.exception_handler(RefusalError)
    async def refused(_request: Request, error: RefusalError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, _error: ClientDisconnect) -> Response:
        request.scope.setdefault("state", {}).setdefault("outcome", "cancelled")  # or invalid, by the protocol
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(HTTPException)
    async def not_found(_request: Request, error: HTTPException) -> Response:
        refusal = RefusalError(error.status_code, f"{error.detail}: this server answers under /v1")
        return JSONResponse(refusal.body, refusal.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        refusal = RefusalError(500, "the server failed on this request", kind=INTERNAL)
        return JSONResponse(refusal.body, refusal.status)


async def _parse(request: Request, kind: type[RequestModel]) -> RequestModel:
    """Return the body as a request of a kind. Raise RefusalError with the first fault."""
    raw = await request.body()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])[:200]
        message = str(first["msg"]).removeprefix("Value error, ")[:300]
        raise RefusalError(
            400, f"{field_name}: {message}" if field_name else message, param=field_name or None
        ) from None


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise RefusalError(
            404, f"no model {name[:100]!r} here, only {service.name!r}", param="model", code="model_not_found"
        )


async def _in_worker(service: Service, work: Callable[[], Any]) -> Any:
    """Run work outside of the loop, because a long prompt takes time."""
    return await asyncio.get_running_loop().run_in_executor(service.workers, work)


async def _generate(
    service: Service,
    request: Request,
    body: GenerationRequest,
    ids: list[int],
    wanted: int | None,
    answer: Answer,
    logprobs: int | None,
) -> Response:
    """Submit a job, and answer with a stream or with the whole text. A client that disconnects cancels its job."""
    score_prompt = isinstance(body, CompletionRequest) and bool(body.echo) and logprobs is not None
    limit = service.prompts.token_limit(ids, wanted)
    if limit == 0 and not score_prompt:
        raise RefusalError(
            400, "max_tokens 0 generates nothing: it belongs to echo=true with logprobs", param="max_tokens"
        )
    temperature, top_p = (1.0 if value is None else value for value in (body.temperature, body.top_p))
    events = EventQueue(service.timeouts)
    job = Job(
        ids, Sampling(temperature, top_p, body.seed), limit, events.put,
        stops=body.stops, logprobs=logprobs, score_prompt=score_prompt,
    )  # fmt: skip
    if service.log_prompts:
        log.info("prompt: %r", await _in_worker(service, lambda: service.prompts.decode(ids)))
    service.engine.submit(job)
    handler = RequestHandler(service.engine, request, job, events, answer)
    return await (handler.stream(usage=body.usage_in_stream) if body.stream else handler.whole())
