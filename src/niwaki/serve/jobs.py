"""Jobs of the engine, and the events of a job.

job = Job(ids, Sampling(seed=1), max_tokens=64, emit=events.put)
engine.submit(job)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from niwaki.serve.sampling import Sampling, TokenScore


@dataclass(frozen=True)
class Started:
    """Event: the job got a slot."""


@dataclass(frozen=True)
class Prefilled:
    """Event: the prefill of the prompt is complete. `scored` holds its tokens if the job asked for scores."""

    scored: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Decoded:
    """Event: a token was generated. `text` is complete with it, `scored` is there if the job asked for scores."""

    text: str
    scored: TokenScore | None = None


@dataclass(frozen=True)
class Finished:
    """Last event of an answered job: the reason of the end and the number of generated tokens."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """Last event of a job without an answer."""

    message: str


Event = Started | Prefilled | Decoded | Finished | Failed


@dataclass(eq=False)
class Job:
    """Request for one answer. The thread of the engine calls `emit`, which must not block.

    `logprobs`: number of most likely tokens that each token reports (None: no scores).
    `score_prompt`: report scores of the tokens of the prompt too.
    """

    ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    emit: Callable[[Event], None]
    stops: Sequence[str] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
