"""Steps of the sequences in the slots: prefill of one prompt in chunks, and one token of each running sequence.

The engine decides when a job gets a slot; this module advances the jobs that have one. It samples tokens, ends
answers, emits the events of a job and counts them. All calls come from the thread of the engine, except `occupied`.

Legend: B sequences, T tokens, V vocabulary.

    decoding = Decoding(model, tokenizer, metrics)
    decoding.admit(job)
    decoding.step(chunk=512)
"""

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from niwaki.model.logits import position_slices, vocabulary_of
from niwaki.serve.batch import Batch, SequenceState, batch_for
from niwaki.serve.jobs import Decoded, Failed, Finished, Job, Prefilled
from niwaki.serve.prometheus import Metrics
from niwaki.serve.sampling import TokenScore, sample, score, score_all
from niwaki.serve.text import IncrementalDetokenizer

SMOOTHING = 0.2  # weight of the newest job in the mean time in a slot
log = logging.getLogger("niwaki.serve")


@dataclass(eq=False)
class ActiveSequence:
    """A job in a slot."""

    job: Job
    state: SequenceState
    detokenizer: IncrementalDetokenizer
    prefilled: int = 0
    generated: int = 0
    token: int = 0
    scored: list[TokenScore] = field(default_factory=list)
    last_logits_V: Tensor | None = None
    admitted: float = field(default_factory=time.monotonic)
    last_token_at: float = 0.0


