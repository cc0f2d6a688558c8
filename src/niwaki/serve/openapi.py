"""OpenAPI document of the server, from the models of its requests and responses.

It is served at `/openapi.json`. Tests send what it allows and what it forbids, and compare each answer with it.

    document = openapi_document("small", keyed=True)
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from niwaki.serve.request_models import IGNORED, MAX_STOPS, NEUTRAL, UNSUPPORTED, ChatRequest, CompletionRequest
from niwaki.serve.response_models import GenerationResponse
from niwaki.version import __version__

Schema = dict[str, Any]
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"


class ErrorDetail(BaseModel):
    """Reason of a refusal. `param`: the field that it is about. `code`: a name for programs."""

    message: str
    type: Literal["invalid_request_error", "overloaded_error", "rate_limit_error", "server_error", "timeout_error"]
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every status from 400 on, except that of /health and /ready."""

    error: ErrorDetail


class StatusResponse(BaseModel):
    """Body of /health and /ready."""

    status: Literal["ok", "dead", "ready", "draining"]


class ModelCard(BaseModel):
    """Model that the server has."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["niwaki"] = "niwaki"


class ModelList(BaseModel):
    """List of the one model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


# What a status of 400 or more means. The first set can follow any request.
_ANY = {
    400: "The request is not valid, or is not HTTP.",
    401: "There are keys, and the request has none of them.",
    403: "Without keys the server answers to the names of its own machine only.",
    404: "There is no such model or route.",
    408: "Headers or body did not arrive in time.",
    431: "The headers are too large.",
    500: "The server or its model failed.",
    503: "Too many connections, too many large bodies, no slot in time, or the server shuts down.",
}
_GENERATION = {
    413: "The body is too large.",
    415: "The body is not application/json, or is compressed.",
    429: "The queue is full.",
    504: "The first token or the answer took too long.",
}
_WAIT = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}}}


def openapi_document(name: str, *, keyed: bool) -> Schema:
    """Return the document of a server. `name`: that of its model. `keyed`: requests need a key."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "niwaki", "version": __version__},
        "paths": _paths(),
        "components": {
            "schemas": _schemas(name),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if keyed else [],
    }


def _paths() -> Schema:
    model_path = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    health = {"security": [], "responses": _status_responses()}
    return {
        "/v1/chat/completions": {"post": _generation("Answer a dialogue.", "ChatRequest")},
        "/v1/completions": {"post": _generation("Continue or score a text.", "CompletionRequest")},
        "/v1/models": {"get": _reading("List the model.", {JSON: _ref("ModelList")})},
        "/v1/models/{name}": {
            "parameters": [model_path], "get": _reading("Describe the model.", {JSON: _ref("ModelCard")})
        },
        "/health": {"get": {"summary": "Check that the engine runs.", **health}},
        "/ready": {"get": {"summary": "Check that requests are taken.", **health}},
        "/metrics": {"get": _reading("Read the metrics for Prometheus.", {TEXT: {"type": "string"}})},
        "/openapi.json": {"get": _reading("Read this document.", {JSON: {"type": "object"}})},
    }  # fmt: skip


def _generation(summary: str, model: str) -> Schema:
    """Return an operation whose answer is one object, or with `stream` one object per event."""
    answer = {JSON: _ref("GenerationResponse"), EVENTS: _event()}
    body = {"required": True, "content": {JSON: {"schema": _ref(model)}}}
    return {"summary": summary, "requestBody": body, "responses": _responses(answer, {**_ANY, **_GENERATION})}


def _event() -> Schema:
    """Return the schema of one event of a stream. The last is `[DONE]`, and an error may be one."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": _ref("GenerationResponse")}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _reading(summary: str, answer: Mapping[str, Schema]) -> Schema:
    return {"summary": summary, "responses": _responses(answer, _ANY)}


def _responses(answer: Mapping[str, Schema], errors: Mapping[int, str]) -> Schema:
    responses: Schema = {"200": {"description": "The answer.", "content": _content(answer)}}
    for status, description in sorted(errors.items()):
        response: Schema = {"description": description, "content": _content({JSON: _ref("ErrorResponse")})}
        if status in (401, 429, 503):
            response["headers"] = _CHALLENGE if status == 401 else _WAIT
        responses[str(status)] = response
    return responses


def _status_responses() -> Schema:
    """Return the responses of a route without a key. A status of 503 may also be a refusal."""
    errors = {status: text for status, text in _ANY.items() if status not in (401, 404)}
    responses = _responses({JSON: _ref("StatusResponse")}, errors)
    either = {"anyOf": [_ref("StatusResponse"), _ref("ErrorResponse")]}
    responses["503"] = {"description": "No, or too many connections.", "content": _content({JSON: either})}
    return responses


def _content(schemas: Mapping[str, Schema]) -> Schema:
    return {kind: {"schema": schema} for kind, schema in schemas.items()}


def _ref(model: str) -> Schema:
    return {"$ref": f"#/components/schemas/{model}"}


def _schemas(name: str) -> Schema:
    answers = (GenerationResponse, ErrorResponse, StatusResponse, ModelCard, ModelList)
    _, found = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation"), *((one, "serialization") for one in answers)],
        ref_template="#/components/schemas/{model}",
    )
    schemas: Schema = found["$defs"]
    for request in ("ChatRequest", "CompletionRequest"):
        _describe_request(schemas[request]["properties"], name)
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]
    one_of = {"type": "array", "minItems": 1, "maxItems": 1, "items": {"anyOf": list(prompt["anyOf"])}}
    prompt["anyOf"].append({**one_of, "description": "A list of one prompt."})
    return schemas


def _describe_request(properties: Schema, name: str) -> None:
    """Add to a request what its validators check: the name, the stop strings, and fields that change nothing."""
    properties["model"] = {"type": "string", "const": name}
    properties["stop"]["anyOf"][1]["maxItems"] = MAX_STOPS
    properties |= {field: {"description": "Does nothing."} for field in sorted(IGNORED)}
    neutral = {"enum": list(NEUTRAL), "description": "Not supported, except as a value that changes nothing."}
    properties |= dict.fromkeys(sorted(UNSUPPORTED), neutral)
