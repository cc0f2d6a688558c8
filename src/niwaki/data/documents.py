"""Sources of text → documents.

A source is a file, a folder of a data set, or the hub id of one.

    documents = read_documents(["mine.jsonl"])
    texts = read_texts(["book.txt", "rows.parquet"])
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.config.sources import SUFFIXES, check_sources
from niwaki.errors import CalibrationError

DOMAIN = "domain"


@dataclass(frozen=True)
class Document:
    """A text, and its domain if its row names one."""

    text: str
    domain: str | None = None


def read_texts(sources: Sequence[str], field: str = "text") -> list[str]:
    """Read the documents of all sources in order, without blank ones.

    A source is a `.txt` file (one document) or a `.jsonl` or `.parquet` file (`field` of each row). It may also be
    the `train` split of a data set that the `datasets` package loads: a hub id or a folder.
    """
    return [document.text for document in read_documents(sources, field)]


def read_documents(sources: Sequence[str], field: str = "text") -> list[Document]:
    """Read documents as `read_texts` does, with the `domain` of each row that has one."""
    check_sources(sources)
    found = [document for source in sources for document in _read_source(source, field)]
    documents = [document for document in found if document.text.strip()]
    if sources and not documents:
        raise CalibrationError(f"no text in {', '.join(sources)}: expected at least one non-empty document")
    return documents


def _read_source(source: str, field: str) -> Iterator[Document]:
    path = Path(source)
    if not path.is_file():
        return _read_dataset(source, field)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, field)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{source} is not UTF-8 (byte {error.start}): convert it, for example with iconv -t UTF-8"
        ) from error
    if path.suffix.lower() == ".txt":
        return iter([Document(content)])
    return _read_jsonl(path, content, field)


def _read_jsonl(path: Path, content: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}:{number}: not a JSON line ({error.msg})") from error
        yield _document(row, field, f"{path}:{number}")


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CalibrationError("reading parquet needs pyarrow: pip install pyarrow") from error
    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise CalibrationError(f"{path} has no column {field!r} ({', '.join(file.schema_arrow.names)}): see --field")
    columns = [name for name in dict.fromkeys((field, DOMAIN)) if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=columns):
        yield from (_document(row, field, str(path)) for row in batch.to_pylist())


def _read_dataset(source: str, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{source} is not a {'/'.join(SUFFIXES)} file. To load it as a data set: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
    except Exception as error:  # datasets raises its own, requests' and OS errors alike
        raise CalibrationError(
            f"{source} is neither a {'/'.join(SUFFIXES)} file nor a loadable data set ({first_line(error)})"
        ) from error
    for row in rows:
        yield _document(row, field, source)


def _document(row: Any, field: str, where: str) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise CalibrationError(f"{where}: expected an object with a text in {field!r} (see --field)")
    domain = row.get(DOMAIN)
    return Document(str(row[field]), None if domain is None else str(domain))


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, shortened."""
    return str(error).strip().split("\n")[0][:200]
