"""Work beside the answers: so many at a time, dropped and counted when more comes, never waited for.

background.submit("shadow", most=4, work=copy())  ->  False if it was dropped
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("niwaki.rollout")


class Background:
    """Running work by kind."""

    def __init__(self) -> None:
        self.running: dict[str, set[asyncio.Task[None]]] = {}
        self.done: Counter[str] = Counter()

    def submit(self, kind: str, most: int, work: Coroutine[Any, Any, None]) -> bool:
        """Starts `work` unless `most` of its kind are running."""
        tasks = self.running.setdefault(kind, set())
        if len(tasks) >= most:
            work.close()
            return False
        task = asyncio.create_task(self._guarded(kind, work))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return True

    async def idle(self) -> None:
        """Waits until everything is done, what work starts itself included."""
        while tasks := [task for kind in self.running.values() for task in kind]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Ends everything."""
        tasks = [task for kind in self.running.values() for task in kind]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _guarded(self, kind: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
            self.done[kind] += 1
        except Exception as error:  # no answer depends on it; the text may hold prompts, the kind does not
            log.error("%s failed: %s", kind, type(error).__name__)
