"""Audit of one answer: both models score the same prompt and answer, token by token.

The scores are teacher-forced, through `/v1/completions` with `echo`, `logprobs` and no new tokens. vLLM and
`niwaki serve` support that; llama.cpp returns log-probabilities of new tokens only. A server begins the text as the
model was trained. A chat that was rendered with the names of the model's tokens is scored as it is. On the tokens of
the answer, an audit measures the gap of the log-probabilities, and the share where both models prefer the same token.
On the tokens of the prompt, which neither model generated, it measures the ratio of perplexities. The definitions are
those of `niwaki compare`. The answer is the one of the canary.

Cost: two requests that prefill prompt and answer once, on servers that also answer users. At most
`TrafficSampling.max_audits` run at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from niwaki.rollout.answers import COMPLETIONS, UnreadableError
from niwaki.rollout.http_client import UpstreamError
from niwaki.rollout.upstream import UpstreamServer

MAX_CHARACTERS = 32_000
MAX_ADDED = 2  # tokens that a server puts before a text
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ScoredToken:
    """Token of a text with its scores by one model: start, text, log-probability, most likely token at its position."""

    at: int
    text: str
    logprob: float
    best: str


@dataclass(frozen=True)
class Audit:
    """Result of one audit. `places`: token of the answer, most likely token of dense, True if equal."""

    tokens: int
    top1_agreement: float
    logprob_gap: float
    perplexity_ratio: float | None
    places: tuple[tuple[str, str, bool], ...]

    def values(self) -> dict[str, float]:
        """Return the values by the names of `signals`."""
        values = {"top1_agreement": self.top1_agreement, "logprob_gap": self.logprob_gap}
        return values if self.perplexity_ratio is None else {**values, "perplexity_ratio": self.perplexity_ratio}


async def audit(
    stable: UpstreamServer, canary: UpstreamServer, model: str, prompt: str, answer: str, *, complete: bool = False
) -> Audit:
    """Score an answer of the canary with both models. Raise UnreadableError if it cannot be scored.

    `complete`: the prompt holds its beginning-of-text token, if it has one, so the servers add none.
    """
    if len(prompt) + len(answer) > MAX_CHARACTERS:
        raise UnreadableError("too long to audit")
    own = await _score(canary, model, prompt + answer, "the canary", complete)
    dense = await _score(stable, model, prompt + answer, "the dense model", complete)
    return compare_scores(dense, own, len(prompt))


def compare_scores(dense: Sequence[ScoredToken], own: Sequence[ScoredToken], boundary: int) -> Audit:
    """Compare the scores of one text, whose answer starts at `boundary`. Raise UnreadableError if they do not match."""
    if [token.text for token in dense] != [token.text for token in own]:
        raise UnreadableError("the servers split the text into different tokens")
    pairs = list(zip(dense, own, strict=True))
    answer = [pair for pair in pairs if pair[0].at >= boundary]
    prompt = [pair for pair in pairs if pair[0].at < boundary]
    if not answer:
        raise UnreadableError("no token of the answer starts after the prompt")
    same = [mine.best == theirs.best for theirs, mine in answer]
    return Audit(
        tokens=len(answer),
        top1_agreement=sum(same) / len(answer),
        logprob_gap=_mean([mine.logprob - theirs.logprob for theirs, mine in answer]),
        perplexity_ratio=math.exp(min(_mean([t.logprob - m.logprob for t, m in prompt]), 50.0)) if prompt else None,
        places=tuple((theirs.text, theirs.best, equal) for (theirs, _), equal in zip(answer, same, strict=True)),
    )


async def _score(server: UpstreamServer, model: str, text: str, name: str, complete: bool) -> list[ScoredToken]:
    payload: dict[str, Any] = {
        "model": model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0,
        "stream": False,
    }  # fmt: skip
    if complete:
        payload["add_special_tokens"] = False
    try:
        reply = await server.request_json(COMPLETIONS, payload, _TIMEOUT_S)
    except UpstreamError as failure:
        raise UnreadableError(f"{name} did not score: {failure}") from failure
    try:
        return parse_tokens(reply, text)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UnreadableError(f"{name} does not score given text (echo with logprobs)") from error


def parse_tokens(reply: dict[str, Any], text: str) -> list[ScoredToken]:
    """Return the scored tokens of an echoed text. The first has no score.

    Tokens that the server put before the text are left out, and so are their characters, which some servers count.
    Raise KeyError, TypeError, IndexError or ValueError for any other answer.
    """
    scored, length = reply["choices"][0]["logprobs"], len(text)
    added, shift = _added_tokens(scored["tokens"], scored["text_offset"], text)
    tokens: list[ScoredToken] = []
    columns = (scored[name][added:] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    for name, logprob, tops, offset in zip(*columns, strict=True):
        at = int(offset) - shift
        if at >= length and tokens:
            break  # some servers add a new token
        if logprob is not None and tops:
            tokens.append(ScoredToken(at, str(name), float(logprob), str(max(tops, key=tops.__getitem__))))
    if not tokens or tokens[-1].at + len(tokens[-1].text) < length:
        raise ValueError("not the whole text was scored")
    if not all(math.isfinite(token.logprob) for token in tokens):
        raise ValueError("a token is impossible")
    return tokens


def _added_tokens(names: Sequence[str], offsets: Sequence[int], text: str) -> tuple[int, int]:
    """Return how many of the first tokens are not in the text, and the characters that their offsets count."""
    for added in range(min(MAX_ADDED + 1, len(names))):
        name = names[added].strip()
        if not name or _is_part(name) or text.lstrip().startswith(name):
            return added, int(offsets[added]) - int(offsets[0])
    return 0, 0


def _is_part(name: str) -> bool:
    """Check that a token is a part of a character, which no text begins with."""
    return name.startswith("bytes:") or "\ufffd" in name


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
