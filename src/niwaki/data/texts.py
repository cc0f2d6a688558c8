"""Texts → token windows.

Calibration, evaluation and benchmarks share one rule. The end token follows each document. The concatenated stream is
cut into windows of equal length without overlap. Documents are read only as far as tokens are wanted. Calibration
first shuffles the documents by the seed. Evaluation keeps the order of the file. A window begins with the
beginning-of-text token where the model was trained so (`bos`). The token counts: a window of 512 tokens holds it and
511 tokens of text, and predicts all 511.

Legend: S windows, T tokens per window.

    tokenizer = load_tokenizer("MODEL")
    windows_ST = calibration_windows(Documents(["mine.jsonl"]), tokenizer, samples=64, seq_len=512, seed=0)
"""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.config.events import Report, silent
from niwaki.config.recipe import BosPolicy, Calibration
from niwaki.config.sources import SELF, check_held_out, check_sources
from niwaki.data.bos import Bos, find_bos
from niwaki.data.documents import Document, Documents
from niwaki.data.self_text import self_windows
from niwaki.data.text_amount import fit_seq_len, split_windows
from niwaki.data.text_files import first_line
from niwaki.errors import CalibrationError
from niwaki.model.decoder import Decoder
from niwaki.model.files import require_content
from niwaki.model.own_reader import own_reader

TOKENIZER_SUFFIXES = {".json", ".model", ".jinja", ".txt", ".tiktoken"}
SAMPLED = "sampled from the model"


@dataclass(frozen=True)
class CalibrationWindows:
    """Windows [S, T] of a calibration, a description of their source, and their beginning-of-text tokens.

    `skipped`: rows that could not be used, by source and reason. `revisions`: the commits of data sets of the hub.
    `mix`: the windows of each source of a mix. `held`: windows of a text that learning is judged by, none of which is
    among the others.
    """

    ids_ST: Tensor
    source: str
    bos: Bos
    skipped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    mix: Mapping[str, "CalibrationWindows"] = field(default_factory=dict)
    held: "CalibrationWindows | None" = None

    @property
    def about(self) -> dict[str, Any]:
        """Return how the windows were made, for records. Rows and commits are told only where there are some."""
        mix = {name: {"windows": len(one.ids_ST), "sha256": digest(one.ids_ST)} for name, one in self.mix.items()}
        told = {"skipped": self.skipped, "revisions": self.revisions, "mix": mix, "held_out": self.held_about}
        return {"bos": self.bos.state, **{name: value for name, value in told.items() if value}}

    @property
    def held_about(self) -> dict[str, Any]:
        """Return source, number and hash of the held-out windows, {} without any."""
        if self.held is None:
            return {}
        return {"source": self.held.source, "windows": len(self.held.ids_ST), "sha256": digest(self.held.ids_ST)}

    @property
    def sha256(self) -> str:
        """Return the hash of all tokens that decide a result."""
        return digest(self.ids_ST if self.held is None else torch.cat([self.ids_ST, self.held.ids_ST]))

    def split(self, count: int) -> tuple["CalibrationWindows", "CalibrationWindows"]:
        """Return the first `count` windows, and the others."""
        return replace(self, ids_ST=self.ids_ST[:count]), replace(self, ids_ST=self.ids_ST[count:])


@dataclass(frozen=True)
class EvaluationWindows:
    """Windows [S, T] of a text, the document of every token [S, T], and the domain of every document.

    `skipped` are the rows that could not be used, by reason; `revision` is the commit of a data set of the hub.
    """

    ids_ST: Tensor
    owners_ST: Tensor
    domains: list[str | None]
    skipped: Mapping[str, int] = field(default_factory=dict)
    revision: str | None = None


def windows_for(
    given: Calibration, decoder: Decoder, *, seed: int, report: Report, at_most: bool = False
) -> CalibrationWindows:
    """Return the calibration windows, from the files of `given`, from the model, or from a mix in a random order.

    `at_most`: files may hold fewer windows than they should give. Raises CalibrationError for files that cannot be
    text, too little text, and windows longer than the model's positions. It is raised too if the tokenizer has ids
    beyond the vocabulary of the model.
    """
    check_sources(given.files)
    check_held_out(given.held_out, given.files)
    seq_len = fit_seq_len(given.seq_len, Calibration().seq_len, decoder.positions, "the model", report)
    judge = None if given.held_out is None else (given.held_out,)
    held: list[CalibrationWindows] = []

    def read(files: tuple[str, ...], count: int) -> CalibrationWindows:
        """Return `count` windows of a source. One that is held out too gives more, and those are split off."""
        more = given.held_windows if judge == (files or (SELF,)) else 0
        size = given.model_copy(update={"samples": count + more, "seq_len": seq_len})
        windows = _of_source(files, size, decoder, seed, report, at_most)
        if not more:
            return windows
        windows, kept = windows.split(count)
        held.append(kept)
        return windows

    found = {", ".join(files): read(files, count) for files, count in split_windows(given).items()}
    if judge is not None and not held:
        read(judge, 0)
    first = next(iter(found.values()))
    if len(found) > 1:
        ids_ST = torch.cat([one.ids_ST for one in found.values()])
        order = torch.randperm(len(ids_ST), generator=torch.Generator().manual_seed(seed))
        skipped = {name: counts for one in found.values() for name, counts in one.skipped.items()}
        revisions = {name: revision for one in found.values() for name, revision in one.revisions.items()}
        first = CalibrationWindows(ids_ST[order], ", ".join(found), first.bos, skipped, revisions, found)
    return replace(first, held=held[0]) if held else first


