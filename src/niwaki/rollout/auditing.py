"""Audits in the background, whose results go to the counters, the drift tests and the store.

Numbers are always kept. Texts are the prompt, the answer and the tokens on which the models differ. The dashboard and
the store keep them only with `TrafficSampling.keep_texts`. `niwaki rollout export` writes them for `niwaki adapt`.

    background.submit("audit", 2, lambda: auditor.audit(controller, model, prompt, answer, "served"))
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from niwaki.rollout.answers import UnreadableError
from niwaki.rollout.controller import Controller
from niwaki.rollout.scoring import Audit, audit
from niwaki.rollout.upstream import UpstreamServer

log = logging.getLogger("niwaki.rollout")


class Background:
    """Work in the background: a limited number of tasks per kind. No answer waits for them."""

    def __init__(self) -> None:
        self.running: dict[str, set[asyncio.Task[None]]] = {}
        self.done: Counter[str] = Counter()

    def submit(self, kind: str, limit: int, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Start `work`, or return False if `limit` tasks of its kind are running.

        The task itself calls `work`, so a task that is cancelled before its first step has made no coroutine.
        """
        tasks = self.running.setdefault(kind, set())
        if len(tasks) >= limit:
            return False
        task = asyncio.create_task(self._run(kind, work))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return True

    async def idle(self) -> None:
        """Wait until all tasks are done, including those that other tasks start."""
        while tasks := [task for kind in self.running.values() for task in kind]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Cancel all tasks."""
        tasks = [task for kind in self.running.values() for task in kind]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, kind: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
            self.done[kind] += 1
        except Exception as error:  # the text of an error may hold prompts, its type does not
            log.error("%s failed: %s", kind, type(error).__name__)


@dataclass(frozen=True)
class Auditor:
    """Both servers that are audited. The journal of the controller stores the results.

    `bos`: name of the beginning-of-text token in rendered chats, "" if they have none, None if the servers add it.
    """

    stable: UpstreamServer
    canary: UpstreamServer
    keep_texts: bool
    bos: str | None = None
    now: Callable[[], float] = time.time

    async def audit(
        self, controller: Controller, model: str, prompt: str, answer: str, how: str, *, rendered: bool = False
    ) -> None:
        """Run the audit of one answer. `how` is `served` for an answer to a client, `shadow` for one to a copy.

        `rendered`: the prompt is a chat that the chat template rendered.
        """
        complete = rendered and self.bos is not None
        try:
            result = await audit(self.stable, self.canary, model, prompt, answer, complete=complete)
        except UnreadableError as unread:
            controller.counters.count_skipped(f"not audited: {unread}")
            return
        prompt = prompt.removeprefix(self.bos or "") if complete else prompt
        controller.counters.add_audit(result.values())
        controller.watch.add(prompt, result.top1_agreement, controller.counters.open.number)
        texts = _texts(prompt, answer, result) if self.keep_texts else None
        keep = partial(controller.store.add_audit, controller.state, self.now(), how, result.tokens)
        controller.journal.submit("audit", partial(keep, result.values(), texts))


def _texts(prompt: str, answer: str, result: Audit) -> dict[str, object]:
    return {"prompt": prompt, "answer": answer, "places": [list(place) for place in result.places]}
