"""The API keys that a server of ours accepts, and where they come from.

Keys are kept and compared as digests, all of them, in constant time: how long an answer takes tells nothing of a key.

    keys = Keys(read_keys(Path("keys.txt")))
    keys.accept("Bearer secret")
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from niwaki.errors import InputError

ENVIRONMENT = "NIWAKI_API_KEYS"


class Keys:
    """Digests of the keys that are accepted; without any every request is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Whether a header holds one of them: `Bearer KEY`, or as the password that a browser asks for."""
        if not self:
            return True
        given = _digest(_key_in(authorization))
        found = [hmac.compare_digest(given, known) for known in self._digests]  # all, whichever it is
        return any(found)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line, and from the environment, separated by commas. Raises InputError for none in it."""
    found = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InputError(f"cannot read the keys in {file}: {reason}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file} holds no key: expected one a line")
        found += keys
    return tuple(key for key in found if key)


def _key_in(header: str) -> str:
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
