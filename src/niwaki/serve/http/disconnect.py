"""Work for a client that may disconnect: the work ends with the connection.

reply = await run_until_disconnect(request.receive, answer())
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

CLIENT_CLOSED = 499  # status of a request whose client disconnected. No client receives it
T = TypeVar("T")


class DisconnectedError(Exception):
    """Error of work whose client disconnected."""


async def run_until_disconnect(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """Return the result of `work`. Cancel it and raise DisconnectedError if the client disconnects first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)  # its connections are closed now
            raise DisconnectedError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
