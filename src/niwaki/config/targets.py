"""Targets: the goal of a compression for one matrix, and the text that asks for it.

parse_target("2:4")
parse_target("2:4+4bit")
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from niwaki.errors import InputError, TargetError

BYTE_ROUNDING = 1e-6  # bytes below a whole one that floating point may lose


@dataclass(frozen=True)
class Sparsity:
    """Unstructured sparsity: the fraction of weights that become zero, 0 < zeros_frac < 1."""

    words: ClassVar[str] = "a share of zeros"
    example: ClassVar[str] = "0.5"

    zeros_frac: float

    def __str__(self) -> str:
        return f"{self.zeros_frac:g}"

    @property
    def columns_multiple(self) -> int:
        """Return 1: the mask fits any number of columns."""
        return 1

    def zeros_in(self, rows: int, columns: int) -> int:
        """Return the exact number of zeros in a matrix of this shape."""
        return round(self.zeros_frac * rows * columns)


@dataclass(frozen=True)
class NM:
    """N:M sparsity: `keep` weights stay of every `group` neighbours along the inputs.

    `zeros_frac`: the share of zeros of a matrix in which the groups of columns that would lose most stay dense.
    """

    words: ClassVar[str] = "N:M"
    example: ClassVar[str] = "2:4"

    keep: int
    group: int
    zeros_frac: float | None = None

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" + ("" if self.zeros_frac is None else f"@{self.zeros_frac:g}")

    @property
    def whole(self) -> "NM":
        """Return the target of a matrix in which no group stays dense."""
        return NM(self.keep, self.group)

    def pruned_groups(self, columns: int) -> int:
        """Return the number of groups of columns that are N:M."""
        share = 1.0 if self.zeros_frac is None else self.zeros_frac * self.group / (self.group - self.keep)
        return round(share * (columns // self.group))

    @property
    def columns_multiple(self) -> int:
        """Return the number that must divide the columns of a matrix."""
        return self.group

    def zeros_in(self, rows: int, columns: int) -> int:
        """Return the exact number of zeros in a matrix of this shape. Raises TargetError if the groups do not fit."""
        if columns % self.group:
            raise TargetError(
                f"target {self} needs a multiple of {self.group} inputs, got a matrix with {columns}: "
                "use another N:M or an unstructured target such as 0.5"
            )
        return rows * self.pruned_groups(columns) * (self.group - self.keep)


CODE_WIDTHS = (2, 3, 4, 8)  # of codes that all have one width


@dataclass(frozen=True)
class Bits:
    """Quantization: bits per weight.

    A method with one code width takes this width. A mixed method counts everything that it stores.
    """

    words: ClassVar[str] = "bits"
    example: ClassVar[str] = "4bit"

    bits: float

    def __str__(self) -> str:
        return f"{self.bits:g}bit"

    @property
    def columns_multiple(self) -> int:
        """Return 1: any number of columns fits."""
        return 1

    def bytes_in(self, rows: int, columns: int) -> int:
        """Return the whole bytes of a matrix. Bits that were made from bytes come back as these bytes."""
        return math.floor(self.bits * rows * columns / 8 + BYTE_ROUNDING)

    def zeros_in(self, rows: int, columns: int) -> int:
        """Return 0: quantization asks for no zeros."""
        return 0


@dataclass(frozen=True)
class PrunedBits:
    """Zeros and codes in one record: first `zeros`, then codes of `bits` for the kept weights.

    Each step of a chain meets its own part.
    """

    words: ClassVar[str] = "zeros and bits"
    example: ClassVar[str] = "2:4+4bit"

    zeros: Sparsity | NM
    bits: Bits

    def __str__(self) -> str:
        return f"{self.zeros}+{self.bits}"

    @property
    def columns_multiple(self) -> int:
        """Return the number that must divide the columns of a matrix."""
        return self.zeros.columns_multiple

    def zeros_in(self, rows: int, columns: int) -> int:
        """Return the number of zeros of the mask. Kept weights that round to zero add to it."""
        return self.zeros.zeros_in(rows, columns)


Kind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class PrunableUnit:
    """A prunable unit kind of a block: `count` groups of columns of the matrix `consumer`.

    Rows of each producer make a group (see `niwaki.model.prunable`). `kind`: `neurons` of a dense layer, or `heads`
    that share a key and a value.
    """

    kind: Kind
    consumer: str
    producers: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class KeepUnits:
    """Structured target: `count` groups of a unit stay.

    With `cut` the other groups leave the file. Without it they are stored as zeros.
    """

    words: ClassVar[str] = "heads or neurons that stay"
    example: ClassVar[str] = ""

    unit: PrunableUnit
    count: int
    cut: bool = True

    def __str__(self) -> str:
        return f"{self.count} of {self.unit.count} {self.unit.kind}"

    @property
    def columns_multiple(self) -> int:
        """Return 1: any number of columns fits."""
        return 1

    def zeros_in(self, rows: int, columns: int) -> int:
        """Return 0: a structured target is not a number of zeros."""
        return 0


Target = Sparsity | NM | Bits | PrunedBits | KeepUnits
WRITTEN_TARGETS: tuple[type[Target], ...] = (Sparsity, NM, Bits, PrunedBits)  # those that a text can ask for
WRITTEN_TARGETS_HELP = f"One of: {', '.join(f'{kind.words} ({kind.example})' for kind in WRITTEN_TARGETS)}."
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTE_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("IB", 1024))
}


def target_example(kind: type[Target]) -> str:
    """Return a kind of target in words, with an example of its text."""
    return f"{kind.words} such as {kind.example}" if kind.example else kind.words


def parse_target(text: str) -> Target:
    """Parse `0.5`, `50%`, `2:4`, `2:4@0.45`, `4bit` or `2:4+4bit`. Raises TargetError for any other text."""
    text = text.strip()
    if "+" in text:
        return _parse_both(text)
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)[ -]?bits?", text):
        bits = float(found[1])
        if not 1 <= bits <= 8:
            raise TargetError(f"target {text}: expected 1 to 8 bits per weight, for example 4bit or 1.7bit")
        return Bits(bits)
    if found := re.fullmatch(r"(\d+):(\d+)(?:@(.*))?", text):
        return _parse_groups(text, int(found[1]), int(found[2]), found[3])
    try:
        zeros_frac = _share(text)
    except ValueError as error:
        raise TargetError(f"target {text!r}: expected {', '.join(map(target_example, WRITTEN_TARGETS))}") from error
    if not (math.isfinite(zeros_frac) and 0 < zeros_frac < 1):
        percent = 1 < zeros_frac < 100 and not text.endswith("%")
        hint = f"write {text}% or {zeros_frac / 100:g}" if percent else "for example 0.5 or 50%"
        raise TargetError(f"target {text}: a share of zeros lies between 0 and 1, {hint}")
    return Sparsity(zeros_frac)


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _parse_groups(text: str, keep: int, group: int, share: str | None) -> NM:
    """Return an N:M target, of a part of the columns if a share of zeros follows."""
    if not 0 < keep < group:
        raise TargetError(f"target {text}: expected N:M with 0 < N < M (2:4 keeps 2 of every 4 weights)")
    if share is None:
        return NM(keep, group)
    highest = 1 - keep / group
    try:
        zeros_frac = _share(share)
    except ValueError:
        zeros_frac = 0.0
    if not 0 < zeros_frac < highest:
        raise TargetError(
            f"target {text}: after @ comes the share of zeros of a matrix that is {keep}:{group} in a part of its "
            f"columns, between 0 and {highest:g}, such as {keep}:{group}@{0.9 * highest:g}"
        )
    return NM(keep, group, zeros_frac)


def _parse_both(text: str) -> PrunedBits:
    zeros, *rest = map(parse_target, text.split("+")) if all(part.strip() for part in text.split("+")) else (None,)
    if not isinstance(zeros, Sparsity | NM) or len(rest) != 1 or not isinstance(rest[0], Bits):
        raise TargetError(f"target {text}: expected zeros first, then the bits of the kept weights, such as 2:4+4bit")
    return PrunedBits(zeros, rest[0])


def parse_bytes(text: str) -> int:
    """Parse `1700000000`, `1.7GB` or `800 MiB` as bytes. Raises TargetError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    unit = _BYTE_UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise TargetError(f"target_bytes {text!r}: expected a number of bytes such as 1700000000, 1.7GB or 800MiB")
    return int(float(found[1]) * unit)


