"""One token from the logits of a sequence, and what it and its rivals were worth.

Every request has a generator of its own and takes one uniform number a token, so a seed gives the same numbers
whatever else is in the batch. The token is where the cumulated probabilities pass that number: in order of the
vocabulary, or, under top_p, from the likeliest down to the share of p. Log-probabilities are those of the model itself,
before temperature and top_p.

What is left to chance: logits of a batch and of a sequence alone differ in their last bits, so that a number that falls
within those of a border can choose the neighbour.

Legend: V vocabulary.

    token = pick(logits_V, sampling)
"""

import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """How the tokens of one request are chosen; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        self.generator = torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability (None: nothing came before it) and the likeliest at its place."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def pick(logits_V: Tensor, sampling: Sampling) -> int:
    """The next token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    uniform = torch.rand((), generator=sampling.generator, dtype=torch.float64)
    scaled_V = logits_V.detach().to("cpu", torch.float64) / sampling.temperature
    probability_V = scaled_V.softmax(-1)
    if sampling.top_p >= 1:
        return _where(probability_V, uniform)
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    kept = max(int((before_V < sampling.top_p).sum()), 1)  # the fewest whose sum reaches top_p
    return int(order_V[_where(sorted_V[:kept], uniform)])


def _where(probability_V: Tensor, uniform: Tensor) -> int:
    """The place at which the cumulated probabilities pass a number; never one of probability 0."""
    cumulated_V = probability_V.cumsum(-1)
    place = int(torch.searchsorted(cumulated_V, uniform * cumulated_V[-1], right=True))
    return min(place, int(probability_V.nonzero()[-1]))


def score(logits_V: Tensor, token: int, most: int) -> Scored:
    """A token as the logits before it see it, with the `most` likeliest."""
    return score_all(logits_V[None], [token], most)[0]


def score_all(logits_TV: Tensor, tokens: list[int], most: int) -> list[Scored]:
    """The same for tokens one after another."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen_T = logprobs_TV[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    top = logprobs_TV.topk(min(most, logprobs_TV.shape[-1]), dim=-1)
    rivals = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [Scored(*found) for found in zip(tokens, chosen_T, rivals, strict=True)]
