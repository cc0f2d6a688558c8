"""Assembly of a gateway from its settings, and its process.

run(settings, limits, Store.open("rollout.sqlite"), keys=(), host="127.0.0.1", port=8100)
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import uvicorn

from niwaki.rollout.app import build
from niwaki.rollout.auditing import Auditor
from niwaki.rollout.chat_template import read_template, token_names
from niwaki.rollout.dense_mark import mark_of
from niwaki.rollout.gateway import Gateway
from niwaki.rollout.http_client import HttpSender
from niwaki.rollout.settings import RolloutSettings
from niwaki.rollout.start import begin_or_resume
from niwaki.rollout.store import Store
from niwaki.rollout.upstream import Clock, UpstreamServer
from niwaki.serve.http.keys import Keys
from niwaki.serve.http.limits import check_host, check_port
from niwaki.serve.http.protocol import ConnectionLimits, limited_protocol


def run(
    settings: RolloutSettings,
    limits: Mapping[str, float],
    store: Store,
    *,
    keys: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8100,
    new: bool = False,
    dense_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run the gateway until it is stopped. Raise InputError before the roll-out starts."""
    check_host(host, keys)
    check_port(host, port)
    gateway = assemble(settings, limits, store, keys=keys, now=time.time(), new=new, dense_file=dense_file)
    state = gateway.controller.state
    say(f"roll-out {state.id}, {state.status}: {gateway.controller.share:.0%} of requests to the canary")
    say(f"gateway: http://{host}:{port}/v1   dashboard: http://{host}:{port}/rollout")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    bounds = settings.bounds
    connections = ConnectionLimits(bounds.connections, bounds.connections_per_address)
    uvicorn.run(
        build(gateway),
        host=host,
        port=port,
        http=limited_protocol(connections, gateway.count_refusal),
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=90,
    )


def assemble(
    settings: RolloutSettings,
    limits: Mapping[str, float],
    store: Store,
    *,
    keys: Sequence[str] = (),
    now: float,
    new: bool = False,
    dense_file: Path | None = None,
    senders: tuple[HttpSender | None, HttpSender | None] = (None, None),
    clock: Clock = time.perf_counter,
) -> Gateway:
    """Return a gateway with a new or a resumed roll-out. Tests pass `senders` of both sides and a `clock`."""
    stable = UpstreamServer(settings.stable, settings.bounds, sender=senders[0], clock=clock)
    canary = UpstreamServer(settings.canary, settings.bounds, sender=senders[1], clock=clock)
    template, bos = None, None
    if settings.chat_template is not None:
        names = token_names(settings.chat_template.parent, settings.canary.files)
        template = read_template(settings.chat_template, names or {})
        bos = None if names is None else names["bos_token"]
    mark = mark_of(store.where, dense_file)
    mark.check()
    controller = begin_or_resume(store, settings, limits, now, new=new, mark=mark)
    return Gateway(
        settings=settings,
        controller=controller,
        stable=stable,
        canary=canary,
        keys=Keys(keys),
        auditor=Auditor(stable, canary, settings.sampling.keep_texts, bos),
        template=template,
    )
