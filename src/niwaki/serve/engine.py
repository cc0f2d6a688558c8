"""The loop that writes all answers: one thread, one model, one token of every running sequence per step.

Between two steps it lets go of what ended or was cancelled, and reads one piece of the next prompt. A long prompt so
delays the others by a piece at a time, and a cancelled one costs at most a piece. What an exception in the model costs
is the answers that it met; after `MAX_FAILURES` in a row the engine gives up, for whoever supervises it to start
another.

    engine = Engine(model, tokenizer, Limits(slots=8, queue=64, context=2048), Metrics())
    engine.start()
    engine.submit(job)
"""

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from niwaki.serve.batch import Batch, SequenceState, batch_for
from niwaki.serve.http.api_errors import OVERLOADED, RefusalError, draining
from niwaki.serve.jobs import Failed, Finished, Job, Read, Started, Wrote
from niwaki.serve.metrics import Metrics
from niwaki.serve.sampling import Scored, pick, score, score_all
from niwaki.serve.text import IncrementalDetokenizer

MAX_FAILURES = 3
CLOSE_S = 2.0  # for the step under way
STALLED_S = 120.0  # a step that takes longer is one that hangs
log = logging.getLogger("niwaki.serve")


@dataclass(frozen=True)
class Limits:
    """How much at once: sequences in the batch, requests that wait, tokens of prompt and answer together, and tokens of
    a prompt that are read between two steps.
    """

    slots: int
    queue: int
    context: int
    piece: int = 512


@dataclass(eq=False)
class _Running:
    """A job in a slot."""

    job: Job
    place: SequenceState
    spoken: IncrementalDetokenizer
    read: int = 0
    written: int = 0
    token: int = 0
    scored: list[Scored] = field(default_factory=list)
    last_logits_V: Tensor | None = None
    began: float = field(default_factory=time.monotonic)
    wrote: float = 0.0


