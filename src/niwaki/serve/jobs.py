"""What the engine is given, and what it tells on the way.

job = Job(ids, Sampling(seed=1), max_tokens=64, emit=events.put)
engine.submit(job)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from niwaki.serve.sampling import Sampling, Scored


@dataclass(frozen=True)
class Started:
    """The job left the queue."""


@dataclass(frozen=True)
class Read:
    """The prompt was read; its tokens are scored if the job asked for it."""

    scored: Sequence[Scored] = ()


@dataclass(frozen=True)
class Wrote:
    """A token, what can be shown with it, and its score if the job asked for it."""

    text: str
    scored: Scored | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a job that was answered: why it ended, tokens written."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The last event of a job that could not be answered."""

    message: str


Event = Started | Read | Wrote | Finished | Failed


@dataclass(eq=False)
class Job:
    """One answer that is wanted. `emit` is called from the engine's thread and must not wait.

    `logprobs`: how many of the likeliest tokens are told beside each (None: no scores); `score_prompt`: for the tokens
    of the prompt too.
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
