"""Both models on the same tokens of a text: what every token says, summed over documents.

Of every predicted token five numbers stay: its negative log-likelihood and the most likely token under either model,
and the divergence between them. Perplexity, KL and agreement of a file, of a domain and of the worst passages all
come from them; distributions over the vocabulary are never kept.

A unit for the intervals is a document, or a window where a file has fewer than MIN_DOCUMENTS (a book is one
document). Windows of one long text are taken as independent, which neighbours are not quite.

Legend: S windows, T tokens, V vocabulary, P predicted tokens of a window, U units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from niwaki.data.texts import owned_windows, read_documents
from niwaki.errors import NumericalError
from niwaki.measure.intervals import Floats, mean_interval, share_interval
from niwaki.measure.schema import DataQuality, Estimate, Example, Quality, TokenDivergence, Unit

MIN_DOCUMENTS = 20
PASSAGE = 32  # tokens of an example
EXAMPLES = 20
Bools = NDArray[np.bool_]
Logits = Callable[[int], Tensor]  # of one window, [T, V]


@dataclass(frozen=True)
class Text:
    """A data file as windows, the document of every token, and the domain of every document."""

    path: str
    ids_ST: Tensor
    owners_ST: Tensor
    domains: list[str | None]


@dataclass(frozen=True)
class Scored:
    """What both models say of every predicted token, those behind the first `first` of a window."""

    text: Text
    first: int
    dense_nll_SP: Floats
    nll_SP: Floats
    kl_SP: Floats
    dense_top1_SP: NDArray[np.int64]
    top1_SP: NDArray[np.int64]


def read_text(path: str, tokenizer: Any, *, field: str, seq_len: int, max_tokens: int | None) -> Text:
    """The windows of a data file. Raises CalibrationError where it cannot be read or fills none."""
    documents = read_documents([path], field)
    texts = [document.text for document in documents]
    windows_ST, owners_ST = owned_windows(texts, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
    return Text(path, windows_ST, owners_ST, [document.domain for document in documents])


def score_text(text: Text, dense: Logits, candidate: Logits, first: int = 0) -> Scored:
    """Window by window, both distributions in memory for one window only."""
    rows: list[tuple[Tensor, ...]] = []
    for row, ids_T in enumerate(text.ids_ST):
        dense_PV = dense(row)[first:-1].float().log_softmax(-1)
        model_PV = candidate(row)[first:-1].float().log_softmax(-1)
        wanted_P1 = ids_T[first + 1 :, None].to(dense_PV.device)
        kl_P = (dense_PV.exp() * (dense_PV - model_PV)).sum(-1, dtype=torch.float64).clamp_min(0)  # rounding only
        nlls = (-logprobs_PV.gather(1, wanted_P1)[:, 0].double() for logprobs_PV in (dense_PV, model_PV))
        rows.append(tuple(part.cpu() for part in (*nlls, kl_P, dense_PV.argmax(-1), model_PV.argmax(-1))))
    found = [torch.stack(part).numpy() for part in zip(*rows, strict=True)]
    if not np.isfinite(found[2]).all():
        raise NumericalError(f"{text.path}: a model puts out NaN or infinite logits, nothing can be compared")
    return Scored(text, first, *found)


def data_quality(scored: Scored, confidence: float, rng: np.random.Generator) -> DataQuality:
    """The whole file, and every domain that its documents name."""
    text = scored.text
    owners_SP = text.owners_ST[:, scored.first + 1 :].numpy()
    every = np.ones_like(owners_SP, dtype=bool)
    unit: Unit = "document" if len(np.unique(owners_SP)) >= MIN_DOCUMENTS else "window"
    units_SP = owners_SP if unit == "document" else np.broadcast_to(np.arange(len(owners_SP))[:, None], owners_SP.shape)
    domains = {}
    if any(domain is not None for domain in text.domains):
        names_D = np.array([domain or "(none)" for domain in text.domains])
        names_SP = names_D[owners_SP]
        for name in np.unique(names_SP):
            domains[str(name)] = _quality(scored, names_SP == name, units_SP, unit, confidence, rng)
    whole = _quality(scored, every, units_SP, unit, confidence, rng)
    return DataQuality(data=text.path, whole=whole, domains=domains)


def worst_examples(scored: Sequence[Scored], tokenizer: Any) -> tuple[Example, ...]:
    """The passages of PASSAGE tokens where the two models differ most, over all files."""
    places: list[tuple[float, int, int, int]] = []
    for number, one in enumerate(scored):
        for first in range(0, max(1, one.kl_SP.shape[1] - PASSAGE // 2), PASSAGE):  # no short rest: means of few vary
            means_S = one.kl_SP[:, first : first + PASSAGE].mean(1)
            places += [(float(mean), number, row, first) for row, mean in enumerate(means_S)]
    places.sort(key=lambda place: (-place[0], *place[1:]))
    return tuple(_example(scored[number], row, first, tokenizer) for _, number, row, first in places[:EXAMPLES])


def estimate(found: tuple[float, float | None, float | None], units: int) -> Estimate:
    """An interval with what it comes from."""
    return Estimate(value=found[0], low=found[1], high=found[2], units=units)


def _quality(
    scored: Scored, mask_SP: Bools, units_SP: NDArray[Any], unit: Unit, confidence: float, rng: np.random.Generator
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
        perplexity_ratio=estimate((mean, low, high), units),
        kl=estimate(interval(scored.kl_SP, mean_interval), units),
        top1_agreement=estimate(interval(agree_SP, share_interval), units),
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a broken model may have none that a float holds


def _example(scored: Scored, row: int, first: int, tokenizer: Any) -> Example:
    text, end = scored.text, min(first + PASSAGE, scored.kl_SP.shape[1])
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
        before=tokenizer.decode(ids_T[max(0, place - PASSAGE) : place].tolist()),
        kl=float(scored.kl_SP[row, first:end].mean()),
        tokens=tokens,
    )


def decode_one(tokenizer: Any, token: int) -> str:
    """The text of one token; a part of a character shows as a replacement character."""
    return str(tokenizer.decode([token]))
