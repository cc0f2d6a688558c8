"""Queue of the events of one job, from the thread of the engine to the loop of the network, with timeouts.

events = EventQueue(Timeouts())
engine.submit(Job(..., emit=events.put))
async for event in events.receive():
    ...
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from niwaki.serve.http.api_errors import INTERNAL, OVERLOADED, RefusalError, timed_out
from niwaki.serve.jobs import Event, Failed, Finished, Started


@dataclass(frozen=True)
class Timeouts:
    """Max seconds from the arrival of a request to its slot, from there to the first token, and to the last one."""

    queue_s: float = 30.0
    first_token_s: float = 60.0
    total_s: float = 600.0


class EventQueue:
    """Events of one job: any thread puts them, the loop that made the queue receives them."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._began = self._loop.time()

    def put(self, event: Event) -> None:
        """Add an event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop ended, and with it the receiver
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def receive(self) -> AsyncIterator[Event]:
        """Yield the events up to the last. Raise RefusalError if one is too late or the job failed."""
        timeouts, end = self.timeouts, self._began + self.timeouts.total_s
        until = min(self._began + timeouts.queue_s, end)
        late = RefusalError(503, f"no slot was free within {timeouts.queue_s:g} s", kind=OVERLOADED, retry_s=5)
        while True:
            try:
                async with asyncio.timeout_at(until):
                    event = await self._events.get()
            except TimeoutError:
                raise (late if until < end else timed_out("the answer", timeouts.total_s)) from None
            if isinstance(event, Failed):
                raise RefusalError(500, event.message, kind=INTERNAL)
            yield event
            if isinstance(event, Finished):
                return
            if isinstance(event, Started):
                until = min(self._loop.time() + timeouts.first_token_s, end)
                late = timed_out("the first token", timeouts.first_token_s)
            else:
                until = end
