"""Route of a request: a stable hash chooses the upstream, and important requests stay on dense.

A key is hashed to a position in [0, 1). It goes to the canary if the position lies below the share. When the share
grows, users of the canary stay there and others join. When it falls to 0, all users are on dense. Each roll-out has its
own salt, so that different users meet each canary first.

A pattern of an important request may take forever on some prompt. So patterns have `PATTERN_S` for one request, and
`regex` lets other threads run meanwhile. A request that is not decided by then is important: dense is the safe side.

    choose(RoutedRequest(...), share=0.05, salt="7", important=())  ->  Route("canary", "share")
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex

from niwaki.rollout.settings import Important

Side = Literal["stable", "canary"]
PATTERN_S = 0.2
UNDECIDED = "important: its rules took too long"


@dataclass(frozen=True)
class RoutedRequest:
    """Parts of a request that its route depends on. `prompt`: all its text. `key`: text that is hashed."""

    model: str
    prompt: str
    headers: Mapping[str, str]
    key: str


@dataclass(frozen=True)
class Route:
    """Side that answers a request, with the reason. An `important` request is not part of the roll-out."""

    side: Side
    reason: str
    important: bool = False


def choose(request: RoutedRequest, *, share: float, salt: str, important: Sequence[Important]) -> Route:
    """Return the route of a request at a share of traffic between 0 and 1."""
    until = time.monotonic() + PATTERN_S
    for number, rule in enumerate(important, 1):
        try:
            found = matches(rule, request, until)
        except TimeoutError:
            return Route("stable", UNDECIDED, important=True)
        if found:
            return Route("stable", f"important by rule {number}", important=True)
    return Route("canary" if position(request.key, salt) < share else "stable", "share")


def position(key: str, salt: str) -> float:
    """Return the position of a key in [0, 1)."""
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), key=salt.encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def matches(rule: Important, request: RoutedRequest, until: float) -> bool:
    """Check that every condition of a rule holds. Raise TimeoutError at the time `until` of the monotonic clock."""
    if rule.min_characters is not None and len(request.prompt) < rule.min_characters:
        return False
    if rule.header is not None:
        name, _, pattern = rule.header.partition(":")
        value = request.headers.get(name.strip().lower())
        if value is None or not _found(pattern.strip(), value, until):
            return False
    if rule.model is not None and not _found(rule.model, request.model, until):
        return False
    return rule.prompt is None or _found(rule.prompt, request.prompt, until)


def _found(pattern: str, text: str, until: float) -> bool:
    """Search a text for a pattern, without holding up other threads."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return regex.search(pattern, text, timeout=left, concurrent=True) is not None


def sticky_key(payload: Mapping[str, Any], headers: Mapping[str, str], header: str, first_text: str) -> str:
    """Return the key of a request: the header, `user` of the body, or the start of its conversation."""
    given = headers.get(header.lower())
    if given:
        return f"header {given}"
    user = payload.get("user")
    if isinstance(user, str) and user:
        return f"user {user}"
    return f"text {first_text[:1000]}"
