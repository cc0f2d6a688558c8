"""API keys that a server accepts, from a file and from the environment.

Keys are kept as digests. Each request is compared with all of them in constant time, so its time reveals no key.

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
    """Digests of the accepted keys. Without keys every request is accepted."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Check that a header holds an accepted key, as `Bearer KEY` or as the password of a browser."""
        if not self:
            return True
        given = _digest(_key_of(authorization))
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them, for constant time
        return any(matches)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, one per line, and of the environment. Raise InputError for a file without keys."""
    all_keys = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InputError(f"cannot read the keys in {file}: {reason}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file} holds no key: expected one per line")
        all_keys += keys
    return tuple(key for key in all_keys if key)


def _key_of(header: str) -> str:
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
