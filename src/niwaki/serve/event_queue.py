"""The events of one job on the side of the network, each within its time.

inbox = Inbox(Timeouts())
engine.submit(Job(..., emit=inbox.put))
async for event in inbox.events():
    ...
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from niwaki.serve.http.api_errors import INTERNAL, OVERLOADED, RefusalError, too_late
from niwaki.serve.jobs import Event, Failed, Finished, Started


@dataclass(frozen=True)
class Timeouts:
    """Seconds from a request's arrival to its slot, from there to the first token, and to the end of the answer."""

    queue_s: float = 30.0
    first_token_s: float = 60.0
    total_s: float = 600.0


class Inbox:
    """Filled from the engine's thread, emptied by the loop it was made in."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._began = self._loop.time()

    def put(self, event: Event) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it those who would have read
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """All events up to the last. Raises RefusalError when one comes too late, or for a job that failed."""
        given, end = self.timeouts, self._began + self.timeouts.total_s
        until = min(self._began + given.queue_s, end)
        late = RefusalError(503, f"no slot was free within {given.queue_s:g} s", kind=OVERLOADED, retry_s=5)
        while True:
            try:
                async with asyncio.timeout_at(until):
                    event = await self._events.get()
            except TimeoutError:
                raise (late if until < end else too_late("the answer", given.total_s)) from None
            if isinstance(event, Failed):
                raise RefusalError(500, event.message, kind=INTERNAL)
            yield event
            if isinstance(event, Finished):
                return
            if isinstance(event, Started):
                until = min(self._loop.time() + given.first_token_s, end)
                late = too_late("the first token", given.first_token_s)
            else:
                until = end
