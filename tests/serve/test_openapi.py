"""The OpenAPI document is true: the server answers what it allows and refuses what it forbids, as it says."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from niwaki.serve.app import create_app
from niwaki.serve.openapi import openapi_document
from support.servers import Running, chat_model, running

EXAMPLES = 8  # of each route and of each kind
CHECKED = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = chat_model(tmp_path_factory.mktemp("openapi") / "model", max_position_embeddings=40)
    with running(model, slots=2, queue=8) as server:
        yield server


def test_the_document_is_the_one_that_is_served_and_has_every_route(tiny: Running) -> None:
    with tiny.http() as http:
        document = http.get("/openapi.json").json()
    assert document == openapi_document("tiny", keyed=False)
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for route in create_app(tiny.service).routes
        for method in route.methods
    }  # type: ignore[attr-defined]
    written = {
        (method, path) for path, known in document["paths"].items() for method in known if method != "parameters"
    }
    assert written == routes


def test_keys_are_written_in_the_document() -> None:
    document = openapi_document("tiny", keyed=True)
    assert document["security"] == [{"key": []}] and not openapi_document("tiny", keyed=False)["security"]
    open_paths = [path for path, known in document["paths"].items() if known.get("get", {}).get("security") == []]
    assert open_paths == ["/health", "/ready"]


def statuses(url: str, operation: Any, mode: schemathesis.GenerationMode) -> set[int]:
    """Send requests of one route, check each answer, and return the statuses."""
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=url, timeout=30)
        case.validate_response(response, checks=CHECKED)
        seen.add(response.status_code)

    ask()
    return seen


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_as_the_document_says(tiny: Running, mode: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(openapi_document("tiny", keyed=False))
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not operation.body:
            continue  # nothing can be wrong
        seen = statuses(tiny.url, operation, mode)
        assert seen and all(200 <= status < 500 for status in seen), (operation.label, seen)
        generation = operation.label.startswith("POST")
        if generation:
            assert (200 in seen) == mode.is_positive, (operation.label, seen)


def answered(response: httpx.Response, schema: Any, path: str) -> None:
    operation = schema[path]["POST"]
    operation.validate_response(schemathesis.Response.from_httpx(response, verify=True))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_whole_answers_with_everything_in_them_are_as_the_document_says(tiny: Running, path: str) -> None:
    """Random requests rarely ask for scores, so these do."""
    schema = schemathesis.openapi.from_dict(openapi_document("tiny", keyed=False))
    chat = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    body = chat if "chat" in path else {"prompt": "Hi", "logprobs": 2, "echo": True}
    with tiny.http() as http:
        response = http.post(path, json={"model": "tiny", "max_tokens": 3, **body})
        assert response.status_code == 200
        answered(response, schema, path)
        assert http.post(path, json={"model": "tiny", "max_tokens": 2, "stream": True, **body}).status_code == 200
        for wrong in ({"model": "other"}, {"model": "tiny", "tools": [1]}, {"model": "tiny", "max_tokens": 999}):
            refused = http.post(path, json={**body, **wrong})
            assert refused.status_code in (400, 404)
            answered(refused, schema, path)
