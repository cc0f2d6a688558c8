"""Sources of text → documents, which are read as far as they are wanted.

A source is a file, a folder of a data set, its hub id or its short name (`data.data_sets`). A row holds a text in
`field`, or a dialogue in `messages` or `conversations`, which the chat template of the model writes (`data.chat`).

One bad row ends nothing: it is skipped and counted, with its reason and the place of the first one. A source of which
no row can be used is refused, with the fields that its rows have.

Two orders: that of the sources, and a random one. Sources that fit in SHUFFLED_BYTES together are shuffled as one list
of documents. A larger source is read in a random order that never needs the whole source (`data.text_files`). Large
sources take turns with each other and with the list, document by document.

    documents = Documents(["mine.jsonl", "c4"], tokenizer=load_tokenizer("MODEL"))
    for document in documents.shuffled(seed=0): ...
    documents.warn(report)
"""

import difflib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from niwaki.config.events import Event, Report
from niwaki.config.sources import check_sources
from niwaki.data.chat import NO_TEMPLATE, DialogueWriter, Messages, RowError, is_dialogue, messages_of, require_unicode
from niwaki.data.data_sets import DataSet
from niwaki.data.pieces import token_pieces
from niwaki.data.text_files import JsonLines, Parquet, PlainText, Rows, TextParts
from niwaki.errors import CalibrationError

TEXT, DOMAIN = "text", "domain"
DIALOGUES = ("messages", "conversations", "conversation")
EMPTY = "empty"
SHUFFLED_BYTES = 2**26
MAX_UNUSABLE = 10_000  # rows at the start of a source, of which none can be used
MAX_REASONS = 4  # in a message
COMMON_FIELDS = ("content", "text", "body", "document", "article", "raw_content", "code", "markdown", "output")
JSON_KINDS = {
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}
Source = PlainText | JsonLines | Parquet | DataSet


@dataclass(frozen=True)
class Document:
    """A text as its parts (one, or those of a long file), and its domain if its row names one.

    A dialogue has `messages`, and `ids` after the chat template wrote it.
    """

    parts: Iterable[str] = ()
    domain: str | None = None
    messages: Messages | None = None
    ids: Sequence[int] | None = None

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(self.parts)

    def tokens(self, tokenizer: Any) -> Iterator[Sequence[int]]:
        """Yield the tokens in pieces. The only special ones are those of the text itself or of a chat template."""
        return token_pieces(self.parts, tokenizer) if self.ids is None else iter([self.ids])

    def ends_itself(self, tokenizer: Any) -> bool:
        """Check whether the chat template wrote the end token, white space after it aside."""
        last = (token for token in reversed(self.ids or ()) if tokenizer.decode([token]).strip())
        return bool(next(last, None) == tokenizer.eos_token_id)


@dataclass
class RowLog:
    """Rows of a source: how many were read and used, those skipped by reason, and the first place of each reason."""

    source: str
    fields: Sequence[str] = ()
    rows: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)

    def skip(self, error: RowError, place: str) -> None:
        """Count a row that cannot be used."""
        reason = str(error)
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.places.setdefault(reason, place)

    @property
    def reasons(self) -> str:
        """Return the reasons, the most frequent ones first, each with its number of rows and its first place."""
        ordered = sorted(self.skipped, key=lambda reason: -self.skipped[reason])
        told = [f"{self.skipped[reason]:,} {reason} (first: {self.places[reason]})" for reason in ordered]
        return ", ".join(told[:MAX_REASONS]) + (", …" if len(told) > MAX_REASONS else "")

    def check(self, wanted: str) -> None:
        """Raise CalibrationError if no row can be used. A source of blank rows passes."""
        if self.used or not set(self.skipped) - {EMPTY}:
            return
        fields = self.fields or tuple(self.example)
        if NO_TEMPLATE in self.skipped:
            step = "take an instruct model, put chat_template.jinja beside its tokenizer, or give rows of text"
        elif fields:
            step = fields_hint(wanted, fields, self.example)
        else:
            step = 'expected objects such as {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
        raise CalibrationError(f"{self.source}: of {self.rows:,} rows none can be used: {self.reasons}; {step}")


