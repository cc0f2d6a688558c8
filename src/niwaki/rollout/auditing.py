"""Runs audits and keeps what they show: in the counts, in the drift alarm, in the store.

Numbers are always kept. Texts (the prompt, the answer, the tokens on which the models differ) are kept only if that was
asked for (`Sampling.keep_texts`): on the dashboard and in the store, from which `niwaki rollout export` writes them for
`niwaki adapt`.

    await auditor.audit(controller, model, prompt, answer, "served")
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from niwaki.errors import OutputError
from niwaki.rollout.answers import UnreadError
from niwaki.rollout.controller import Controller
from niwaki.rollout.scoring import Audit, audit
from niwaki.rollout.store import Store
from niwaki.rollout.upstream import Server

log = logging.getLogger("niwaki.rollout")


@dataclass(frozen=True)
class Auditor:
    """Both servers, and where the results go."""

    stable: Server
    canary: Server
    store: Store
    keep_texts: bool
    now: Callable[[], float] = time.time

    async def audit(self, controller: Controller, model: str, prompt: str, answer: str, how: str) -> None:
        """Audits one answer, `served` to a user or a `shadow`."""
        try:
            found = await audit(self.stable, self.canary, model, prompt, answer)
        except UnreadError as unread:
            controller.ledger.skip(f"not audited: {unread}")
            return
        controller.ledger.audited(found.values())
        controller.watch.add(prompt, found.top1_agreement, controller.ledger.open.number)
        texts = _texts(prompt, answer, found) if self.keep_texts else None
        try:
            await asyncio.to_thread(
                self.store.add_audit, controller.state, self.now(), how, found.tokens, found.values(), texts
            )
        except OutputError as error:
            log.error("%s", error)


def _texts(prompt: str, answer: str, found: Audit) -> dict[str, object]:
    return {"prompt": prompt, "answer": answer, "places": [list(place) for place in found.places]}
