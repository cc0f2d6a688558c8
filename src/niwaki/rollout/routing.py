"""Which upstream answers a request: a stable hash decides, important requests stay on dense.

A key falls on a place in [0, 1) and goes to the canary if the place lies below the share. When the share widens, those
who were on the canary stay there and others join; when it falls to 0, all are on dense. Every roll-out has a salt of
its own, so that not the same users meet every canary first.

    choose(Ask(...), share=0.05, salt="7", important=())  ->  Route("canary", "share")
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from niwaki.rollout.settings import Important

Side = Literal["stable", "canary"]


@dataclass(frozen=True)
class Ask:
    """What a request says that routing goes by. `prompt`: all its text; `key`: what makes it sticky."""

    model: str
    prompt: str
    headers: Mapping[str, str]
    key: str


@dataclass(frozen=True)
class Route:
    """Where a request goes, and why; `important`: it is no part of the roll-out."""

    side: Side
    why: str
    important: bool = False


def choose(ask: Ask, *, share: float, salt: str, important: Sequence[Important]) -> Route:
    """The side of a request at a share of traffic between 0 and 1."""
    for number, rule in enumerate(important, 1):
        if matches(rule, ask):
            return Route("stable", f"important by rule {number}", important=True)
    return Route("canary" if place(ask.key, salt) < share else "stable", "share")


def place(key: str, salt: str) -> float:
    """Where a key falls in [0, 1)."""
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def matches(rule: Important, ask: Ask) -> bool:
    """Whether every condition of a rule holds."""
    if rule.header is not None:
        name, _, pattern = rule.header.partition(":")
        value = ask.headers.get(name.strip().lower())
        if value is None or not re.search(pattern.strip(), value):
            return False
    if rule.model is not None and not re.search(rule.model, ask.model):
        return False
    if rule.prompt is not None and not re.search(rule.prompt, ask.prompt):
        return False
    return rule.min_characters is None or len(ask.prompt) >= rule.min_characters


def sticky_key(payload: Mapping[str, Any], headers: Mapping[str, str], header: str, first_text: str) -> str:
    """What a request is known by: the header, `user` of the body, or how its conversation began."""
    given = headers.get(header.lower())
    if given:
        return f"header {given}"
    user = payload.get("user")
    if isinstance(user, str) and user:
        return f"user {user}"
    return f"text {first_text[:1000]}"
