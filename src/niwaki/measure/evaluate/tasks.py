"""Multiple-choice tasks: the model chooses the continuation with the highest likelihood.

A task file is JSONL; every line is `{"task": name, "pairs": [[context, continuation], ...], "gold": index}`.
`accuracy` compares summed log-likelihoods, `accuracy_norm` divides them by the characters of the continuation. Each has
the standard error of a mean of n independent items. Both equal acc and acc_norm of lm-evaluation-harness on the same
items:

- The beginning is the one of every text (`data.bos`), once; a context that holds it gets no other.
- Spaces at the end of a context belong to the continuation.
- An empty context is that beginning, or the bos token, or the end token.
- A context that is too long loses its start.
- The last token is predicted but not read.

(If choices of a harness task have no leading space and the task adds one, it divides by one character less.)

With `shots`, every context begins with that many solved questions of the same file, the same ones for every model.
`seed` draws them. A question that is one of them gets another one instead, so all questions are scored.

Sequences are padded on the right. Earlier positions of a causal model cannot see the padding, so no mask is needed.
Sequences of similar length run together, and equal ones once: choices that differ in their last token share one. Only
positions that predict a token of a continuation get logits.

Legend: S sequences, T tokens, N predicted tokens.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.config.sources import check_tasks
from niwaki.data.bos import Bos
from niwaki.data.chat import RowError, require_unicode
from niwaki.data.stream import Stream
from niwaki.data.text_files import text_lines
from niwaki.errors import CalibrationError, InputError

BETWEEN = "\n\n"  # after a solved question, as in lm-evaluation-harness
Logprobs = Callable[[Stream, Tensor, Tensor], Tensor]  # (stream, places, tokens) → log-probabilities [N]


@dataclass(frozen=True)
class Item:
    """One question: its (context, continuation) pairs and the index of the correct one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Bucket:
    """A batch of sequences of similar length without their last token, padded to [S, T].

    `rows`: the sequence that each continuation is read from.
    """

    ids_ST: Tensor
    rows: list[int]
    places: list[tuple[int, int]]  # (item, choice) of every continuation
    spans: list[tuple[int, int]]  # its first and last+1 token
    wanted: list[list[int]]  # its tokens


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a context and of a continuation, which begins at `split`. `place`: its (item, choice)."""

    ids: list[int]
    split: int
    place: tuple[int, int]


class _GoldError(Exception):
    """The index of the correct pair is outside the pairs."""


def check_shots(shots: int, tasks: Sequence[str]) -> None:
    """Raise InputError for a number of examples below 0, or for examples of no task file."""
    if shots < 0:
        raise InputError(f"shots must be at least 0, got {shots}")
    if shots and not tasks:
        raise InputError("--shots is of task files: give --tasks FILE (the option of --lm-eval is --num-fewshot)")


def read_items(path: str, limit: int | None, shots: int = 0, seed: int = 0) -> list[Item]:
    """Read the first `limit` questions of a task file, each after `shots` solved ones of the whole file.

    No question is skipped: accuracies over fewer questions could not be compared with those of others. Raises
    CalibrationError with the number of the first invalid line, or if the file has too few other questions.
    """
    if not shots:
        return _read_questions(path, limit)
    questions = _read_questions(path, None)
    examples: dict[str, str] = {}  # solved, by what is asked
    for item in random.Random(seed).sample(questions, len(questions)):
        examples.setdefault(_asked(item), "".join(item.pairs[item.gold]) + BETWEEN)
    if len(examples) <= shots:
        raise CalibrationError(
            f"{path}: {shots} examples need at least {shots + 1} different questions, it has {len(examples)}: "
            "lower --shots"
        )
    found = []
    for item in questions[:limit]:
        others = (text for asked, text in examples.items() if asked != _asked(item))
        before = "".join(islice(others, shots))
        found.append(Item(tuple((before + context, end) for context, end in item.pairs), item.gold))
    return found


def _asked(item: Item) -> str:
    """Return what a question asks: its context, or the solved question if it has none."""
    context, continuation = item.pairs[item.gold]
    return context.strip() or continuation


def _read_questions(path: str, limit: int | None) -> list[Item]:
    """Read the questions as they stand in the file."""
    check_tasks([path])
    items: list[Item] = []
    for number, line in islice(text_lines(Path(path)), limit):
        try:
            items.append(_item(json.loads(line)))
        except (_GoldError, RowError) as error:
            raise CalibrationError(f"{path}:{number}: {error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f'{path}:{number}: expected {{"pairs": [[context, continuation], ...], "gold": index}}'
            ) from error
    if not items:
        raise CalibrationError(f"{path} holds no questions")
    return items


def buckets(items: list[Item], tokenizer: Any, positions: int | None, batch_tokens: int, bos: Bos) -> list[Bucket]:
    """Group all sequences of all items by length into batches of `batch_tokens`. Long contexts lose their start.

    Raises CalibrationError for a sequence without a predicted token, or a continuation longer than `positions`.
    """
    encoded: list[_Sequence] = []
    pairs = [pair for item in items for pair in item.pairs]
    places = [(index, choice) for index, item in enumerate(items) for choice in range(len(item.pairs))]
    for (context, continuation), (index, choice), (ids, split) in zip(
        pairs, places, _encode_all(pairs, tokenizer, bos), strict=True
    ):
        if len(ids) < 2:
            raise CalibrationError(
                f"question {index}: {context + continuation!r} is a single token, nothing to predict"
            )
        excess = 0 if positions is None else max(0, len(ids) - positions - 1)
        if split - excess < 1:
            raise CalibrationError(f"question {index}: the continuation alone exceeds the {positions} positions")
        encoded.append(_Sequence(ids[excess:], split - excess, (index, choice)))
    encoded.sort(key=lambda entry: (len(entry.ids), entry.ids[:-1], entry.place))
    batches: list[list[_Sequence]] = [[]]
    rows = 0  # of the last batch; equal inputs are one row
    for entry in encoded:
        same = bool(batches[-1]) and batches[-1][-1].ids[:-1] == entry.ids[:-1]
        if not same and rows and (rows + 1) * (len(entry.ids) - 1) > batch_tokens:
            batches.append([])
            rows = 0
        batches[-1].append(entry)
        rows += not same
    return [_bucket(batch, tokenizer) for batch in batches]


def score(items: list[Item], streams: list[tuple[Bucket, Stream]], logprobs: Logprobs) -> dict[str, Any]:
    """Return accuracy, length-normalised accuracy and their standard errors."""
    correct, correct_norm = (
        [choice == item.gold for choice, item in zip(chosen, items, strict=True)]
        for chosen in choices(items, likelihoods(items, streams, logprobs))
    )
    return {
        "items": len(items),
        "accuracy": sum(correct) / len(items),
        "accuracy_stderr": _stderr(correct),
        "accuracy_norm": sum(correct_norm) / len(items),
        "accuracy_norm_stderr": _stderr(correct_norm),
    }


def likelihoods(items: list[Item], streams: list[tuple[Bucket, Stream]], logprobs: Logprobs) -> list[list[float]]:
    """Return the summed log-likelihood of every continuation of every item."""
    values = [[0.0] * len(item.pairs) for item in items]
    for bucket, stream in streams:
        tokens = stream.ids_ST.shape[1]
        places = [
            row * tokens + place
            for row, (first, end) in zip(bucket.rows, bucket.spans, strict=True)
            for place in range(first - 1, end - 1)
        ]
        wanted = [token for own in bucket.wanted for token in own]
        logprobs_N = logprobs(stream, torch.tensor(places), torch.tensor(wanted)).double()
        sizes = [len(own) for own in bucket.wanted]
        for (item, choice), own_N in zip(bucket.places, logprobs_N.split(sizes), strict=True):
            values[item][choice] = float(own_N.sum())
    return values


def choices(items: list[Item], values: list[list[float]]) -> tuple[list[int], list[int]]:
    """Return the chosen pair of every item: by log-likelihood, and by log-likelihood per character."""
    normed = [
        [value / max(len(text), 1) for value, (_, text) in zip(own, item.pairs, strict=True)]
        for own, item in zip(values, items, strict=True)
    ]
    return [_best(own) for own in values], [_best(own) for own in normed]


def _text(value: Any) -> str:
    """Return a text, or a number as text. Raises RowError for half of a surrogate pair, TypeError for the rest."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    require_unicode(str(value))
    return str(value)


