"""Multiple-choice tasks: the model chooses the continuation with the highest likelihood.

A task file is JSONL; every line is `{"task": name, "pairs": [[context, continuation], ...], "gold": index}`.
`accuracy` compares summed log-likelihoods, `accuracy_norm` divides them by the characters of the continuation. Each has
the standard error of a mean of n independent items. Both equal acc and acc_norm of lm-evaluation-harness on the same
items:

- Special tokens are those of the tokenizer.
- Spaces at the end of a context belong to the continuation.
- An empty context is the first token of texts.
- A context that is too long loses its start.
- The last token is predicted but not read.

(If choices of a harness task have no leading space and the task adds one, it divides by one character less.)

Sequences are padded on the right. Earlier positions of a causal model cannot see the padding, so no mask is needed.

Legend: B sequences of a batch, S sequences, T tokens, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.config.sources import check_tasks
from niwaki.data.stream import Stream
from niwaki.errors import CalibrationError

MAX_BUCKETS = 4
Logits = Callable[[Stream, slice], Tensor]


@dataclass(frozen=True)
class Item:
    """One question: its (context, continuation) pairs and the index of the correct one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length without their last token, padded to [S, T]."""

    ids_ST: Tensor
    places: list[tuple[int, int]]  # (item, choice) of every sequence
    spans: list[tuple[int, int]]  # first and last+1 token of its continuation
    wanted: list[list[int]]  # the tokens of its continuation


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a context and of a continuation, which begins at `split`. `place`: its (item, choice)."""

    ids: list[int]
    split: int
    place: tuple[int, int]


class _GoldError(Exception):
    """The index of the correct pair is outside the pairs."""


def read_items(path: str, limit: int | None) -> list[Item]:
    """Read the questions of a task file. Raises CalibrationError with the number of the first invalid line."""
    check_tasks([path])
    items: list[Item] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (limit is not None and len(items) >= limit):
            continue
        try:
            items.append(_item(json.loads(line)))
        except _GoldError as error:
            raise CalibrationError(f"{path}:{number}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f'{path}:{number}: expected {{"pairs": [[context, continuation], ...], "gold": index}}'
            ) from error
    if not items:
        raise CalibrationError(f"{path} holds no questions")
    return items


def buckets(items: list[Item], tokenizer: Any, positions: int | None) -> list[Bucket]:
    """Group all sequences of all items into up to MAX_BUCKETS of similar length. Long contexts lose their start.

    Raises CalibrationError for a sequence without a predicted token, or a continuation longer than `positions`.
    """
    encoded: list[_Sequence] = []
    for index, item in enumerate(items):
        for choice, (context, continuation) in enumerate(item.pairs):
            ids, split = _encode(context, continuation, tokenizer)
            if len(ids) < 2:
                raise CalibrationError(
                    f"question {index}: {context + continuation!r} is a single token, nothing to predict"
                )
            excess = 0 if positions is None else max(0, len(ids) - positions - 1)
            if split - excess < 1:
                raise CalibrationError(f"question {index}: the continuation alone exceeds the {positions} positions")
            encoded.append(_Sequence(ids[excess:], split - excess, (index, choice)))
    encoded.sort(key=lambda entry: (len(entry.ids), entry.place))
    size = math.ceil(len(encoded) / MAX_BUCKETS)
    return [_bucket(encoded[first : first + size], tokenizer) for first in range(0, len(encoded), size)]


def score(items: list[Item], streams: list[tuple[Bucket, Stream]], logits: Logits) -> dict[str, Any]:
    """Return accuracy, length-normalised accuracy and their standard errors."""
    correct, correct_norm = (
        [choice == item.gold for choice, item in zip(chosen, items, strict=True)]
        for chosen in choices(items, likelihoods(items, streams, logits))
    )
    return {
        "items": len(items),
        "accuracy": sum(correct) / len(items),
        "accuracy_stderr": _stderr(correct),
        "accuracy_norm": sum(correct_norm) / len(items),
        "accuracy_norm_stderr": _stderr(correct_norm),
    }


def likelihoods(items: list[Item], streams: list[tuple[Bucket, Stream]], logits: Logits) -> list[list[float]]:
    """Return the summed log-likelihood of every continuation of every item."""
    values = [[0.0] * len(item.pairs) for item in items]
    for bucket, stream in streams:
        for rows in stream.slices():
            logprobs_BTV = logits(stream, rows).log_softmax(-1)
            for position, row in enumerate(range(rows.start, rows.stop)):
                item, choice = bucket.places[row]
                values[item][choice] = continuation_likelihood(logprobs_BTV[position], bucket, row)
    return values


def continuation_likelihood(logprobs_TV: Tensor, bucket: Bucket, row: int) -> float:
    """Return the log-likelihood of the continuation in one sequence of a bucket."""
    first, end = bucket.spans[row]
    wanted_T1 = torch.tensor(bucket.wanted[row], device=logprobs_TV.device)[:, None]
    return float(logprobs_TV[first - 1 : end - 1].gather(1, wanted_T1).sum(dtype=torch.float64))


def choices(items: list[Item], values: list[list[float]]) -> tuple[list[int], list[int]]:
    """Return the chosen pair of every item: by log-likelihood, and by log-likelihood per character."""
    normed = [
        [value / max(len(text), 1) for value, (_, text) in zip(own, item.pairs, strict=True)]
        for own, item in zip(values, items, strict=True)
    ]
    return [_best(own) for own in values], [_best(own) for own in normed]


def _item(row: Any) -> Item:
    pairs = tuple((str(context), str(continuation)) for context, continuation in row["pairs"])
    gold = int(row["gold"])
    if not (len(pairs) >= 2 and all(continuation for _, continuation in pairs)):
        raise ValueError
    if not 0 <= gold < len(pairs):
        raise _GoldError(f"gold {gold} is not an index of the {len(pairs)} pairs: expected 0 to {len(pairs) - 1}")
    return Item(pairs, gold)


def _encode(context: str, continuation: str, tokenizer: Any) -> tuple[list[int], int]:
    """Return the tokens of both together, and the index of the first token of the continuation."""

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=not has_start, verbose=False)["input_ids"]
        return ids

    start = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    has_start = (context or continuation).startswith(start)
    if not context:
        first = tokenizer.convert_tokens_to_ids(start)
        ids = tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return (ids, 1) if ids[0] == first and len(ids) > 1 else ([first, *ids], 1)
    ids = tokens(context + continuation)
    return ids, max(min(len(tokens(context.rstrip())), len(ids) - 1), 1)


def _bucket(encoded: list[_Sequence], tokenizer: Any) -> Bucket:
    longest = max(len(entry.ids) for entry in encoded) - 1
    ids_ST = torch.full((len(encoded), longest), tokenizer.eos_token_id, dtype=torch.int64)
    for row, entry in enumerate(encoded):
        ids_ST[row, : len(entry.ids) - 1] = torch.tensor(entry.ids[:-1])
    return Bucket(
        ids_ST,
        [entry.place for entry in encoded],
        [(entry.split, len(entry.ids)) for entry in encoded],
        [entry.ids[entry.split :] for entry in encoded],
    )


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _stderr(correct: list[bool]) -> float | None:
    if len(correct) < 2:
        return None
    mean = sum(correct) / len(correct)
    return math.sqrt(mean * (1 - mean) / (len(correct) - 1))
