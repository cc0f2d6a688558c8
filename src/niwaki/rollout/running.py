"""Assembly of a gateway from its settings, and its process.

run(settings, limits, Store.open("rollout.sqlite"), keys=(), host="127.0.0.1", port=8100)
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import uvicorn
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from niwaki.errors import InputError
from niwaki.rollout.answers import Template
from niwaki.rollout.app import build
from niwaki.rollout.auditing import Auditor
from niwaki.rollout.gateway import Gateway
from niwaki.rollout.http_client import HttpSender
from niwaki.rollout.settings import RolloutSettings
from niwaki.rollout.start import begin_or_resume
from niwaki.rollout.store import Store
from niwaki.rollout.upstream import Clock, UpstreamServer
from niwaki.serve.http.keys import Keys
from niwaki.serve.http.limits import check_host, check_port
from niwaki.serve.http.protocol import HttpProtocol

TEMPLATE_CHARACTERS = 100_000


def run(
    settings: RolloutSettings,
    limits: Mapping[str, float],
    store: Store,
    *,
    keys: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8100,
    new: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Run the gateway until it is stopped. Raise InputError before the roll-out starts."""
    check_host(host, keys)
    check_port(host, port)
    gateway = assemble(settings, limits, store, keys=keys, now=time.time(), new=new)
    state = gateway.controller.state
    say(f"roll-out {state.id}, {state.status}: {gateway.controller.share:.0%} of requests to the canary")
    say(f"gateway: http://{host}:{port}/v1   dashboard: http://{host}:{port}/rollout")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    uvicorn.run(
        build(gateway),
        host=host,
        port=port,
        http=HttpProtocol,
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
    controller = begin_or_resume(store, settings, limits, now, new=new)
    return Gateway(
        settings=settings,
        controller=controller,
        stable=stable,
        canary=canary,
        keys=Keys(keys),
        auditor=Auditor(stable, canary, store, settings.sampling.keep_texts, bos),
        template=template,
    )


def token_names(*folders: Path | None) -> dict[str, str] | None:
    """Return the names of begin and end token from the first tokenizer_config.json, "" for none; None without one."""
    for folder in folders:
        path = None if folder is None else folder / "tokenizer_config.json"
        if path is None or not path.is_file():
            continue
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            found = {name: described.get(name) or "" for name in ("bos_token", "eos_token")}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"cannot read {path}: expected the config of a tokenizer as JSON") from error
        return {name: str(value["content"] if isinstance(value, dict) else value) for name, value in found.items()}
    return None


def read_template(path: Path, names: Mapping[str, str] = MappingProxyType({})) -> Template:
    """Return the chat template in a file, which is rendered in a sandbox. Raise InputError if it does not work.

    `names`: those of begin and end token. Without them a chat has neither, and the server puts the begin token.
    """
    names = {"bos_token": "", "eos_token": "", **names}
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > TEMPLATE_CHARACTERS:
            raise InputError(f"{path}: expected a template of at most {TEMPLATE_CHARACTERS} characters")
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)

        def render(messages: list[dict[str, str]]) -> str:
            return template.render(messages=messages, add_generation_prompt=True, **names)

        render([{"role": "user", "content": "?"}])
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise InputError(f"cannot use the chat template {path}: {str(error).splitlines()[0]}") from error
    return render
