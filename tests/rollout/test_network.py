"""Over real sockets on loopback: streams arrive as they are written, lines break, clients leave."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from niwaki.rollout.app import build
from niwaki.rollout.running import assemble
from niwaki.rollout.store import Store
from niwaki.serve.http.limits import HEADER_BYTES
from niwaki.serve.http.protocol import HttpProtocol
from support.rollouts import settings

STEP = {"steps": [1.0], "interval_s": 60, "min_requests": 40}
ASK = {"model": "m", "prompt": "p", "user": "u"}


class Real:
    """An upstream that writes a token whenever `go` is released, and notices when nobody reads."""

    def __init__(self) -> None:
        self.go = asyncio.Semaphore(0)
        self.left = asyncio.Event()
        self.breaks_after = 99

    async def completions(self, request: Request) -> Response:
        if not (await request.json()).get("stream"):
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.left.set()
            return JSONResponse({})
        return StreamingResponse(self.tokens(), media_type="text/event-stream")

    async def tokens(self) -> AsyncIterator[bytes]:
        try:
            for place in range(5):
                await self.go.acquire()
                if place == self.breaks_after:
                    raise RuntimeError("broken off")
                yield b'data: {"choices": [{"index": 0, "text": "%d"}]}\n\n' % place
            yield b"data: [DONE]\n\n"
        finally:
            self.left.set()


@contextlib.asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[str]:
    """The address of an application on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(app, port=port, log_level="critical", http=HttpProtocol)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await running


def go(folder: Path, work: Callable[[httpx.AsyncClient, Real, object], Awaitable[None]], **bounds: float) -> None:
    async def whole() -> None:
        canary = Real()
        upstream = Starlette(routes=[Route("/v1/completions", canary.completions, methods=["POST"])])
        async with served(upstream) as url:
            both = {"stable": {"url": url}, "canary": {"url": url}}
            own = settings(policy=STEP, **both, sampling={"audit_frac": 0.0}, bounds=bounds)
            gateway = assemble(own, {"error_rate": 0.002}, Store.open(folder / "s.sqlite"), now=time.time())
            async with served(build(gateway)) as address, httpx.AsyncClient(base_url=address) as client:
                await work(client, canary, gateway)
            await gateway.stable.close()  # the server above ends without its lifespan
            await gateway.canary.close()

    asyncio.run(whole())


def test_tokens_arrive_while_the_next_is_still_being_written(tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        canary.go.release()
        async with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as answer:
            chunks = answer.aiter_raw()
            for place in range(4):
                chunk = await asyncio.wait_for(anext(chunks), 5)
                assert chunk == b'data: {"choices": [{"index": 0, "text": "%d"}]}\n\n' % place
                canary.go.release()
            rest = b"".join([chunk async for chunk in chunks])
            assert rest == b'data: {"choices": [{"index": 0, "text": "4"}]}\n\ndata: [DONE]\n\n'

    go(tmp_path, work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_frees_its_upstream(tmp_path: Path, stream: bool, begun: bool) -> None:
    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        if begun and stream:
            for _ in range(2):
                canary.go.release()
            async with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as answer:
                assert await anext(answer.aiter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json={**ASK, "stream": stream}, timeout=0.2)
        async with asyncio.timeout(5):
            await canary.left.wait()

    go(tmp_path, work)


def test_a_line_that_breaks_after_the_first_byte_is_cut_and_counted(tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        canary.breaks_after = 2
        for _ in range(3):
            canary.go.release()
        with pytest.raises(httpx.RemoteProtocolError):
            async with client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as answer:
                async for _ in answer.aiter_raw():
                    pass
        assert gateway.controller.counters.open.histogram("error_rate").mean == 1.0  # type: ignore[attr-defined]

    go(tmp_path, work)


def test_a_stream_that_falls_silent_is_cut_and_counted(tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        canary.go.release()
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/completions", json={**ASK, "stream": True}, timeout=20)
        assert gateway.controller.counters.open.histogram("error_rate").mean == 1.0  # type: ignore[attr-defined]
        await asyncio.wait_for(canary.left.wait(), 5)

    go(tmp_path, work, silence_s=0.1)


def test_headers_in_any_bytes_never_fail_an_upstream(tmp_path: Path) -> None:
    """Latin-1 in a header is passed on as well as it can be, a control character is the client's mistake."""

    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        for value, status in ((b"caf\xe9", 200), ("枝".encode(), 200), (b"a\x01b", 400)):
            for _ in range(5):
                canary.go.release()
            stream = {**ASK, "stream": True}
            answer = await client.post("/v1/completions", json=stream, headers={"x-name": value})
            assert answer.status_code == status, value
        assert gateway.controller.counters.open.histogram("error_rate").mean == 0  # type: ignore[attr-defined]

    go(tmp_path, work)


def test_a_head_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, canary: Real, gateway: object) -> None:
        answer = await client.get("/metrics", headers={"x-long": "a" * HEADER_BYTES})
        assert answer.status_code == 431
        with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            answer = await client.get("/metrics", headers={"x-long": "a" * 1_000_000})
            assert answer.status_code == 431
        assert (await client.get("/health")).status_code == 200

    go(tmp_path, work)
