"""What the HTTP protocol refuses before a route sees a request: each refusal is an answer, and is counted."""

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from niwaki.errors import InputError
from niwaki.serve.http import protocol
from niwaki.serve.http.protocol import ConnectionLimits, limited_protocol

CHUNKED = b"%s / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%s"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer at once to GET, and after the body to any other method."""
    message: dict[str, Any] = {"more_body": scope["method"] == "POST"}
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def raw(port: int, sent: bytes) -> bytes:
    """What comes back on a connection of its own until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    found = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return found


def go(limits: ConnectionLimits, work: Callable[[int], Awaitable[None]]) -> Counter[str]:
    """Run a server for a test. Return the refusals that were counted."""
    counted: Counter[str] = Counter()

    async def whole() -> None:
        made = limited_protocol(limits, lambda reason: counted.update([reason]))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(echo, http=made, ws="none", lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started:
                await asyncio.sleep(0.01)
            await work(listening.getsockname()[1])
            server.should_exit = server.force_exit = True
            await serving
            assert not made.open.total and not made.open.addresses and not made.open.lingering

    asyncio.run(whole())
    return counted


def refusal(answer: bytes, status: int) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in head, answer
    return str(json.loads(body)["error"]["message"])


@pytest.mark.parametrize("method", [b"POST", b"GET"])
@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\n", b"-1\r\n", b"3\r\nabcde\r\n", b"2\r\nabX", b"\r\n\r\n", b"1" * 40 + b"\r\n",
        b"0\r\nbad header\r\n\r\n", b"\xff\x00\r\n",
    ],
)  # fmt: skip
def test_chunks_that_are_none_are_one_400_and_no_traceback(
    body: bytes, method: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvicorn_log = logging.getLogger("uvicorn.error")  # other tests configure it
    monkeypatch.setattr(uvicorn_log, "handlers", [caplog.handler])
    monkeypatch.setattr(uvicorn_log, "propagate", False)
    caplog.set_level(logging.INFO, logger="uvicorn.error")

    async def work(port: int) -> None:
        assert refusal(await raw(port, CHUNKED % (method, body)), 400)
        head = await raw(port, CHUNKED % (b"HEAD", body))
        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
        assert (await raw(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).endswith(b"ok")

    assert go(ConnectionLimits(), work)["malformed"] == 2
    assert not any(record.exc_info for record in caplog.records) and "Traceback" not in caplog.text
    assert caplog.text.count("Invalid HTTP request received.") == 2, "one line for each"


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (b"\x16\x03\x01 nonsense\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"x" * 2**17, 431, "large"),
        (b"GET / HTTP/1.1\r\nHost: ", 408, "late"),
    ],
)
def test_headers_that_the_parser_refuses_are_counted(
    sent: bytes, status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADERS_S", 0.3)

    async def work(port: int) -> None:
        assert refusal(await raw(port, sent), status)

    assert go(ConnectionLimits(), work) == {reason: 1}


@pytest.mark.parametrize("limits", [ConnectionLimits(3, 9), ConnectionLimits(9, 3)])
def test_connections_over_a_limit_get_a_503_and_make_room_when_they_close(limits: ConnectionLimits) -> None:
    async def work(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        answer = await raw(port, request + b"x" * 100_000)  # more than a socket drops in silence
        assert "3 connections" in refusal(answer, 503) and b"Retry-After: 1" in answer
        held[0][1].write(request)
        assert (await asyncio.wait_for(held[0][0].read(), 10)).endswith(b"ok"), "those inside are served"
        while not (answer := await raw(port, request)).endswith(b"ok"):
            assert refusal(answer, 503)
        for _, writer in held:
            writer.close()

    assert go(limits, work)["connections"] >= 1


def test_refused_connections_that_stay_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that neither reads nor leaves costs a socket for a moment, and no more than a few of them do."""
    monkeypatch.setattr(protocol, "MAX_LINGERING", 2)
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)

    async def work(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        answers = [await asyncio.wait_for(reader.read(), 10) for reader, _ in held[1:]]
        assert sorted(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) == [False] * 3 + [True] * 2
        for _, writer in held:
            writer.close()

    assert go(ConnectionLimits(1, 1), work) == {"connections": 5}


def test_limits_let_someone_in() -> None:
    with pytest.raises(InputError, match="expected at least 1 connection, got 0"):
        ConnectionLimits(5, 0).check()
