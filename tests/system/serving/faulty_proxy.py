"""Proxy before a server: a share of its answers is 500, and the others take some times as long.

python -m tests.system.serving.faulty_proxy PORT SERVER_PORT ERRORS SLOW
"""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def proxy(port: int, url: str, errors: float, slow: float) -> None:
    """Serve a proxy: a share of 500s, and answers that take `slow` times as long."""
    rng = random.Random(1)

    async def passed(request: Request) -> Response:
        body, began = await request.body(), time.perf_counter()
        if request.method == "POST" and rng.random() < errors:
            return JSONResponse({"error": {"message": "injected"}}, 500)
        session = aiohttp.ClientSession()
        answer = await session.request(
            request.method, url + request.url.path, data=body, headers={"content-type": "application/json"}
        )

        async def chunks() -> AsyncIterator[bytes]:
            async with session, answer:
                arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

                async def read() -> None:
                    while chunk := await answer.content.readany():
                        arrived.put_nowait((time.perf_counter(), chunk))
                    arrived.put_nowait((time.perf_counter(), b""))

                reading = asyncio.create_task(read())
                while True:
                    at, chunk = await arrived.get()
                    await asyncio.sleep(max(began + slow * (at - began) - time.perf_counter(), 0))
                    if not chunk:
                        break
                    yield chunk
                await reading

        return StreamingResponse(chunks(), answer.status, media_type=answer.content_type)

    app = Starlette(routes=[Route("/{path:path}", passed, methods=["GET", "POST"])])
    uvicorn.run(app, port=port, log_level="error")


if __name__ == "__main__":
    port, server, errors, slow = sys.argv[1:]
    proxy(int(port), f"http://127.0.0.1:{server}", float(errors), float(slow))
