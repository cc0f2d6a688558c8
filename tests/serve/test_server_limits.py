"""Who is turned away, how, and what it costs the others: nothing."""

import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch

from niwaki.serve.app import create_app
from niwaki.serve.http import limits as middleware_module
from niwaki.serve.http import protocol
from niwaki.serve.http.limits import HEADER_BYTES, KEYLESS_PATHS, BodyLimits, LimitsMiddleware
from support.servers import Running, chat_model, running, until

KEY = "sk-a-key-for-tests"
STEP_S = 0.02
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Keys, two slots, a short queue, and a model that takes its time."""
    folder = chat_model(tmp_path_factory.mktemp("slow") / "model")
    (folder / "chat_template.jinja").unlink()
    with running(folder, slots=2, queue=2, keys=(KEY, "another")) as server:
        server.service.engine.model.register_forward_pre_hook(lambda *_: time.sleep(STEP_S))
        yield server


@contextmanager
def within(served: Running, **seconds: float) -> Iterator[None]:
    """Other time limits."""
    usual = served.service.timeouts
    object.__setattr__(served.service, "timeouts", replace(usual, **seconds))
    yield
    object.__setattr__(served.service, "timeouts", usual)


def outcomes(served: Running) -> dict[str, float]:
    return {
        name: served.metric(f'niwaki_requests_total{{outcome="{name}",route="completions"}}')
        for name in ("answered", "unauthorized", "rejected", "unavailable", "timeout", "cancelled")
    }


def counted(served: Running, before: dict[str, float], **more: float) -> None:
    wanted = {name: value + more.get(name, 0) for name, value in before.items()}
    until(lambda: outcomes(served) == wanted)


def slots(served: Running) -> tuple[int, int]:
    return served.service.engine.running, served.service.engine.queued


def free(served: Running) -> None:
    until(lambda: served.service.engine.idle)


class Busy:
    """Streams that hold slots until they are closed."""

    def __init__(self, served: Running, count: int) -> None:
        self.client = served.client(KEY)
        self.streams = [self.client.completions.create(**LONG, stream=True) for _ in range(count)]
        until(lambda: served.service.engine.running == count)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def test_every_route_but_health_needs_a_key(slow: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    before = outcomes(slow)
    with slow.http() as http:
        routes = [(method, str(route.path)) for route in create_app(slow.service).routes for method in route.methods]  # type: ignore[attr-defined]
        assert len(routes) >= 7 and {("GET", path) for path in KEYLESS_PATHS} < set(routes)
        closed = [(method, path) for method, path in routes if path not in KEYLESS_PATHS]
        for method, path in [*closed, ("GET", "/v1/completions"), ("GET", "/nowhere"), ("DELETE", "/v1/models")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                refused = http.request(method, path, headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        assert http.post("/v1/completions", json=LONG).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        slow.client("wrong-key-of-someone").completions.create(**LONG)
    assert [model.id for model in slow.client("another").models.list()] == ["tiny"]
    counted(slow, before, unauthorized=3 + 2)
    assert KEY not in caplog.text and "wrong-key-of-someone" not in caplog.text


def test_prompts_are_not_logged(slow: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="niwaki.serve")
    secret = "a very private thing"
    slow.client(KEY).completions.create(**{**LONG, "prompt": secret, "max_tokens": 1})
    assert "/v1/completions answered" in caplog.text and "private" not in caplog.text
    object.__setattr__(slow.service, "log_prompts", True)
    slow.client(KEY).completions.create(**{**LONG, "prompt": secret, "max_tokens": 1})
    object.__setattr__(slow.service, "log_prompts", False)
    assert secret in caplog.text, "it was asked for"


def test_sizes_and_kinds_of_bodies(slow: Running) -> None:
    said = json.dumps({"model": "tiny", "prompt": "x" * BodyLimits().body_bytes}).encode()
    usual = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    cases: list[tuple[int, dict[str, str], Any]] = [
        (413, usual, said),
        (413, usual, iter([said[: 2**20], said[2**20 :]])),  # chunked, without a length
        (415, {**usual, "Content-Encoding": "gzip"}, gzip.compress(said)),
        (415, {**usual, "Content-Type": "text/plain"}, b"{}"),
        (431, {**usual, "X-Long": "x" * (HEADER_BYTES - 100)}, b"{}"),
        (400, usual, b"{"),
        (400, usual, b"[" * 100_000),
        (400, usual, b'{"model": "tiny", "prompt": "\\ud800"}'),
        (400, usual, b'{"model": "tiny", "prompt": "\xff"}'),
        (400, usual, b'{"model": "tiny", "prompt": "x", "temperature": NaN}'),
    ]
    with slow.http() as http:
        for status, headers, body in cases:
            refused = http.post("/v1/completions", headers=headers, content=body)
            assert refused.status_code == status, (status, headers, refused.text)
            assert refused.json()["error"]["message"]
    assert slow.service.engine.idle


def raw(served: Running, sent: bytes, seconds: float = 20) -> bytes:
    """What comes back on a connection of its own until the server closes it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as connection:
        connection.sendall(sent)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_headers_that_never_end_and_bodies_that_never_come(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADERS_S", 0.3)
    assert raw(slow, b"GET /health HTTP/1.1\r\nX-Slow: ").startswith(b"HTTP/1.1 408 ")
    assert raw(slow, b"GET /health HTTP/1.1\r\nX-Big: " + b"x" * 40_000).startswith(b"HTTP/1.1 431 ")
    assert raw(slow, b"\x16\x03\x01 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    series = "niwaki_refused_connections_total"
    assert [slow.metric(f'{series}{{reason="{reason}"}}') for reason in ("late", "large", "malformed")] == [1, 1, 1]
    middleware = slow.server.config.loaded_app
    while not isinstance(middleware, LimitsMiddleware):
        middleware = middleware.app
    monkeypatch.setattr(middleware, "limits", BodyLimits(body_s=0.3))
    half = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    assert raw(slow, half.encode() + b"Content-Length: 90\r\n\r\n{").startswith(b"HTTP/1.1 408 ")


def test_broken_chunks_of_a_body_are_an_invalid_request(slow: Running, caplog: pytest.LogCaptureFixture) -> None:
    invalid = 'niwaki_requests_total{outcome="invalid",route="completions"}'
    for kind, counted_now in (("application/json", 1), ("text/plain", 2)):  # the second is refused before its body
        before, head = slow.metric(invalid), f"Authorization: Bearer {KEY}\r\nContent-Type: {kind}\r\n"
        sent = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}Transfer-Encoding: chunked\r\n\r\n-5\r\n{{"
        answer = raw(slow, sent.encode())
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in answer
        until(lambda before=before: slow.metric(invalid) == before + 1)  # type: ignore[misc]
        assert slow.metric('niwaki_refused_connections_total{reason="malformed"}') >= counted_now
    assert not any(record.exc_info for record in caplog.records), "no traceback"


def test_bodies_that_arrive_at_once_have_a_limit_together(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware_module, "MAX_PENDING_BYTES", 100_000)
    before = outcomes(slow)
    usual = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 90000\r\n\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\n{usual}".encode()
    with socket.create_connection(("127.0.0.1", slow.port), timeout=20) as first:
        first.sendall(head + b"x" * 80_000)
        middleware = slow.server.config.loaded_app
        while not isinstance(middleware, LimitsMiddleware):
            middleware = middleware.app
        until(lambda: middleware.pending.total == 80_000)
        refused = raw(slow, head + b"x" * 80_000)
        assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in refused.lower()
        first.sendall(b"x" * 10_000)
        assert first.recv(65536).startswith(b"HTTP/1.1 400 "), "the one that was there first is read"
    until(lambda: middleware.pending.total == 0)
    counted(slow, before, unavailable=1)


def test_a_full_queue_is_429_and_those_inside_are_answered(slow: Running) -> None:
    free(slow)
    before, busy = outcomes(slow), Busy(slow, 2)
    short = {**LONG, "max_tokens": 1}
    waiting = [threading.Thread(target=lambda: slow.client(KEY).completions.create(**short)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    until(lambda: slow.service.engine.queued == 2)
    with pytest.raises(openai.RateLimitError) as refused:
        slow.client(KEY).completions.create(**short)
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert "2 requests wait already" in str(refused.value)
    busy.close()
    for thread in waiting:
        thread.join()
    counted(slow, before, answered=2, rejected=1, cancelled=2)


def test_a_client_that_hangs_up_frees_its_slot_within_a_second(slow: Running) -> None:
    free(slow)
    before, busy = outcomes(slow), Busy(slow, 2)
    other = busy.streams.pop()
    busy.close()
    until(lambda: slow.service.engine.running == 1, seconds=1)
    for _ in range(20):
        assert next(other).choices[0].finish_reason is None, "the other one goes on"
    other.close()
    counted(slow, before, cancelled=2)


def test_hanging_up_without_a_stream_and_in_the_queue(slow: Running) -> None:
    free(slow)
    before = outcomes(slow)
    for busy_count in (0, 2):
        busy = Busy(slow, busy_count)
        with pytest.raises(openai.APITimeoutError):
            slow.client(KEY, timeout=0.3).completions.create(**LONG)
        until(lambda count=busy_count: slots(slow) == (count, 0), seconds=1)  # type: ignore[misc]
        busy.close()
        free(slow)
    counted(slow, before, cancelled=4)


def timed(served: Running, **changes: Any) -> tuple[float, openai.APIStatusError]:
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError) as refused:
        served.client(KEY).completions.create(**{**LONG, **changes})
    return time.monotonic() - began, refused.value


def test_times_in_the_queue_to_the_first_token_and_in_all(slow: Running) -> None:
    """Each fires by itself; how exactly is the clock's business, and asyncio's."""
    free(slow)
    before, busy = outcomes(slow), Busy(slow, 2)
    with within(slow, queue_s=0.3):
        seconds, error = timed(slow)
    assert error.status_code == 503 and "no slot was free within 0.3 s" in error.message and seconds >= 0.3
    busy.close()
    free(slow)
    with within(slow, total_s=0.5):
        seconds, error = timed(slow)
    assert error.status_code == 504 and "the answer took longer than 0.5 s" in error.message and seconds >= 0.5
    free(slow)
    held = slow.service.engine.model.register_forward_pre_hook(lambda *_: time.sleep(1))
    with within(slow, first_token_s=0.4):
        seconds, error = timed(slow)
    held.remove()
    assert error.status_code == 504 and "the first token took longer than 0.4 s" in error.message and seconds >= 0.4
    counted(slow, before, unavailable=1, timeout=2, cancelled=2)


def test_a_stream_that_takes_too_long_ends_with_an_error(slow: Running) -> None:
    free(slow)
    before = outcomes(slow)
    with within(slow, total_s=0.8), pytest.raises(openai.APIError, match=r"the answer took longer than 0\.8 s"):
        list(slow.client(KEY).completions.create(**LONG, stream=True))
    counted(slow, before, timeout=1)


def test_a_model_without_a_template_has_no_chats(slow: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
        slow.client(KEY).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_a_failing_model_is_a_500_in_the_same_shape(slow: Running) -> None:
    free(slow)
    broken = slow.service.engine.model.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(openai.InternalServerError) as refused:
        slow.client(KEY).completions.create(**LONG)
    broken.remove()
    assert "the model failed on this request" in refused.value.message and "zeros" not in refused.value.message
    assert slow.client(KEY).completions.create(**{**LONG, "max_tokens": 1}).usage is not None