class Documents:
    """Documents of sources. Every iteration reads them again, and only as far as it is taken.

    `tokenizer` is that of the model, without which dialogues cannot be read. `held_out`: data sets give the split for
    an evaluation. Raises CalibrationError for a source that cannot be text.
    """

    def __init__(
        self, sources: Sequence[str], field: str = TEXT, tokenizer: Any = None, *, held_out: bool = False
    ) -> None:
        check_sources(sources)
        self.names, self._field = list(sources), field
        self._sources = {name: _open_source(name, field, held_out) for name in sources}
        self._writer = DialogueWriter(tokenizer)
        self._logs: dict[str, RowLog] = {}

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in the order of the sources."""
        self._logs = {}
        return self._written(read for name in self.names for read in self._read(name))

    def shuffled(self, seed: int) -> Iterator[Document]:
        """Yield the documents in a random order."""
        self._logs = {}
        small, large = self._by_size()
        listed = [read for name in small for read in self._read(name)]
        order = list(range(len(listed)))
        random.Random(seed).shuffle(order)
        streams = [(listed[index] for index in order), *(self._read(name, seed) for name in large)]
        return self._written(_in_turns(streams))

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Return the number of rows that the last iteration skipped, by source and reason."""
        return {name: dict(log.skipped) for name, log in self._logs.items() if log.skipped}

    @property
    def revisions(self) -> dict[str, str]:
        """Return the commits of the data sets of the hub."""
        sets = {name: source for name, source in self._sources.items() if isinstance(source, DataSet)}
        return {name: one.about.revision for name, one in sets.items() if one.about.revision is not None}

    @property
    def notes(self) -> list[str]:
        """Return what the last iteration skipped, a line per source that had such rows."""
        return [
            f"{log.source}: skipped {sum(log.skipped.values()):,} of {log.rows:,} rows: {log.reasons}"
            for log in self._logs.values()
            if log.skipped
        ]

    def warn(self, report: Report) -> None:
        """Report what the last iteration skipped, if it skipped anything."""
        for note in self.notes:
            report(Event.WARNING, message=note)

    def _by_size(self) -> tuple[list[str], list[str]]:
        """Return the sources that fit in SHUFFLED_BYTES together, in their order, and the larger ones."""
        sizes = {name: source.nbytes for name, source in self._sources.items()}
        fitting, total = set(), 0
        for name, size in sorted(sizes.items(), key=lambda item: item[1] or 0):
            total += size or 0
            if size is not None and total <= SHUFFLED_BYTES:
                fitting.add(name)
        return [name for name in self.names if name in fitting], [name for name in sizes if name not in fitting]

    def _read(self, name: str, seed: int | None = None) -> Iterator[tuple[RowLog, str, Document]]:
        """Yield the documents of a source with their places, in its order, or in a random one."""
        source = self._sources[name]
        wanted = source.field if isinstance(source, DataSet) and self._field == TEXT else self._field
        log = self._logs.setdefault(name, RowLog(name, source.names() if isinstance(source, Parquet) else ()))
        rows: Rows = source.rows() if seed is None else source.shuffled(seed)
        for place, row in rows:
            log.rows += 1
            try:
                document = self._document(row, wanted)
            except RowError as error:
                log.skip(error, place)
                log.example = row if isinstance(row, Mapping) and not log.example else log.example
                if log.rows == MAX_UNUSABLE:
                    log.check(wanted)
                continue
            log.used += 1
            yield log, place, document
        log.check(wanted)

    def _document(self, row: Any, wanted: str) -> Document:
        """Return the document of a row. Raises RowError if it holds none."""
        if isinstance(row, RowError):
            raise row
        if isinstance(row, TextParts):
            if not any(part.strip() for part in row):
                raise RowError(EMPTY)
            return Document(row)
        if not isinstance(row, Mapping):
            raise RowError("null" if row is None else f"{_kind(row)} in place of an object")
        value = row.get(wanted)
        if value is None and wanted == TEXT:
            value = next((row[name] for name in DIALOGUES if row.get(name) is not None), None)
        domain = None if row.get(DOMAIN) is None else str(row[DOMAIN]).encode(errors="replace").decode()
        if value is None:
            raise RowError(f"null in {wanted!r}" if wanted in row else f"without the field {wanted!r}")
        if value in ("", []) or (isinstance(value, str) and not value.strip()):
            raise RowError(EMPTY)
        if is_dialogue(value):
            if self._writer.problem is not None:
                raise RowError(self._writer.problem)
            return Document(domain=domain, messages=messages_of(value))
        if not isinstance(value, str):
            raise RowError(f"{_kind(value)} in {wanted!r}")
        require_unicode(value)
        return Document((value,), domain)

    def _written(self, read: Iterable[tuple[RowLog, str, Document]]) -> Iterator[Document]:
        """Yield documents, dialogues as tokens. Raises CalibrationError if there is none."""
        count = 0
        try:
            for log, place, document in read:
                if document.messages is not None:
                    try:
                        document = replace(document, ids=self._writer.write(document.messages))
                    except RowError as error:
                        log.used -= 1
                        log.skip(error, place)
                        continue
                count += 1
                yield document
        finally:
            self._writer.close()
        for log in self._logs.values():
            log.check(self._field)
        if self.names and not count:
            raise CalibrationError(f"no text in {', '.join(self.names)}: expected at least one non-empty document")


