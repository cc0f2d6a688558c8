"""Controller of a running roll-out: it stores each decision, then changes the traffic.

A decision to widen has no effect if it cannot be stored. A decision to return acts at once, because safety does not
wait for a database. It is in a file (`dense_mark`) before it is in the store, so a restart does not lose it. All writes
go through the `journal`: while the database is away they are kept, and written later in the same order.

    controller.tick(now)      about every second; it also reads the effect of `niwaki rollout promote` and `abort`
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from niwaki.errors import InputError, OutputError
from niwaki.rollout.counters import RolloutCounters, copy_interval
from niwaki.rollout.decision import Verdict, decide
from niwaki.rollout.dense_mark import DenseMark
from niwaki.rollout.drift import DriftWatch
from niwaki.rollout.histogram import Interval
from niwaki.rollout.journal import Journal
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
    mark: DenseMark
    verdict: Verdict | None = None
    unstored: Change | None = None
    alarms_noted: int = 0
    journal: Journal = field(default_factory=Journal)
    saved_to: int = 0
    was_away: bool = False

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
        """Read the store, and decide at the end of an interval. Raise OutputError if something is not stored."""
        self.apply(self.judge(self.snapshot(now), now), now)
        self.journal.check()

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
        """Decide, and store the decision. It waits for the database only for moments."""
        self._read_mark()
        self.journal.submit("poll", self._read_state)
        self._note_absence(self.journal.flush())
        if snapshot is None or not self.active:
            return None
        if not self._same_canary():
            reason = "the files of the canary changed: start a new roll-out of the new canary with `niwaki rollout run`"
            self._return(Change("return", "returned", self.state.step, reason), now)
            return None
        verdict = decide(self.state.policy, self.limits, self.state.step, snapshot.intervals, snapshot.drift["since"])
        applied = self._carry_out(verdict, snapshot, now)
        self._save(snapshot)
        self._note_absence(self.journal.flush())
        return verdict if applied else None

    def _read_mark(self) -> None:
        """Carry out an abort that the command line kept in the file because the database is away."""
        kept = self.mark.read() if self.active else None
        if kept is not None and kept.rollout in (None, self.state.id):
            self._return(kept.change, kept.at)

    def _read_state(self) -> None:
        """Read the effect of the command line."""
        stored = self.store.current()
        if stored is not None and stored.id == self.state.id and stored.version != self.state.version:
            self.state = stored

    def _note_absence(self, stored: bool) -> None:
        """Log once that the database is away, and once that it is back."""
        if not stored and not self.was_away:
            reason = self.journal.error or "it does not answer"
            log.error("the state database is away (%s): %d writes are kept", reason, self.journal.kept)
        elif stored and self.was_away:
            log.warning("the state database is back: all decisions are stored")
        self.was_away = not stored

    def _save(self, snapshot: Snapshot) -> None:
        """Store the counts of all intervals since the last time."""
        unsaved = [one for one in snapshot.intervals if one.number >= self.saved_to - 1]
        state = self.state

        def save() -> None:
            self.store.save(state, unsaved, snapshot.drift)
            self.saved_to = unsaved[-1].number

        self.journal.submit("save", save)

    def _note(self, change: Change, now: float) -> None:
        self.journal.submit("note", partial(self.store.note, self.state, change, now))

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

    def _carry_out(self, verdict: Verdict, snapshot: Snapshot, now: float) -> bool:
        """Carry out a verdict. Return False if it has no effect, because it is not stored."""
        state, findings, applied = self.state, [finding.as_json() for finding in verdict.findings], True
        complete = self._complete(snapshot.intervals[-1])
        if verdict.action == "return":
            self._return(Change("return", "returned", state.step, verdict.reason, findings), now)
        elif verdict.action == "widen" and state.status == "running" and complete:
            done = state.step == state.last_step
            status: Status = "promoted" if done else "running"
            change = Change("promote" if done else "widen", status, state.step + (not done), verdict.reason, findings)
            applied = self._widen(change, now)
        elif complete:
            self._note(Change("hold", state.status, state.step, verdict.reason, findings), now)
        for alarm in snapshot.drift["alarms"][self.alarms_noted :]:
            self._note(Change("alarm", self.state.status, self.state.step, alarm), now)
            self.alarms_noted += 1
        return applied

    def _widen(self, change: Change, now: float) -> bool:
        """Store more traffic, then send it. Return False if it is not stored in time: it is decided again."""
        state = self.state

        def widen() -> None:
            try:
                self.state = self.store.change(state, change, now)
            except StaleError:
                log.warning("the roll-out changed at the same time: not widened")

        if not self.journal.flush():
            return False
        write = self.journal.submit("widen", widen)
        self.journal.flush()
        if not write.done:
            self.journal.withdraw(write)  # else it hangs: its effect is read when the database is back
        return write.done

    def _return(self, change: Change, now: float) -> None:
        if self.unstored is not None:
            return
        self.unstored = change  # the share is 0 from now on
        log.warning("to the dense model: %s", change.reason)
        try:
            self.mark.keep(change, now, self.state.id)
        except OutputError as error:
            log.error("%s: a restart before the database has it would lose it", error)
        self.journal.submit("dense", partial(self._store_dense, change, now))
        self._note_absence(self.journal.flush())

    def _store_dense(self, change: Change, now: float) -> None:
        state = self.state
        while True:
            try:
                state = self.store.change(state, change, now)
            except StaleError:
                state = self.store.current() or state
                if state.id == self.state.id and state.status in ("running", "promoted"):
                    continue  # another process changed the step
            break
        if state.id == self.state.id:
            self.state = state
        self.unstored = None
        self.mark.clear()