def parse_count(text: str) -> int:
    """Parse `1000000`, `300k` or `1.5M` as a count. Raises InputError for any other text."""
    found = re.fullmatch(r"([\d,_]*\d(?:\.\d+)?)([kmb]?)", text.strip().lower())
    count = float(re.sub("[,_]", "", found[1])) * _COUNT_UNITS[found[2]] if found else 0.0
    if count < 1:
        raise InputError(f"{text!r} is not a count: expected a number such as 1000000, 300k or 1.5M")
    return int(count)


def parse_keep_blocks(value: Any) -> str | tuple[int, ...]:
    """Parse `auto`, `none` (no blocks), block numbers such as `0,7`, or a list of them.

    Raises TargetError for anything else.
    """
    if value in ("auto", "none"):
        return "auto" if value == "auto" else ()
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [str(item).strip() for item in items]
    if not all(number.isdecimal() for number in numbers):
        raise TargetError(f"keep_blocks {value!r}: expected auto, none or numbers of blocks such as 0,7")
    return tuple(sorted({int(number) for number in numbers}))


def parse_blocks(value: Any) -> tuple[int, ...] | None:
    """Parse block numbers and ranges such as `8-23` or `0,3,5-7`, a list of them, or `all` (None).

    Raises TargetError for anything else.
    """
    if value is None or value == "all":
        return None
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers: set[int] = set()
    for item in items:
        found = re.fullmatch(r"(\d{1,6})(?: ?- ?(\d{1,6}))?", str(item).strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            what = f", got {str(item).strip()!r}" if len(items) > 1 else ""
            raise TargetError(f"blocks {value!r}: expected numbers and ranges such as 8-23 or 0,3,5-7{what}")
        numbers.update(range(first, last + 1))
    if not numbers:
        raise TargetError("blocks: expected at least one block such as 0, got none; leave the option out for all")
    return tuple(sorted(numbers))


def format_blocks(blocks: Iterable[int]) -> str:
    """Return block numbers as ranges: `0,3,5-7`."""
    ranges: list[list[int]] = []
    for index in sorted(blocks):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
