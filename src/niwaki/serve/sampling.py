"""Sampling of one token from the logits of a sequence, and its log-probability with the most likely alternatives.

Each request has its own generator and takes one uniform number per token. Thus a seed gives the same numbers in any
batch. The token is the one at which the cumulated probabilities pass that number. Their order is that of the
vocabulary, or with top_p from the most likely token down to a sum of p. Log-probabilities are those of the model,
before temperature and top_p.

One case is not reproducible. The logits of a batch and of a sequence alone differ in their last bits. A number that
lies within this difference of a border can choose the neighbour.

Legend: V vocabulary.

    token = sample(logits_V, sampling)
"""

import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """Sampling parameters of one request. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        self.generator = torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class TokenScore:
    """Token with its log-probability (None for the first of a text), and the most likely tokens at its position."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_V: Tensor, sampling: Sampling) -> int:
    """Return the next token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    uniform = torch.rand((), generator=sampling.generator, dtype=torch.float64)
    scaled_V = logits_V.detach().to("cpu", torch.float64) / sampling.temperature
    probability_V = scaled_V.softmax(-1)
    if sampling.top_p >= 1:
        return _position(probability_V, uniform)
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept = max(int((before_V < sampling.top_p).sum()), 1)  # the smallest set whose sum reaches top_p
    return int(order_V[_position(sorted_V[:kept], uniform)])


def _position(probability_V: Tensor, uniform: Tensor) -> int:
    """Return the index at which the cumulated probabilities pass a number. Its probability is never 0."""
    cumulated_V = probability_V.cumsum(-1)
    index = int(torch.searchsorted(cumulated_V, uniform * cumulated_V[-1], right=True))
    return min(index, int(probability_V.nonzero()[-1]))


def score(logits_V: Tensor, token: int, count: int) -> TokenScore:
    """Return the score of a token by the logits before it, with the `count` most likely tokens."""
    return score_all(logits_V[None], [token], count)[0]


def score_all(logits_TV: Tensor, tokens: list[int], count: int) -> list[TokenScore]:
    """Return the scores of consecutive tokens."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen_T = logprobs_TV[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    top = logprobs_TV.topk(min(count, logprobs_TV.shape[-1]), dim=-1)
    likeliest = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [TokenScore(*values) for values in zip(tokens, chosen_T, likeliest, strict=True)]