def _item(row: Any) -> Item:
    pairs = tuple((_text(context), _text(continuation)) for context, continuation in row["pairs"])
    gold = int(row["gold"])
    if not (len(pairs) >= 2 and all(continuation for _, continuation in pairs)):
        raise ValueError
    if not 0 <= gold < len(pairs):
        raise _GoldError(f"gold {gold} is not an index of the {len(pairs)} pairs: expected 0 to {len(pairs) - 1}")
    return Item(pairs, gold)


def _encode_all(pairs: list[tuple[str, str]], tokenizer: Any, bos: Bos) -> list[tuple[list[int], int]]:
    """Return, for every pair, the tokens of both together and the index of the first token of the continuation."""
    texts = list(dict.fromkeys(text for pair in pairs for text in _parts(*pair)))
    tokens = dict(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    begin = Bos(bos.ids or (int(first),))  # of an empty context
    encoded: list[tuple[list[int], int]] = []
    for context, continuation in pairs:
        ids, *before = (tokens[text] for text in _parts(context, continuation))
        if before:
            whole = bos.begin(ids)
            encoded.append((whole, max(min(len(bos.begin(before[0])), len(whole) - 1), 1)))
        else:
            encoded.append(([*begin.ids, *(begin.strip(ids) or ids)], len(begin.ids)))
    return encoded


def _parts(context: str, continuation: str) -> tuple[str, ...]:
    """Return the texts that are tokenized: both together and the context, or the continuation alone."""
    return (context + continuation, context.rstrip()) if context else (continuation,)


def _bucket(encoded: list[_Sequence], tokenizer: Any) -> Bucket:
    longest = max(len(entry.ids) for entry in encoded) - 1
    inputs: list[list[int]] = []
    rows: list[int] = []
    for entry in encoded:
        if not inputs or inputs[-1] != entry.ids[:-1]:
            inputs.append(entry.ids[:-1])
        rows.append(len(inputs) - 1)
    ids_ST = torch.tensor([ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids in inputs])
    return Bucket(
        ids_ST,
        rows,
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