class Engine:
    """One model and those who want something written by it."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits, metrics: Metrics) -> None:
        self.model, self.tokenizer, self.limits, self.metrics = model, tokenizer, limits, metrics
        self.ends = _end_tokens(model, tokenizer)
        self.draining = False
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._reading: _Running | None = None
        self._running: list[_Running] = []
        self._batch: Batch = batch_for(model)
        self._closing = False
        self._failures = 0
        self._beat = time.monotonic()
        self._seconds_each = 1.0  # that a job stays in its slot, smoothed
        self._thread = threading.Thread(target=self._run, name="niwaki-engine", daemon=True)
        metrics.watch("niwaki_queue_length", "Requests that wait for a slot.", lambda: self.queued)
        metrics.watch("niwaki_running", "Sequences in slots.", lambda: self.running)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._running) + (self._reading is not None)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self._waiting or self.running)

    @property
    def healthy(self) -> bool:
        """Whether the loop still turns."""
        stalled = self.running and time.monotonic() - self._beat > STALLED_S
        return self._thread.is_alive() and not (stalled or self._closing)

    def woke(self) -> None:
        """The whole process stood still: the step under way has all its time again."""
        self._beat = time.monotonic()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def check(self) -> None:
        """Raises RefusalError when nothing can be submitted: draining, dead, or a full queue."""
        if self.draining:
            raise draining()
        if not self.healthy:
            raise RefusalError(503, "the engine stopped: the server is about to restart", kind=OVERLOADED, retry_s=5)
        if len(self._waiting) >= self.limits.queue:
            wait_s = math.ceil(self._seconds_each * len(self._waiting) / self.limits.slots)
            told = f"{len(self._waiting)} requests wait already: try again later"
            raise RefusalError(429, told, kind=OVERLOADED, code="queue_full", retry_s=min(max(wait_s, 1), 60))

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises RefusalError as `check` does."""
        with self._changed:
            self.check()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer any more; its slot is free before the next step. Ended jobs may be cancelled."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self) -> None:
        """From here on nothing new is taken; what waits and runs goes on."""
        self.draining = True

    def close(self) -> None:
        """Ends the thread; what is unfinished fails."""
        self.drain()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSE_S)
        self._fail_rest()  # of a thread that hangs

    def _run(self) -> None:
        try:
            self._loop()
        finally:  # whatever ended it, nobody waits in vain
            self._fail_rest()

    def _loop(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self._turn()
                except Exception:
                    log.exception("a step failed")
                    self._failures += 1
                    self._fail_all("the model failed on this request or on one beside it")
                    self._batch = batch_for(self.model)
                if self._failures >= MAX_FAILURES:
                    log.error("%d failures in a row: the engine stops", self._failures)
                    break

    def _wait(self) -> bool:
        """Until there is something to do; False when the loop is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self.running)
            self._beat = time.monotonic()
            return not self._closing

    def _turn(self) -> None:
        self._let_go()
        self._admit()
        if self._reading is not None:
            self._read_piece(self._reading)
        if self._running:
            self._step()

    def _let_go(self) -> None:
        """Frees the slots of cancelled jobs."""
        if self._reading is not None and self._reading.job.cancelled:
            reading, self._reading = self._reading, None
            self._batch.drop(reading.place)
            self._account(reading)
        self._leave([row for row, one in enumerate(self._running) if one.job.cancelled])

    def _admit(self) -> None:
        """The first in the queue takes a free slot."""
        if self._reading is not None or len(self._running) >= self.limits.slots:
            return
        with self._changed:
            if not self._waiting:
                return
            job = self._waiting.popleft()
            self._reading = _Running(
                job, self._batch.begin(), IncrementalDetokenizer(self.tokenizer, job.ids, job.stops)
            )
        self.metrics.queue_seconds.observe(self._reading.began - job.submitted)
        job.emit(Started())

    def _read_piece(self, one: _Running) -> None:
        """Reads on in a prompt; at its end comes the first token."""
        job = one.job
        pieces = math.ceil((len(job.ids) - one.read) / self.limits.piece)
        until = one.read + math.ceil((len(job.ids) - one.read) / pieces)  # alike, so that none has a single token
        try:
            logits_TV = self._batch.read(one.place, job.ids[one.read : until], every=job.score_prompt)
            if job.score_prompt:
                self._score_prompt(one, until, logits_TV)
        except Exception:
            log.exception("a prompt could not be read")
            self._failures += 1
            self._reading = None
            self._batch.drop(one.place)
            job.emit(Failed("the model failed on this request"))
            return
        self._failures = 0
        self.metrics.prompt_tokens.inc(until - one.read)
        one.read = until
        if until < len(job.ids):
            return
        self._reading = None
        job.emit(Read(one.scored))
        if self._take(one, logits_TV[-1]):
            self._batch.drop(one.place)
            self._account(one)
        else:
            self._batch.join(one.place)
            self._running.append(one)

    def _score_prompt(self, one: _Running, until: int, logits_TV: Tensor) -> None:
        """The tokens of this piece, seen from those before them."""
        if one.last_logits_V is None:
            one.scored.append(Scored(one.job.ids[0]))
            before_TV = logits_TV[:-1]
        else:
            before_TV = torch.cat([one.last_logits_V[None], logits_TV[:-1]])
        tokens = list(one.job.ids[until - len(before_TV) : until])
        if tokens:
            one.scored += score_all(before_TV, tokens, one.job.logprobs or 0)
        one.last_logits_V = logits_TV[-1]

    def _step(self) -> None:
        """A token for every row."""
        logits_BV = self._batch.step([one.token for one in self._running])
        self._failures = 0
        self.metrics.steps.inc()
        logits_BV = logits_BV.to("cpu", torch.float32)
        self._leave([row for row, one in enumerate(self._running) if self._take(one, logits_BV[row])])

    def _take(self, one: _Running, logits_V: Tensor) -> bool:
        """Chooses the next token of a sequence and tells of it; True if the answer ends here."""
        job, now = one.job, time.monotonic()
        if one.written >= job.max_tokens:  # nothing was to be written, only read
            return self._finish(one, "length")
        if bool(logits_V.isnan().any()):
            job.emit(Failed("the model computed values that are no numbers"))
            return True
        token = pick(logits_V, job.sampling)
        seconds = self.metrics.token if one.written else self.metrics.first_token
        seconds.observe(now - (one.wrote if one.written else job.submitted))
        if token in self.ends:
            text, _ = one.spoken.flush()
            if text:
                job.emit(Wrote(text))
            return self._finish(one, "stop")
        scored = None if job.logprobs is None else score(logits_V, token, job.logprobs)
        text, stopped = one.spoken.feed(token)
        one.token, one.wrote, one.written = token, now, one.written + 1
        self.metrics.written_tokens.inc()
        full = one.written >= job.max_tokens
        if full and not stopped:
            rest, stopped = one.spoken.flush()
            text += rest
        job.emit(Wrote(text, scored))
        return (stopped or full) and self._finish(one, "stop" if stopped else "length")

    def _finish(self, one: _Running, reason: str) -> bool:
        one.job.emit(Finished(reason, one.written))
        return True

    def _leave(self, rows: list[int]) -> None:
        if not rows:
            return
        self._batch.leave(rows)
        for row in rows:
            self._account(self._running[row])
        self._running = [one for row, one in enumerate(self._running) if row not in rows]

    def _account(self, one: _Running) -> None:
        """What a sequence that left tells about."""
        self._seconds_each += 0.2 * (time.monotonic() - one.began - self._seconds_each)
        if one.place.record is not None:
            self.metrics.contextual(one.place.record)

    def _fail_rest(self) -> None:
        """What is unfinished, when there will be no other step."""
        with self._changed:  # nothing is submitted to a thread that has ended
            self._closing = True
            waiting, self._waiting = [*self._waiting], deque()
        self._fail_all("the server is shutting down")
        for job in waiting:
            job.emit(Failed("the server is shutting down"))

    def _fail_all(self, message: str) -> None:
        """Everything in a slot fails."""
        failed = [*self._running, *([] if self._reading is None else [self._reading])]
        self._running, self._reading = [], None
        for one in failed:
            one.job.emit(Failed(message))


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    found = [tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
    return frozenset(int(end) for end in found)
