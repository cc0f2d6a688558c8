"""Tokens as text, one at a time: no half characters, no part of a stop string, and a name for every token.

A character of several bytes can lie in several tokens, and a stop string across any number of them: what may still
become either is held back until it is decided.

    spoken = Spoken(tokenizer, prompt_ids, ["\\n\\n"])
    text, stopped = spoken.feed(token)
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BROKEN = "\ufffd"  # what decoders put where bytes make no character
MAX_PENDING = 32  # tokens that may wait for the rest of a character before they are shown as they are


class Detokenizer:
    """What each token adds to the text of those before it."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._known = list(before[-1:])  # some decoders treat the first token of a text differently
        self._pending: list[int] = []
        if BROKEN in self._text(self._known):
            self._known = []

    def feed(self, token: int) -> str:
        """The characters that are complete with this token."""
        self._pending.append(token)
        text = self._added()
        if text.endswith(BROKEN) and len(self._pending) < MAX_PENDING:
            return ""
        if text:
            self._known, self._pending = [] if text.endswith(BROKEN) else self._pending, []
        return text

    def flush(self) -> str:
        """The rest, complete or not."""
        text, self._pending = self._added(), []
        return text

    def _added(self) -> str:
        return self._text(self._known + self._pending)[len(self._text(self._known)) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Stops:
    """Lets text through up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What can be shown now, and whether a stop string was met; it and all behind it are not shown."""
        self._held += text
        met = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if met:
            shown, self._held = self._held[: min(met)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class IncrementalDetokenizer:
    """Both together, for one answer."""

    def __init__(self, tokenizer: Any, before: Sequence[int], stops: Sequence[str]) -> None:
        self._words, self._stops = Detokenizer(tokenizer, before), Stops(stops)

    def feed(self, token: int) -> tuple[str, bool]:
        """What can be shown after this token, and whether the answer ends with it."""
        return self._stops.feed(self._words.feed(token))

    def flush(self) -> tuple[str, bool]:
        """What is left to show when no token follows."""
        text, stopped = self._stops.feed(self._words.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


class Names:
    """How tokens are called in lists of log-probabilities: by their text, or by their bytes where these are no text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.encode("a", add_special_tokens=False)
        self._anchor = ids[-1:]
        self.of = lru_cache(maxsize=65536)(self._of)

    def _of(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        """Name and bytes (None if the tokenizer does not tell them)."""
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, token])[len(before) :]
        if BROKEN not in text:
            return text, tuple(text.encode())
        found = _bytes_of(str(self.tokenizer.convert_ids_to_tokens(token)))
        if found is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), tuple(found)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _bytes_of(raw: str) -> bytes | None:
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", raw):
        return bytes([int(found[1], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in raw) if all(letter in letters for letter in raw) else None
