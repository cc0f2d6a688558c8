"""An audit: both models read the same prompt and answer, token by token, and are compared on them.

Teacher-forced through `/v1/completions` with `echo`, `logprobs` and no new tokens, as vLLM, niwaki's own server and
others answer it (llama.cpp's does not: it gives the log-probabilities of new tokens only). On the tokens of the answer:
the share where both find the same token most likely, and how much more likely the canary finds its own words than the
dense model does. On the tokens of the prompt, which neither wrote: the ratio of perplexities. The same tokens and the
same definitions as in `niwaki compare`; the answer is the canary's own.

Cost: two requests that read prompt and answer once, on servers that also answer users; `Sampling.max_audits` at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from niwaki.rollout.answers import COMPLETIONS, UnreadError
from niwaki.rollout.http_client import UpstreamError
from niwaki.rollout.upstream import Server

MAX_CHARACTERS = 32_000
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Token:
    """One token of a text as one model sees it: where it begins, how likely it is, what was most likely there."""

    at: int
    text: str
    logprob: float
    best: str


@dataclass(frozen=True)
class Audit:
    """What one audited answer showed. `places`: the answer's tokens with what the dense model finds most likely."""

    tokens: int
    top1_agreement: float
    logprob_gap: float
    perplexity_ratio: float | None
    places: tuple[tuple[str, str, bool], ...]

    def values(self) -> dict[str, float]:
        """By the names of `signals`."""
        found = {"top1_agreement": self.top1_agreement, "logprob_gap": self.logprob_gap}
        return found if self.perplexity_ratio is None else {**found, "perplexity_ratio": self.perplexity_ratio}


async def audit(stable: Server, canary: Server, model: str, prompt: str, answer: str) -> Audit:
    """Scores an answer of the canary. Raises UnreadError for what cannot be scored."""
    if len(prompt) + len(answer) > MAX_CHARACTERS:
        raise UnreadError("too long to audit")
    own = await _read(canary, model, prompt + answer, "the canary")
    dense = await _read(stable, model, prompt + answer, "the dense model")
    return compared(dense, own, len(prompt))


def compared(dense: Sequence[Token], own: Sequence[Token], boundary: int) -> Audit:
    """Both readings of one text; from `boundary` on it is the answer. Raises UnreadError where they do not fit."""
    if [token.text for token in dense] != [token.text for token in own]:
        raise UnreadError("the servers cut the text into other tokens")
    pairs = list(zip(dense, own, strict=True))
    answer = [pair for pair in pairs if pair[0].at >= boundary]
    prompt = [pair for pair in pairs if pair[0].at < boundary]
    if not answer:
        raise UnreadError("no token of the answer begins behind the prompt")
    same = [mine.best == theirs.best for theirs, mine in answer]
    return Audit(
        tokens=len(answer),
        top1_agreement=sum(same) / len(answer),
        logprob_gap=_mean([mine.logprob - theirs.logprob for theirs, mine in answer]),
        perplexity_ratio=math.exp(min(_mean([t.logprob - m.logprob for t, m in prompt]), 50.0)) if prompt else None,
        places=tuple((theirs.text, theirs.best, alike) for (theirs, _), alike in zip(answer, same, strict=True)),
    )


async def _read(server: Server, model: str, text: str, who: str) -> list[Token]:
    payload = {
        "model": model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0,
        "stream": False,
    }  # fmt: skip
    try:
        found = await server.ask(COMPLETIONS, payload, _TIMEOUT_S)
    except UpstreamError as failure:
        raise UnreadError(f"{who} did not score: {failure}") from failure
    try:
        return tokens_in(found, len(text))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UnreadError(f"{who} does not score given text (echo with logprobs)") from error


def tokens_in(found: dict[str, Any], length: int) -> list[Token]:
    """The scored tokens of an echoed text of `length` characters; the first has no score.

    Raises KeyError, TypeError, IndexError or ValueError for any other answer.
    """
    scored = found["choices"][0]["logprobs"]
    tokens: list[Token] = []
    for text, logprob, tops, at in zip(
        scored["tokens"], scored["token_logprobs"], scored["top_logprobs"], scored["text_offset"], strict=True
    ):
        if at >= length and tokens:
            break  # a server that insists on a new token
        if logprob is not None and tops:
            tokens.append(Token(int(at), str(text), float(logprob), str(max(tops, key=tops.__getitem__))))
    if not tokens or tokens[-1].at + len(tokens[-1].text) < length:
        raise ValueError("not the whole text was scored")
    if not all(math.isfinite(token.logprob) for token in tokens):
        raise ValueError("a token is impossible")
    return tokens


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
