"""Scheduler of all answers: one thread, one model, a queue of jobs, a step at a time.

Before each step the scheduler frees the slots of cancelled jobs and admits the next job. A step is one chunk of a
prompt and one token of every running sequence (`decoding`). Thus a long prompt delays the others by one chunk at a
time, and a cancelled prompt costs at most one chunk. An exception in the model fails only the answers that it met.
After `MAX_FAILURES` in a row the engine stops, so that its supervisor can start another one.

    engine = Engine(model, tokenizer, EngineLimits(slots=8, queue=64, context=2048), Metrics())
    engine.start()
    engine.submit(job)
"""

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from niwaki.serve.decoding import Decoding
from niwaki.serve.http.api_errors import OVERLOADED, RefusalError, draining
from niwaki.serve.jobs import Failed, Job, Started
from niwaki.serve.prometheus import Metrics

MAX_FAILURES = 3
CLOSE_S = 2.0  # for the current step
STALLED_S = 120.0  # a longer step hangs
log = logging.getLogger("niwaki.serve")


@dataclass(frozen=True)
class EngineLimits:
    """Max sequences in the batch, jobs in the queue, tokens of prompt and answer, and prompt tokens in one step."""

    slots: int
    queue: int
    context: int
    chunk: int = 512


class Engine:
    """Queue, thread and health of one model."""

    def __init__(self, model: Any, tokenizer: Any, limits: EngineLimits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self.decoding = Decoding(model, tokenizer, metrics)
        self.draining = False
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = False
        self._last_step = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="niwaki-engine", daemon=True)
        metrics.watch("niwaki_queue_length", "Requests that wait for a slot.", lambda: self.queued)
        metrics.watch("niwaki_running", "Sequences in slots.", lambda: self.running)

    @property
    def queued(self) -> int:
        """Return the number of waiting jobs."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return the number of occupied slots."""
        return self.decoding.occupied

    @property
    def idle(self) -> bool:
        """Check that no job waits or runs."""
        return not (self._waiting or self.running)

    @property
    def healthy(self) -> bool:
        """Check that the thread is alive and its current step does not hang."""
        stalled = self.running and time.monotonic() - self._last_step > STALLED_S
        return self._thread.is_alive() and not (stalled or self._closing)

    def restart_step_clock(self) -> None:
        """Give the current step its whole time again, after the process was stopped."""
        self._last_step = time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def check(self) -> None:
        """Raise RefusalError if the engine takes no job: it drains, it stopped, or its queue is full."""
        if self.draining:
            raise draining()
        if not self.healthy:
            raise RefusalError(503, "the engine stopped: the server is about to restart", kind=OVERLOADED, retry_s=5)
        if len(self._waiting) >= self.limits.queue:
            wait_s = math.ceil(self.decoding.mean_seconds * len(self._waiting) / self.limits.slots)
            message = f"{len(self._waiting)} requests wait already: try again later"
            raise RefusalError(429, message, kind=OVERLOADED, code="queue_full", retry_s=min(max(wait_s, 1), 60))

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raise RefusalError if `check` does."""
        with self._changed:
            self.check()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job. Its slot is free before the next step. A finished job may be cancelled too."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self) -> None:
        """Refuse new jobs, and finish those that wait or run."""
        self.draining = True

    def close(self) -> None:
        """End the thread. Unfinished jobs fail."""
        self.drain()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSE_S)
        self._fail_unfinished()  # the thread may hang

    def _run(self) -> None:
        try:
            self._loop()
        finally:  # no client waits for a thread that ended
            self._fail_unfinished()

    def _loop(self) -> None:
        with torch.no_grad():
            while self._wait_for_work():
                try:
                    self.decoding.drop_cancelled()
                    self._admit()
                    self.decoding.step(self.limits.chunk)
                except Exception:
                    log.exception("a step failed")
                    self.decoding.reset("the model failed on this request or on one beside it")
                if self.decoding.failures >= MAX_FAILURES:
                    log.error("%d failures in a row: the engine stops", self.decoding.failures)
                    break

    def _wait_for_work(self) -> bool:
        """Wait for a job. Return False if the loop must end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self.running)
            self._last_step = time.monotonic()
            return not self._closing

    def _admit(self) -> None:
        """Give a free slot to the first job in the queue, unless another prompt is still in prefill."""
        if not self.decoding.can_admit(self.limits.slots):
            return
        with self._changed:
            if not self._waiting:
                return
            job = self._waiting.popleft()
            admitted = self.decoding.admit(job)
        self.metrics.queue_seconds.observe(admitted - job.submitted)
        job.emit(Started())

    def _fail_unfinished(self) -> None:
        """Fail every job. No other step follows."""
        with self._changed:  # no job is submitted to a thread that ended
            self._closing = True
            waiting, self._waiting = [*self._waiting], deque()
        self.decoding.fail_all("the server is shutting down")
        for job in waiting:
            job.emit(Failed("the server is shutting down"))