def _of_source(
    files: tuple[str, ...], given: Calibration, decoder: Decoder, seed: int, report: Report, at_most: bool
) -> CalibrationWindows:
    """Return the windows of one source: files, or the model itself for none or SELF."""
    model, vocabulary = decoder.checkpoint.folder, decoder.checkpoint.config.get_text_config().vocab_size
    size: dict[str, Any] = {"samples": given.samples, "seq_len": given.seq_len, "seed": seed, "bos": given.bos}
    if files in ((), (SELF,)):
        writer = decoder.checkpoint.before_rotation()  # so that the text is written once for all bases
        with own_reader(writer.log, hashed=True):
            windows_ST = sampled_windows(writer.folder, **size, device=str(decoder.device), report=report)
        return CalibrationWindows(windows_ST, SAMPLED, bos_of_model(model, given.bos))
    windows = read_calibration(files, given.field, load_tokenizer(model), **size, report=report, at_most=at_most)
    if (highest := int(windows.ids_ST.max())) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer yields id {highest}, the model has {vocabulary} embeddings: "
            "the tokenizer belongs to another model"
        )
    return windows


def read_calibration(
    files: Sequence[str], field: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int, bos: BosPolicy,
    report: Report, at_most: bool = False,
) -> CalibrationWindows:  # fmt: skip
    """Return the calibration windows of text files and data sets, and report the rows that were skipped.

    `at_most`: as many windows as there are, up to `samples`.
    """
    documents = Documents(files, field, tokenizer)
    size: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "at_most": at_most}
    ids_ST = calibration_windows(documents, tokenizer, **size, seed=seed, bos=bos)
    documents.warn(report)
    begin = find_bos(tokenizer, bos)
    return CalibrationWindows(ids_ST, ", ".join(files), begin, documents.skipped, documents.revisions)


def read_evaluation(
    files: Sequence[str], field: str, tokenizer: Any, *, seq_len: int, max_tokens: int | None, bos: BosPolicy,
    report: Report,
) -> EvaluationWindows:  # fmt: skip
    """Return the windows of text files and data sets in their order, and report the rows that were skipped."""
    documents, domains = Documents(files, field, tokenizer, held_out=True), []

    def read() -> Iterator[Document]:
        for document in documents:
            domains.append(document.domain)
            yield document

    ids_ST, owners_ST = owned_windows(read(), tokenizer, seq_len=seq_len, max_tokens=max_tokens, bos=bos)
    documents.warn(report)
    skipped: dict[str, int] = {}
    for counts in documents.skipped.values():
        skipped |= {reason: skipped.get(reason, 0) + count for reason, count in counts.items()}
    return EvaluationWindows(ids_ST, owners_ST, domains, skipped, next(iter(documents.revisions.values()), None))