def read_texts(sources: Sequence[str], field: str = TEXT) -> list[str]:
    """Read the texts of all sources in order, without blank ones. Dialogues need `Documents`, with a tokenizer."""
    return [document.text for document in Documents(sources, field)]


def fields_hint(wanted: str, fields: Sequence[str], example: Mapping[str, Any]) -> str:
    """Return the fields that a row has, and the one that is probably meant."""
    others = [name for name in fields if name != wanted]
    texts = {name: example[name] for name in others if isinstance(example.get(name), str)}
    common = [name for name in COMMON_FIELDS if name in others]
    near = (
        (common if wanted == TEXT else [])
        or difflib.get_close_matches(wanted, others, n=1, cutoff=0.6)
        or common
        or sorted(texts, key=lambda name: -len(texts[name]))
    )
    hint = f": did you mean --field {near[0]}?" if near else ""
    return f"the rows have the fields {', '.join(map(str, fields))}{hint}"


def _open_source(source: str, field: str, held_out: bool) -> Source:
    """Return the reader of a source. Raises CalibrationError for a parquet file without the field."""
    path = Path(source)
    if not path.is_file():
        return DataSet(source, held_out)
    if path.suffix.lower() == ".txt":
        return PlainText(path)
    if path.suffix.lower() != ".parquet":
        return JsonLines(path)
    names = Parquet(path, ()).names()
    wanted = [field] if field in names else [name for name in DIALOGUES if name in names and field == TEXT]
    if not wanted:
        raise CalibrationError(f"{path} has no column {field!r}; {fields_hint(field, names, {})}")
    return Parquet(path, (wanted[0], DOMAIN))


def _in_turns(streams: Iterable[Iterator[tuple[RowLog, str, Document]]]) -> Iterator[tuple[RowLog, str, Document]]:
    """Yield the next document of every stream in turns, until all are at their end."""
    waiting = list(streams)
    while waiting:
        left = []
        for stream in waiting:
            if (read := next(stream, None)) is not None:
                left.append(stream)
                yield read
        waiting = left


def _kind(value: object) -> str:
    return JSON_KINDS.get(type(value), type(value).__name__)
