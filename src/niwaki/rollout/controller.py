"""Controller of a running roll-out: it stores each decision, then changes the traffic.

A decision to widen has no effect if it cannot be stored. A decision to return is stored first too. If the store fails,
traffic goes back to dense in any case, because safety does not wait for a disk. The controller tries to store it again
at each tick. After a restart the store holds the state, so a return is never lost.

    controller.tick(now)      about every second; it also reads the effect of `niwaki rollout promote` and `abort`
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from niwaki.errors import InputError, OutputError
from niwaki.rollout.counters import RolloutCounters, copy_interval
from niwaki.rollout.decision import Verdict, decide
from niwaki.rollout.drift import DriftWatch
from niwaki.rollout.histogram import Interval
from niwaki.rollout.store import Change, RolloutState, StaleError, Status, Store

log = logging.getLogger("niwaki.rollout")


@dataclass(frozen=True)
class Snapshot:
    """Input of a decision: all intervals, with a copy of the open one, and the state of the drift tests."""

    intervals: list[Interval]
    drift: dict[str, Any]


@dataclass
class Controller:
    """Controller of one roll-out. `files_of` returns the identity of the canary, which must not change."""

    store: Store
    state: RolloutState
    limits: Mapping[str, float]
    counters: RolloutCounters
    watch: DriftWatch
    files_of: Callable[[], str]
    last_look: float
    verdict: Verdict | None = None
    unstored: Change | None = None
    alarms_noted: int = 0

    @property
    def share(self) -> float:
        """Return the share of traffic that the canary gets now. It is 0 while a return is not stored."""
        return 0.0 if self.unstored is not None else self.state.share

    @property
    def salt(self) -> str:
        """Return the salt of the hash that routes users."""
        return str(self.state.id)

    @property
    def active(self) -> bool:
        """Check that the canary gets traffic, or may get it."""
        return self.state.status in ("running", "promoted") and self.unstored is None

    def tick(self, now: float) -> None:
        """Read the store, and decide at the end of an interval."""
        self.apply(self.judge(self.snapshot(now), now), now)

    def intervals_now(self) -> list[Interval]:
        """Return all intervals, with a copy of the open one."""
        return [*self.counters.closed, copy_interval(self.counters.open)]

    def snapshot(self, now: float) -> Snapshot | None:
        """Return the input of a decision, if one is due. Another thread may read it."""
        if not self.active or now - self.last_look < self.state.policy.interval_s:
            return None
        self.last_look = now
        return Snapshot(self.intervals_now(), self.watch.as_json())

    def judge(self, snapshot: Snapshot | None, now: float) -> Verdict | None:
        """Store and decide: all work that waits for the disk or computes. Raise OutputError if the store fails."""
        try:
            self._store_unstored(now)
            stored = self.store.current()
            if stored is not None and stored.id == self.state.id and stored.version != self.state.version:
                self.state = stored
        except OutputError as error:
            log.error("%s", error)  # a broken canary must still be found
        if snapshot is None or not self.active:
            return None
        if not self._same_canary():
            reason = "the files of the canary changed: start a new roll-out of the new canary with `niwaki rollout run`"
            self._return(Change("return", "returned", self.state.step, reason), now)
            return None
        verdict = decide(self.state.policy, self.limits, self.state.step, snapshot.intervals, snapshot.drift["since"])
        self._carry_out(verdict, snapshot, now)
        self.store.save(self.state, snapshot.intervals[-2:], snapshot.drift)
        return verdict

    def _same_canary(self) -> bool:
        try:
            return self.files_of() == self.state.identity
        except (InputError, OSError):  # the folder does not exist, or changes at this moment
            return False

    def apply(self, verdict: Verdict | None, now: float) -> None:
        """Close the open interval if it has enough requests."""
        if verdict is None:
            return
        self.verdict = verdict
        if self._complete(self.counters.open):
            self.counters.next_interval(self.state.step, now)

    def _complete(self, interval: Interval) -> bool:
        return interval.step != self.state.step or (
            interval.histogram("error_rate").total >= self.state.policy.min_requests
        )

    def _carry_out(self, verdict: Verdict, snapshot: Snapshot, now: float) -> None:
        state, findings = self.state, [finding.as_json() for finding in verdict.findings]
        complete = self._complete(snapshot.intervals[-1])
        if verdict.action == "return":
            self._return(Change("return", "returned", state.step, verdict.reason, findings), now)
        elif verdict.action == "widen" and state.status == "running" and complete:
            done = state.step == state.last_step
            status: Status = "promoted" if done else "running"
            change = Change("promote" if done else "widen", status, state.step + (not done), verdict.reason, findings)
            try:
                self.state = self.store.change(state, change, now)
            except StaleError:
                log.warning("the roll-out changed at the same time: not widened")
        elif complete:
            self.store.note(state, Change("hold", state.status, state.step, verdict.reason, findings), now)
        for alarm in snapshot.drift["alarms"][self.alarms_noted :]:
            self.store.note(state, Change("alarm", self.state.status, self.state.step, alarm), now)
            self.alarms_noted += 1

    def _return(self, change: Change, now: float) -> None:
        self.unstored = change  # the share is 0 from now on, also if the store fails
        self._store_unstored(now)

    def _store_unstored(self, now: float) -> None:
        if self.unstored is None:
            return
        while True:
            try:
                self.state = self.store.change(self.state, self.unstored, now)
            except StaleError:
                self.state = self.store.current() or self.state
                if self.state.status in ("returned", "aborted"):
                    break  # another process returned to dense
            else:
                break
        log.warning("returned to the dense model: %s", self.unstored.reason)
        self.unstored = None
