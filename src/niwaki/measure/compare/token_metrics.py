"""Metrics of both models on the same tokens of a text: perplexity ratio, KL divergence, top-1 agreement.

Five numbers per predicted token are kept: its negative log-likelihood and the most likely token under either model,
and the KL divergence between them. All metrics of a file, of a domain and of the worst passages come from these
numbers. Distributions over the vocabulary are never kept.

The intervals resample documents, or windows if a file has fewer than MIN_DOCUMENTS (a book is one document). They take
windows of one long text as independent, although neighbours are weakly dependent.

Legend: S windows, T tokens, V vocabulary, P predicted tokens of a window, N of a part of it, U units, D documents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from niwaki.config.events import Report, silent
from niwaki.config.recipe import BosPolicy
from niwaki.data.texts import read_evaluation
from niwaki.errors import NumericalError
from niwaki.measure.intervals import Floats, mean_interval, share_interval
from niwaki.measure.schema import DataQuality, Estimate, Example, Quality, SampleUnit, TokenDivergence
from niwaki.model.logits import row_pieces

MIN_DOCUMENTS = 20
PASSAGE_TOKENS = 32
MAX_EXAMPLES = 20
Bools = NDArray[np.bool_]
Logits = Callable[[int, slice], Tensor]  # of a part of the positions of one window, [N, V]


@dataclass(frozen=True)
class Text:
    """A data file as windows, the document of every token, and the domain of every document.

    `skipped` are the rows that could not be used, by reason; `revision` is the commit of a data set of the hub.
    """

    path: str
    ids_ST: Tensor
    owners_ST: Tensor
    domains: list[str | None]
    skipped: Mapping[str, int] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class TokenScores:
    """Scores of both models for every predicted token, without the first `first` tokens of a window."""

    text: Text
    first: int
    dense_nll_SP: Floats
    nll_SP: Floats
    kl_SP: Floats
    dense_top1_SP: NDArray[np.int64]
    top1_SP: NDArray[np.int64]


def read_text(
    path: str, tokenizer: Any, *, field: str, seq_len: int, max_tokens: int | None, bos: BosPolicy = "auto",
    report: Report = silent,
) -> Text:  # fmt: skip
    """Return the windows of a data file. Raises CalibrationError if it cannot be read or is shorter than a window."""
    read = read_evaluation([path], field, tokenizer, seq_len=seq_len, max_tokens=max_tokens, bos=bos, report=report)
    return Text(path, read.ids_ST, read.owners_ST, read.domains, read.skipped, read.revision)


def score_text(
    text: Text, dense: Logits, candidate: Logits, first: int = 0, parts: Sequence[slice] | None = None
) -> TokenScores:
    """Score a text window by window. Only the distributions of one part of a window are in memory.

    `parts` cover the T positions of a window, one part without them. Raises NumericalError if logits are NaN or
    infinite.
    """
    last = text.ids_ST.shape[1] - 1  # the last position predicts nothing
    rows: list[tuple[Tensor, ...]] = []
    for row in range(len(text.ids_ST)):
        scored: list[tuple[Tensor, ...]] = []
        for part in parts or [slice(0, last + 1)]:
            begin, end = max(part.start, first), min(part.stop, last)
            if begin < end:
                kept = slice(begin - part.start, end - part.start)
                wanted_N = text.ids_ST[row, begin + 1 : end + 1]
                scored.append(  # without names here: what a part needs is free before the next one
                    _score_positions(_logprobs(dense(row, part)[kept]), _logprobs(candidate(row, part)[kept]), wanted_N)
                )
        rows.append(tuple(torch.cat(values) for values in zip(*scored, strict=True)))
    columns = [torch.stack(values).numpy() for values in zip(*rows, strict=True)]
    if not np.isfinite(columns[2]).all():
        raise NumericalError(f"{text.path}: a model returns NaN or infinite logits, so nothing can be compared")
    return TokenScores(text, first, *columns)


def _logprobs(logits_NV: Tensor) -> Tensor:
    return logits_NV.float().log_softmax(-1)


def _score_positions(dense_NV: Tensor, model_NV: Tensor, wanted_N: Tensor) -> tuple[Tensor, ...]:
    """Return both likelihoods, the KL divergence and both most likely tokens, by position, from log-probabilities."""
    wanted_N1 = wanted_N[:, None].to(dense_NV.device)
    kl_N = torch.cat(
        [
            (theirs_NV - own_NV).mul_(theirs_NV.exp()).sum(-1, dtype=torch.float64)
            for theirs_NV, own_NV in zip(row_pieces(dense_NV), row_pieces(model_NV), strict=True)
        ]
    ).clamp_min(0)  # of rounding errors
    nlls = (-logprobs_NV.gather(1, wanted_N1)[:, 0].double() for logprobs_NV in (dense_NV, model_NV))
    return tuple(values.cpu() for values in (*nlls, kl_N, dense_NV.argmax(-1), model_NV.argmax(-1)))


def data_quality(scored: TokenScores, confidence: float, rng: np.random.Generator) -> DataQuality:
    """Return the quality on the whole file and on every domain of its documents."""
    text = scored.text
    owners_SP = text.owners_ST[:, scored.first + 1 :].numpy()
    every = np.ones_like(owners_SP, dtype=bool)
    unit: SampleUnit = "document" if len(np.unique(owners_SP)) >= MIN_DOCUMENTS else "window"
    units_SP = owners_SP if unit == "document" else np.broadcast_to(np.arange(len(owners_SP))[:, None], owners_SP.shape)
    domains = {}
    if any(domain is not None for domain in text.domains):
        names_D = np.array([domain or "(none)" for domain in text.domains])
        names_SP = names_D[owners_SP]
        for name in np.unique(names_SP):
            domains[str(name)] = _quality(scored, names_SP == name, units_SP, unit, confidence, rng)
    whole = _quality(scored, every, units_SP, unit, confidence, rng)
    skipped = dict(text.skipped)
    return DataQuality(data=text.path, whole=whole, domains=domains, skipped=skipped, revision=text.revision)


def worst_examples(scored: Sequence[TokenScores], tokenizer: Any) -> tuple[Example, ...]:
    """Return the passages of PASSAGE_TOKENS tokens with the highest mean KL divergence, over all files."""
    places: list[tuple[float, int, int, int]] = []
    for number, one in enumerate(scored):
        last = max(1, one.kl_SP.shape[1] - PASSAGE_TOKENS // 2)  # no short rest: means of few tokens vary
        for first in range(0, last, PASSAGE_TOKENS):
            means_S = one.kl_SP[:, first : first + PASSAGE_TOKENS].mean(1)
            places += [(float(mean), number, row, first) for row, mean in enumerate(means_S)]
    places.sort(key=lambda place: (-place[0], *place[1:]))
    return tuple(_example(scored[number], row, first, tokenizer) for _, number, row, first in places[:MAX_EXAMPLES])


def make_estimate(interval: tuple[float, float | None, float | None], units: int) -> Estimate:
    """Return (value, low, high) over `units` units as an estimate."""
    return Estimate(value=interval[0], low=interval[1], high=interval[2], units=units)


def _quality(
    scored: TokenScores,
    mask_SP: Bools,
    units_SP: NDArray[Any],
    unit: SampleUnit,
    confidence: float,
    rng: np.random.Generator,
) -> Quality:
    owners, places = np.unique(units_SP[mask_SP], return_inverse=True)
    units = len(owners)
    counts_U = np.bincount(places).astype(np.float64)

    def summed(values_SP: NDArray[Any]) -> Floats:
        return np.bincount(places, weights=values_SP[mask_SP].astype(np.float64)).astype(np.float64)

    def interval(values_SP: NDArray[Any], kind: Callable[..., tuple[float, float, float]]) -> tuple[float, Any, Any]:
        total_U = summed(values_SP)
        if units < 2:
            return float(total_U.sum() / counts_U.sum()), None, None
        return kind(total_U, counts_U, confidence, rng)

    ratio = interval(scored.nll_SP - scored.dense_nll_SP, mean_interval)
    agree_SP = scored.top1_SP == scored.dense_top1_SP
    mean, low, high = (None if end is None else _exp(end) for end in ratio)
    assert mean is not None
    return Quality(
        tokens=int(mask_SP.sum()),
        units=units,
        unit=unit,
        dense_perplexity=_exp(float(scored.dense_nll_SP[mask_SP].mean())),
        perplexity=_exp(float(scored.nll_SP[mask_SP].mean())),
        perplexity_ratio=make_estimate((mean, low, high), units),
        kl=make_estimate(interval(scored.kl_SP, mean_interval), units),
        top1_agreement=make_estimate(interval(agree_SP, share_interval), units),
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # the perplexity of a broken model may overflow


def _example(scored: TokenScores, row: int, first: int, tokenizer: Any) -> Example:
    text, end = scored.text, min(first + PASSAGE_TOKENS, scored.kl_SP.shape[1])
    place = first + scored.first + 1  # of the first predicted token in the window
    ids_T = text.ids_ST[row]
    tokens = tuple(
        TokenDivergence(
            token=decode_one(tokenizer, int(ids_T[place + offset])),
            kl=float(scored.kl_SP[row, first + offset]),
            dense_top1=decode_one(tokenizer, int(scored.dense_top1_SP[row, first + offset])),
            candidate_top1=decode_one(tokenizer, int(scored.top1_SP[row, first + offset])),
            dense_nll=float(scored.dense_nll_SP[row, first + offset]),
            candidate_nll=float(scored.nll_SP[row, first + offset]),
        )
        for offset in range(end - first)
    )
    return Example(
        data=text.path,
        domain=text.domains[int(text.owners_ST[row, place])],
        before=tokenizer.decode(ids_T[max(0, place - PASSAGE_TOKENS) : place].tolist()),
        kl=float(scored.kl_SP[row, first:end].mean()),
        tokens=tokens,
    )


def decode_one(tokenizer: Any, token: int) -> str:
    """Return the text of one token. Part of a character becomes a replacement character."""
    return str(tokenizer.decode([token]))