class Decoding:
    """Sequences in the slots of one model. `failures` counts the failed steps since the last one that worked."""

    def __init__(self, model: Any, tokenizer: Any, metrics: Metrics) -> None:
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self.end_tokens = _end_tokens(model, tokenizer)
        self.failures = 0
        self.mean_seconds = 1.0  # of a job in its slot, smoothed
        self.batch: Batch = batch_for(model)
        self._prefilling: ActiveSequence | None = None
        self._running: list[ActiveSequence] = []

    @property
    def occupied(self) -> int:
        """Return the number of occupied slots."""
        return len(self._running) + (self._prefilling is not None)

    def can_admit(self, slots: int) -> bool:
        """Check that no prompt is in prefill and a slot is free."""
        return self._prefilling is None and len(self._running) < slots

    def admit(self, job: Job) -> float:
        """Give a slot to a job, and return the time of it."""
        detokenizer = IncrementalDetokenizer(self.tokenizer, job.ids, job.stops)
        self._prefilling = ActiveSequence(job, self.batch.begin(), detokenizer)
        return self._prefilling.admitted

    def drop_cancelled(self) -> None:
        """Free the slots of cancelled jobs."""
        if self._prefilling is not None and self._prefilling.job.cancelled:
            sequence, self._prefilling = self._prefilling, None
            self.batch.drop(sequence.state)
            self._count(sequence)
        self._remove([row for row, one in enumerate(self._running) if one.job.cancelled])

    def step(self, chunk: int) -> None:
        """Prefill at most `chunk` tokens of one prompt, then generate a token of each running sequence."""
        if self._prefilling is not None:
            self._prefill(self._prefilling, chunk)
        if self._running:
            self._decode()

    def fail_all(self, message: str) -> None:
        """Fail each job that has a slot."""
        failed = [*self._running, *([] if self._prefilling is None else [self._prefilling])]
        self._running, self._prefilling = [], None
        for sequence in failed:
            sequence.job.emit(Failed(message))

    def reset(self, message: str) -> None:
        """Count a failed step, fail each job that has a slot, and start with an empty batch."""
        self.failures += 1
        self.fail_all(message)
        self.batch = batch_for(self.model)

    def _prefill(self, sequence: ActiveSequence, chunk: int) -> None:
        """Prefill the next chunk of a prompt. After the last chunk, choose the first token of the answer."""
        job = sequence.job
        remaining = len(job.ids) - sequence.prefilled
        if job.score_prompt:  # logits of all its tokens; a single token would be a step of an answer
            chunk = min(chunk, max(2, position_slices(remaining, vocabulary_of(self.model))[0].stop))
        chunks = math.ceil(remaining / chunk)
        until = sequence.prefilled + math.ceil(remaining / chunks)  # equal chunks: the last has more than one token
        try:
            logits_TV = self.batch.read(sequence.state, job.ids[sequence.prefilled : until], every=job.score_prompt)
            if job.score_prompt:
                _score_prompt(sequence, until, logits_TV)
        except Exception:
            log.exception("the prefill of a prompt failed")
            self.failures += 1
            self._prefilling = None
            self.batch.drop(sequence.state)
            job.emit(Failed("the model failed on this request"))
            return
        self.failures = 0
        self.metrics.prompt_tokens.inc(until - sequence.prefilled)
        sequence.prefilled = until
        if until < len(job.ids):
            return
        self._prefilling = None
        job.emit(Prefilled(sequence.scored))
        if self._advance(sequence, logits_TV[-1]):
            self.batch.drop(sequence.state)
            self._count(sequence)
        else:
            self.batch.join(sequence.state)
            self._running.append(sequence)

    def _decode(self) -> None:
        """Generate a token of each running sequence, and remove the sequences whose answer ends."""
        logits_BV = self.batch.step([one.token for one in self._running])
        self.failures = 0
        self.metrics.steps.inc()
        logits_BV = logits_BV.to("cpu", torch.float32)
        self._remove([row for row, one in enumerate(self._running) if self._advance(one, logits_BV[row])])

    def _advance(self, sequence: ActiveSequence, logits_V: Tensor) -> bool:
        """Choose the next token of a sequence and emit it. Return True if the answer ends."""
        job, now = sequence.job, time.monotonic()
        if sequence.generated >= job.max_tokens:  # only the scores of the prompt were wanted
            return _finish(sequence, "length")
        if bool(logits_V.isnan().any()):
            job.emit(Failed("the model computed values that are not numbers"))
            return True
        token = sample(logits_V, job.sampling)
        seconds = self.metrics.token if sequence.generated else self.metrics.first_token
        seconds.observe(now - (sequence.last_token_at if sequence.generated else job.submitted))
        if token in self.end_tokens:
            text, _ = sequence.detokenizer.flush()
            if text:
                job.emit(Decoded(text))
            return _finish(sequence, "stop")
        scored = None if job.logprobs is None else score(logits_V, token, job.logprobs)
        text, stopped = sequence.detokenizer.feed(token)
        sequence.token, sequence.last_token_at, sequence.generated = token, now, sequence.generated + 1
        self.metrics.written_tokens.inc()
        full = sequence.generated >= job.max_tokens
        if full and not stopped:
            rest, stopped = sequence.detokenizer.flush()
            text += rest
        job.emit(Decoded(text, scored))
        return (stopped or full) and _finish(sequence, "stop" if stopped else "length")

    def _remove(self, rows: list[int]) -> None:
        if not rows:
            return
        self.batch.leave(rows)
        for row in rows:
            self._count(self._running[row])
        self._running = [one for row, one in enumerate(self._running) if row not in rows]

    def _count(self, sequence: ActiveSequence) -> None:
        """Count a sequence that left its slot."""
        self.mean_seconds += SMOOTHING * (time.monotonic() - sequence.admitted - self.mean_seconds)
        if sequence.state.record is not None:
            self.metrics.count_contextual(sequence.state.record)


def _score_prompt(sequence: ActiveSequence, until: int, logits_TV: Tensor) -> None:
    """Score the tokens of this chunk from the logits before them."""
    if sequence.last_logits_V is None:
        sequence.scored.append(TokenScore(sequence.job.ids[0]))
        before_TV = logits_TV[:-1]
    else:
        before_TV = torch.cat([sequence.last_logits_V[None], logits_TV[:-1]])
    tokens = list(sequence.job.ids[until - len(before_TV) : until])
    if tokens:
        sequence.scored += score_all(before_TV, tokens, sequence.job.logprobs or 0)
    sequence.last_logits_V = logits_TV[-1].clone()  # a view would keep those of the whole chunk


def _finish(sequence: ActiveSequence, reason: str) -> bool:
    """Emit the last event of an answer, and return True."""
    sequence.job.emit(Finished(reason, sequence.generated))
    return True


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    tokens = [tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in tokens)
