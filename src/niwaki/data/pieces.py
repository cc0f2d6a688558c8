"""Tokens of a long text, piece by piece, equal to those of the whole text.

A piece is read with `MARGIN_CHARS` of the text around it. Neighbours overlap, and both tokenize the overlap. They are
joined at a seam, in a stretch of `MARGIN_CHARS` with the same tokens in both. There, both have a token boundary between
characters of different kinds. Without such a seam (thousands of digits or spaces, a text without spaces)
the piece grows, up to the whole text. So the tokens are always those of the whole text, provided that
what lies further away than half a margin cannot change them.

Time and memory go with the tokens that are taken, plus one piece. A text up to `PIECE_CHARS` is tokenized whole. So is
one of a tokenizer that does not say where its tokens lie (`is_fast`).

    for ids in token_pieces([text], tokenizer): ...
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

PIECE_CHARS = 2**16
MARGIN_CHARS = 2**11
_Token = tuple[int, int, int]  # id, first character, last + 1


def token_pieces(parts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens of the text that `parts` make, without special tokens."""
    reader = _Reader(parts)
    if not tokenizer.is_fast or reader.reach(PIECE_CHARS + 1) <= PIECE_CHARS:
        # verbose=False: documents longer than the model are cut into windows, so no warning is due
        yield tokenizer(reader.rest(), add_special_tokens=False, verbose=False)["input_ids"]
        return
    start, seam, end = 0, 0, PIECE_CHARS
    tokens = _tokens(reader, start, end, tokenizer)
    while reader.reach(end + 1) > end:
        next_start = end - 2 * MARGIN_CHARS
        next_end = reader.reach(next_start + PIECE_CHARS)
        following = _tokens(reader, next_start, next_end, tokenizer)
        found = _seam(reader, tokens, following, end - MARGIN_CHARS)
        if found is None:
            end = reader.reach(end + (end - start))
            tokens = _tokens(reader, start, end, tokenizer)
            continue
        yield [token[0] for token in tokens if seam <= token[1] < found]
        start, seam, end, tokens = next_start, found, next_end, following
        reader.drop(start)
    yield [token[0] for token in tokens if seam <= token[1]]


class _Reader:
    """Text that is read as far as it is needed. Places count from its beginning."""

    def __init__(self, parts: Iterable[str]) -> None:
        starts = ((part, start) for part in parts for start in range(0, len(part), PIECE_CHARS))
        self._parts = (part[start : start + PIECE_CHARS] for part, start in starts)
        self._text, self._dropped = "", 0

    def reach(self, end: int) -> int:
        """Read on up to `end`, and return it, or the length of a shorter text."""
        read = [self._text]
        length = self._dropped + len(self._text)
        while length < end and (part := next(self._parts, None)) is not None:
            read.append(part)
            length += len(part)
        self._text = "".join(read)
        return min(length, end)

    def slice(self, start: int, end: int) -> str:
        """Return the text between two places that were reached."""
        return self._text[start - self._dropped : end - self._dropped]

    def drop(self, start: int) -> None:
        """Free the text before `start`."""
        self._text, self._dropped = self._text[start - self._dropped :], start

    def rest(self) -> str:
        """Return all text that was not dropped."""
        return self._text + "".join(self._parts)


def _tokens(reader: _Reader, start: int, end: int, tokenizer: Any) -> list[_Token]:
    text = reader.slice(start, end)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [(token, start + first, start + last) for token, (first, last) in spans]


def _seam(reader: _Reader, before: list[_Token], after: list[_Token], middle: int) -> int | None:
    """Return the place nearest to `middle` where two pieces can be joined, None if there is none."""
    low, high = middle - MARGIN_CHARS // 2, middle + MARGIN_CHARS // 2
    left, right = ([token for token in tokens if low <= token[1] < high] for tokens in (before, after))
    if left != right:
        return None
    places = [
        first
        for (_, first_before, last_before), (_, first, _) in pairwise(left)
        if first > first_before and first >= last_before and _differ(*reader.slice(first - 1, first + 1))
    ]
    return min(places, key=lambda place: abs(place - middle), default=None)


def _differ(left: str, right: str) -> bool:
    """Check that two characters are of different kinds: letter or digit, space, other."""
    return left.isalnum() != right.isalnum() or left.isspace() != right.isspace()
