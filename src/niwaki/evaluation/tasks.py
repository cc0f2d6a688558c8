"""Multiple-choice tasks: the choice whose continuation the model finds most likely.

A task file is JSONL; every line is `{"task": name, "pairs": [[context, continuation], ...], "gold": index}`.
`accuracy` compares summed log-likelihoods, `accuracy_norm` divides them by the continuation's characters (as
lm-evaluation-harness does), each with the standard error of a mean of n independent items.

Sequences are padded on the right: a causal model's earlier positions cannot see it, so no mask is needed.

Legend: S sequences, T tokens, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.errors import CalibrationError
from niwaki.stream import Stream

BUCKETS = 4
Logits = Callable[[Stream, slice], Tensor]


@dataclass(frozen=True)
class Item:
    """One question: its (context, continuation) pairs and the index of the right one."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded to [S, T]; `spans` tells which tokens are the continuation."""

    ids_ST: Tensor
    places: list[tuple[int, int]]  # (item, choice) of every sequence
    spans: list[tuple[int, int]]  # first and last+1 token of its continuation


class _GoldError(Exception):
    """The index of the right pair points outside the pairs."""


def read_items(path: str, limit: int | None) -> list[Item]:
    """The questions of a task file. Raises CalibrationError naming the first line that is not one."""
    if not Path(path).is_file():
        raise CalibrationError(f"no such task file: {path}")
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
    """All sequences of all items, in up to BUCKETS groups of similar length. Long contexts lose their start."""
    encoded: list[tuple[list[int], int, tuple[int, int]]] = []
    for index, item in enumerate(items):
        for choice, (context, continuation) in enumerate(item.pairs):
            ids = tokenizer(context + continuation, add_special_tokens=False, verbose=False)["input_ids"]
            split = len(tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
            split = max(min(split, len(ids) - 1), 1) if context else 1
            if not context:
                ids = [tokenizer.eos_token_id, *ids]
            excess = 0 if positions is None else max(0, len(ids) - positions)
            if split - excess < 1:
                raise CalibrationError(f"question {index}: the continuation alone exceeds the {positions} positions")
            encoded.append((ids[excess:], split - excess, (index, choice)))
    encoded.sort(key=lambda entry: (len(entry[0]), entry[2]))
    size = math.ceil(len(encoded) / BUCKETS)
    return [_bucket(encoded[first : first + size], tokenizer) for first in range(0, len(encoded), size)]


def score(items: list[Item], found: list[tuple[Bucket, Stream]], logits: Logits) -> dict[str, Any]:
    """Accuracy, length-normalised accuracy and their standard errors."""
    right, right_norm = (
        [choice == item.gold for choice, item in zip(chosen, items, strict=True)]
        for chosen in choices(items, likelihoods(items, found, logits))
    )
    return {
        "items": len(items),
        "accuracy": sum(right) / len(items),
        "accuracy_stderr": _stderr(right),
        "accuracy_norm": sum(right_norm) / len(items),
        "accuracy_norm_stderr": _stderr(right_norm),
    }


def likelihoods(items: list[Item], found: list[tuple[Bucket, Stream]], logits: Logits) -> list[list[float]]:
    """Summed log-likelihood of every continuation of every item."""
    values = [[0.0] * len(item.pairs) for item in items]
    for bucket, stream in found:
        for rows in stream.slices():
            logprobs_BTV = logits(stream, rows).log_softmax(-1)
            for position, row in enumerate(range(rows.start, rows.stop)):
                item, choice = bucket.places[row]
                values[item][choice] = continued(logprobs_BTV[position], bucket, row)
    return values


def continued(logprobs_TV: Tensor, bucket: Bucket, row: int) -> float:
    """Log-likelihood of the continuation in one sequence of a bucket."""
    first, end = bucket.spans[row]
    wanted_T1 = bucket.ids_ST[row, first:end, None].to(logprobs_TV.device)
    return float(logprobs_TV[first - 1 : end - 1].gather(1, wanted_T1).sum(dtype=torch.float64))


def choices(items: list[Item], values: list[list[float]]) -> tuple[list[int], list[int]]:
    """The pair chosen for every item: by log-likelihood, and by log-likelihood a character."""
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
        raise _GoldError(f"gold {gold} is no index of the {len(pairs)} pairs: expected 0 to {len(pairs) - 1}")
    return Item(pairs, gold)


def _bucket(encoded: list[tuple[list[int], int, tuple[int, int]]], tokenizer: Any) -> Bucket:
    longest = max(len(ids) for ids, _, _ in encoded)
    ids_ST = torch.full((len(encoded), longest), tokenizer.eos_token_id, dtype=torch.int64)
    for row, (ids, _, _) in enumerate(encoded):
        ids_ST[row, : len(ids)] = torch.tensor(ids)
    spans = [(split, len(ids)) for ids, split, _ in encoded]
    return Bucket(ids_ST, [place for _, _, place in encoded], spans)


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _stderr(right: list[bool]) -> float | None:
    if len(right) < 2:
        return None
    mean = sum(right) / len(right)
    return math.sqrt(mean * (1 - mean) / (len(right) - 1))
