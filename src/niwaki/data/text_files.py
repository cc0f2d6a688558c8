"""Files of text → raw rows, one at a time, in the order of the file or in a random one.

A row that cannot be read is yielded as a `RowError`, so that the rows after it still are. A file of
which no row can be read is refused in one line: a Git LFS pointer, UTF-16, a compressed or a broken file.

A random order needs no look at the whole file. A JSONL file is cut into blocks of `BLOCK_BYTES`. A block number is
drawn without replacement, and the lines that begin in that block are read. Of a parquet file the row groups are drawn,
and they take turns after `TURN_CHARS` of text each. Time and memory go with the rows that are read.

    for place, row in JsonLines(Path("mine.jsonl")).rows(): ...
"""

import codecs
import json
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.data.chat import RowError
from niwaki.errors import CalibrationError
from niwaki.model.files import require_content

PART_BYTES = 2**18  # of a .txt file
BLOCK_BYTES = 2**12  # of a .jsonl file: a page
TURN_CHARS = 2**18
BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
Rows = Iterator[tuple[str, Any]]  # the place of a row, and the row or its RowError


def check_text(path: Path) -> bytes:
    """Return the first bytes of a file. Raises CalibrationError if they cannot be those of UTF-8 text."""
    require_content(path, CalibrationError)
    with path.open("rb") as file:
        head = file.read(PART_BYTES)
    for mark, kind in COMPRESSED.items():
        if head.startswith(mark):
            raise CalibrationError(f"{path} is compressed ({kind}): expected plain text, so unpack it first")
    kind = next((name for mark, name in BOMS.items() if head.startswith(mark)), "UTF-16 or binary")
    if b"\0" in head or kind != "UTF-16 or binary":
        raise CalibrationError(f"{path} is {kind}, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8")
    return head.removeprefix(codecs.BOM_UTF8)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file that are not blank, with their numbers.

    Raises CalibrationError with the number of the first line that is not UTF-8.
    """
    check_text(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"{path}:{number}: not UTF-8: convert the file, for example with iconv"
                ) from error
            if text.strip():
                yield number, text.rstrip("\r\n")


@dataclass(frozen=True)
class TextParts:
    """Text of a `.txt` file as parts, read again by every iteration. It is never whole in memory."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        """Yield the text with `\\n` as the end of every line, without a mark of UTF-8 at its start."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        done, held = 0, ""
        with self.path.open("rb") as file:
            while True:
                read = file.read(PART_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    text = held + decoder.decode(read, final=not read)
                except UnicodeDecodeError as error:
                    raise CalibrationError(
                        f"{self.path} is not UTF-8 (byte {done - pending + error.start}): "
                        "convert it, for example with iconv -t UTF-8"
                    ) from error
                done += len(read)
                held = "\r" if read and text.endswith("\r") else ""  # a \n may follow
                text = text[: len(text) - len(held)].replace("\r\n", "\n").replace("\r", "\n")
                if text:
                    yield text
                if not read:
                    return


@dataclass(frozen=True)
class PlainText:
    """A `.txt` file: one row."""

    path: Path

    @property
    def nbytes(self) -> int:
        """Return the bytes that a random order needs in memory."""
        return 0

    def rows(self) -> Rows:
        """Yield the text."""
        check_text(self.path)
        yield str(self.path), TextParts(self.path)

    def shuffled(self, seed: int) -> Rows:
        """Yield the text."""
        return self.rows()


@dataclass(frozen=True)
class JsonLines:
    """A `.jsonl` file. Places are its lines, or their bytes in a random order."""

    path: Path

    @property
    def nbytes(self) -> int:
        """Return the bytes of the file."""
        return self.path.stat().st_size

    def rows(self) -> Rows:
        """Yield the rows in the order of the file."""
        self._check()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield f"line {number}", _json_row(line)

    def shuffled(self, seed: int) -> Rows:
        """Yield the rows in a random order. Those that begin in the same block stay together."""
        self._check()
        blocks = -(-self.nbytes // BLOCK_BYTES)
        with self.path.open("rb") as file:
            for block in draw(blocks, seed):
                end = (block + 1) * BLOCK_BYTES
                file.seek(max(block * BLOCK_BYTES - 1, 0))
                if block:
                    file.readline(BLOCK_BYTES + 1)  # the end of a line that began earlier
                while (start := file.tell()) < end and (line := file.readline()):
                    line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
                    if line.strip():
                        yield f"byte {start}", _json_row(line)

    def _check(self) -> None:
        if check_text(self.path).lstrip().startswith(b"["):
            raise CalibrationError(
                f"{self.path} is one JSON array: expected an object per line, for example from jq -c '.[]'"
            )


@dataclass(frozen=True)
class Parquet:
    """A `.parquet` file; only the columns `wanted` are read, those of them that it has."""

    path: Path
    wanted: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Return the unpacked bytes of the columns."""
        meta = self._open().metadata
        groups = (meta.row_group(group) for group in range(meta.num_row_groups))
        parts = (group.column(number) for group in groups for number in range(group.num_columns))
        columns = self.columns()
        return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)

    def columns(self) -> list[str]:
        """Return the columns that are read."""
        return [name for name in self.wanted if name in self.names()]

    def names(self) -> list[str]:
        """Return the names of all columns."""
        names: list[str] = self._open().schema_arrow.names
        return names

    def rows(self) -> Rows:
        """Yield the rows in the order of the file."""
        for group in range(self._open().num_row_groups):
            yield from self._group(group)

    def shuffled(self, seed: int) -> Rows:
        """Yield the rows of the row groups in turns, the groups in a random order."""
        waiting = deque(self._group(group) for group in draw(self._open().num_row_groups, seed))
        while waiting:
            rows, taken = waiting.popleft(), 0
            for place, row in rows:
                yield place, row
                taken += len(str(row))
                if taken >= TURN_CHARS:
                    waiting.append(rows)
                    break

    def _group(self, group: int) -> Rows:
        """Yield the rows of a row group. After a page that cannot be decoded, the others are a RowError each."""
        file = self._open()
        where = "" if file.num_row_groups == 1 else f"row group {group + 1}, "
        done = 0
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=self.columns()):
                for index in range(batch.num_rows):
                    done += 1
                    yield f"{where}row {done}", _table_row(batch, index)
        except (OSError, ValueError) as error:  # pyarrow's own errors are one of both
            for number in range(done, file.metadata.row_group(group).num_rows):
                yield f"{where}row {number + 1}", RowError(f"unreadable ({first_line(error)})")

    def _open(self) -> Any:
        """Open the file. Raises CalibrationError if it is not parquet."""
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise CalibrationError("reading parquet needs pyarrow: pip install pyarrow") from error
        require_content(self.path, CalibrationError)
        try:
            # buffer_size: column chunks are read page by page, so that a large row group is never whole in memory
            return parquet.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{self.path} is not a readable parquet file ({first_line(error)}): copy or download it again"
            ) from error


def draw(count: int, seed: int) -> Iterator[int]:
    """Yield 0 … count − 1 in a random order. Memory goes with the numbers that are taken."""
    rng = random.Random(seed)
    moved: dict[int, int] = {}  # a Fisher–Yates shuffle, as far as it went
    for place in range(count):
        other = rng.randrange(place, count)
        drawn = moved.pop(other, other)
        if other != place:
            moved[other] = moved.pop(place, place)
        yield drawn


def _json_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except (ValueError, RecursionError):
        return RowError("not JSON")


def _table_row(batch: Any, index: int) -> Any:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError:
        return RowError("not UTF-8")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, shortened."""
    return str(error).strip().split("\n")[0][:200]
