"""Text of tokens, one at a time: whole characters only, no part of a stop string, and a name for every token.

A character of several bytes can span several tokens, and so can a stop string. Text that can still become part of
either is held back until it is certain.

    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, ["\\n\\n"])
    text, stopped = detokenizer.feed(token)
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

REPLACEMENT = "\ufffd"  # stands in a decoded text for bytes that are not a character
MAX_PENDING = 32  # max tokens that wait for the rest of a character


class Detokenizer:
    """Detokenizer of one text, token by token. It leaves control tokens out unless `control_tokens` says otherwise."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), *, control_tokens: bool = False) -> None:
        self.tokenizer, self._skip = tokenizer, not control_tokens
        self._known = list(before[-1:])  # some decoders treat the first token of a text differently
        self._pending: list[int] = []
        if REPLACEMENT in self._text(self._known):
            self._known = []

    def feed(self, token: int) -> str:
        """Return the characters that are complete with this token."""
        self._pending.append(token)
        text = self._added()
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            return ""
        if text:
            self._known, self._pending = [] if text.endswith(REPLACEMENT) else self._pending, []
        return text

    def flush(self) -> str:
        """Return the rest, with replacement characters for incomplete ones."""
        text, self._pending = self._added(), []
        return text

    def _added(self) -> str:
        return self._text(self._known + self._pending)[len(self._text(self._known)) :]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))


class StopStrings:
    """Filter that passes text up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain, and True if a stop string was found. The text ends before it."""
        self._held += text
        starts = [start for stop in self.stops if (start := self._held.find(stop)) >= 0]
        if starts:
            shown, self._held = self._held[: min(starts)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return the text that was held back for a stop string that did not follow."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a start of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class IncrementalDetokenizer:
    """Detokenizer and stop strings of one answer."""

    def __init__(self, tokenizer: Any, before: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer, before), StopStrings(stops)

    def feed(self, token: int) -> tuple[str, bool]:
        """Return the text that is certain with this token, and True if the answer ends."""
        return self._stops.feed(self._detokenizer.feed(token))

    def flush(self) -> tuple[str, bool]:
        """Return the rest of the text, and True if it ends with a stop string."""
        text, stopped = self._stops.feed(self._detokenizer.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


class TokenNames:
    """Names of tokens in lists of log-probabilities: their text, or their bytes if these are not text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.encode("a", add_special_tokens=False)
        self._anchor = ids[-1:]
        self.of = lru_cache(maxsize=65536)(self._of)

    def _of(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        """Return name and bytes. The bytes are None if the tokenizer does not give them."""
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, token])[len(before) :]
        if REPLACEMENT not in text:
            return text, tuple(text.encode())
        raw = _token_bytes(str(self.tokenizer.convert_ids_to_tokens(token)))
        if raw is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """Return the letter of each byte in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _token_bytes(raw: str) -> bytes | None:
    """Return the bytes of a raw token of a byte-fallback or byte-level vocabulary, None for any other."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", raw):
        return bytes([int(match[1], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in raw) if all(letter in letters for letter in raw) else None