def calibration_record(calibration: CalibrationWindows | None) -> dict[str, Any]:
    """Return the field `calibration` of run.json; None says that there are no windows."""
    if calibration is None:
        return {"source": "none", "windows": None, "sha256": None, "bos": None}
    return {
        "source": calibration.source,
        "windows": list(calibration.ids_ST.shape),
        "sha256": digest(calibration.ids_ST),
        **calibration.about,
    }


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of the checkpoint. Raises CalibrationError if it is missing or has no end token."""
    from transformers import AutoTokenizer

    for path in Path(model).glob("*"):
        if path.is_file() and path.suffix in TOKENIZER_SUFFIXES:
            require_content(path, CalibrationError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # of a broken file the package tokenizers raises no narrower one
        raise CalibrationError(
            f"no usable tokenizer in {model} ({first_line(error)}): "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise CalibrationError(f"the tokenizer in {model} has no end token: set eos_token in its config")
    return tokenizer


def bos_of_model(model: str | Path, policy: BosPolicy) -> Bos:
    """Return the beginning-of-text tokens of a model. Without a tokenizer there are none, and `on` is an error."""
    try:
        tokenizer = load_tokenizer(model)
    except CalibrationError:
        if policy == "on":
            raise
        return Bos()
    return find_bos(tokenizer, policy)


def calibration_windows(
    texts: Sequence[str] | Documents,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    bos: BosPolicy = "auto",
    at_most: bool = False,
) -> Tensor:
    """Return int64 windows [S, T] of the documents, shuffled by `seed`. Raises CalibrationError for too little text.

    `at_most`: as many windows as there are, up to `samples`.
    """
    begin = find_bos(tokenizer, bos)
    room = begin.room(seq_len)
    stream_N, ends = _token_stream(_shuffled(texts, seed), tokenizer, begin, samples * room)
    if at_most and len(stream_N) >= room:
        samples = min(samples, len(stream_N) // room)
        stream_N = stream_N[: samples * room]
    if len(stream_N) < samples * room:
        notes = "".join(f" ({note})" for note in texts.notes) if isinstance(texts, Documents) else ""
        raise CalibrationError(
            f"calibration holds {len(stream_N):,} tokens in {len(ends)} documents{notes}, "
            f"{samples} windows × {room} need {samples * room:,}: add text, or lower --samples or --seq-len"
        )
    return begin.begin_windows(stream_N.view(samples, room))


def _shuffled(texts: Sequence[str] | Documents, seed: int) -> Iterable[str | Document]:
    """Return texts in the order of a seed."""
    if isinstance(texts, Documents):
        return texts.shuffled(seed)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    return (texts[index] for index in order)


def evaluation_windows(
    texts: Iterable[str | Document],
    tokenizer: Any,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    bos: BosPolicy = "auto",
) -> Tensor:
    """Return int64 windows [S, T] of up to `max_tokens` tokens in file order, without an incomplete last window."""
    return owned_windows(texts, tokenizer, seq_len=seq_len, max_tokens=max_tokens, bos=bos)[0]


def owned_windows(
    texts: Iterable[str | Document],
    tokenizer: Any,
    *,
    seq_len: int,
    max_tokens: int | None = None,
    bos: BosPolicy = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the windows of `evaluation_windows`, and the document number of each token [S, T].

    A beginning-of-text token belongs to the document of the token after it, and counts in `max_tokens`.
    """
    begin = find_bos(tokenizer, bos)
    room = begin.room(seq_len)
    stream_N, ends = _token_stream(texts, tokenizer, begin, _text_limit(max_tokens, seq_len, room))
    count = len(stream_N) // room
    if count == 0:
        raise CalibrationError(
            f"evaluation text holds {len(stream_N):,} tokens, one window needs {room}: add text, or lower --seq-len"
        )
    ids_ST = stream_N[: count * room].view(count, room)
    positions = torch.arange(count * room)
    owners_ST = torch.searchsorted(torch.tensor(ends), positions, right=True).view(count, room)
    return begin.begin_windows(ids_ST), torch.cat([owners_ST[:, :1].expand(-1, seq_len - room), owners_ST], dim=1)


def sampled_windows(
    model: str | Path,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
    report: Report = silent,
    bos: BosPolicy = "auto",
) -> Tensor:
    """Return windows [S, T] that the model itself writes (see `data.self_text`).

    Windows with a beginning-of-text token keep the one that they are sampled after.
    """
    from transformers import AutoConfig

    begin = bos_of_model(model, bos)
    start = begin.ids or _start_token(AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config())
    if not start:
        raise CalibrationError(f"{model} names no start token to sample from: give --calibration FILE")
    room = begin.room(seq_len)
    ids_ST = self_windows(model, start, samples=samples, seq_len=room, seed=seed, device=device, report=report)
    return begin.begin_windows(ids_ST)


def _start_token(config: Any) -> tuple[int, ...]:
    """Return the token with which a text of the model begins, or the one that ends the text before; () for none."""
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    return tuple(one[0] if isinstance(one, list) else one for one in named if one is not None)[:1]


def _text_limit(max_tokens: int | None, seq_len: int, room: int) -> int | None:
    """Return how many tokens of text fit into `max_tokens` of windows that hold `room` each."""
    if max_tokens is None:
        return None
    windows, rest = divmod(max_tokens, seq_len)
    return windows * room + max(rest - (seq_len - room), 0)


def digest(windows_ST: Tensor) -> str:
    """Return the SHA-256 of the token ids, which names the calibration in run.json and guards a resume."""
    return hashlib.sha256(windows_ST.contiguous().numpy().tobytes()).hexdigest()


def _token_stream(
    texts: Iterable[str | Document], tokenizer: Any, bos: Bos, limit: int | None
) -> tuple[Tensor, list[int]]:
    """Return the first `limit` tokens of all texts [N], and for each text the position after its end token.

    A text that begins as a window does, as a rendered chat may, loses its own beginning. No text is read or tokenized
    further than the limit needs.
    """
    stream, ends = array("q"), []
    for text in texts:
        if limit is not None and len(stream) >= limit:
            break
        document = Document((text,)) if isinstance(text, str) else text
        for number, ids in enumerate(document.tokens(tokenizer)):
            stream.extend(bos.strip(ids) if number == 0 else ids)
            if limit is not None and len(stream) >= limit:
                break
        if not document.ends_itself(tokenizer):
            stream.append(tokenizer.eos_token_id)
        ends.append(len(stream))
    if not stream:
        return torch.empty(0, dtype=torch.int64), ends
    return torch.frombuffer(stream, dtype=torch.int64)[:limit].clone(), ends
