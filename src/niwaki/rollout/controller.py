"""Carries out decisions: first into the store, then into the traffic.

A decision to widen that cannot be stored is not carried out. A decision to return is stored before it acts too; but if
the store fails, traffic goes back to dense all the same, and storing is tried again at every tick: safety does not
wait for a disk. After a restart the store says where the roll-out stands, so a return is never forgotten.

`begin_or_resume` decides what a start means: the same canary under the same plan goes on where it was, also if that was
returned; another canary is another roll-out, from the first step on.

    controller.tick(now)      every second or so; `niwaki rollout promote` and `abort` are noticed here, too
"""

import hashlib
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.errors import InputError, OutputError
from niwaki.rollout.counters import Ledger, copied
from niwaki.rollout.decision import Verdict, decide
from niwaki.rollout.drift import Watch
from niwaki.rollout.histogram import Interval
from niwaki.rollout.settings import Settings
from niwaki.rollout.store import Change, StaleError, State, Status, Store

log = logging.getLogger("niwaki.rollout")


@dataclass(frozen=True)
class Snapshot:
    """What a decision rests on: all intervals, the open one as it was, and where the drift alarm stood."""

    intervals: list[Interval]
    drift: dict[str, Any]


@dataclass
class Controller:
    """One running roll-out. `files_of` says what the canary serves, to notice when that changes."""

    store: Store
    state: State
    limits: Mapping[str, float]
    ledger: Ledger
    watch: Watch
    files_of: Callable[[], str]
    looked: float
    verdict: Verdict | None = None
    unstored: Change | None = None
    alarms_noted: int = 0

    @property
    def share(self) -> float:
        """The share of traffic that the canary gets now; nothing as long as a return waits to be stored."""
        return 0.0 if self.unstored is not None else self.state.share

    @property
    def salt(self) -> str:
        """What users are shared out by."""
        return str(self.state.id)

    @property
    def active(self) -> bool:
        """Whether the canary gets traffic, or may."""
        return self.state.status in ("running", "promoted") and self.unstored is None

    def tick(self, now: float) -> None:
        """Looks at the store, and at the end of an interval decides."""
        self.apply(self.judged(self.snapshot(now), now), now)

    def copied(self) -> list[Interval]:
        """All intervals, the open one as it is now."""
        return [*self.ledger.closed, copied(self.ledger.open)]

    def snapshot(self, now: float) -> Snapshot | None:
        """What a decision rests on, if one is due; another thread may read it."""
        if not self.active or now - self.looked < self.state.policy.interval_s:
            return None
        self.looked = now
        return Snapshot(self.copied(), self.watch.as_json())

    def judged(self, seen: Snapshot | None, now: float) -> Verdict | None:
        """Everything that waits for the disk or computes. Raises OutputError where the store fails."""
        try:
            self._store_unstored(now)
            stored = self.store.current()
            if stored is not None and stored.id == self.state.id and stored.version != self.state.version:
                self.state = stored
        except OutputError as error:
            log.error("%s", error)  # a broken canary has to be found all the same
        if seen is None or not self.active:
            return None
        if not self._same_canary():
            reason = "the canary's files changed: a new canary is a new roll-out, begin it with `niwaki rollout run`"
            self._return(Change("return", "returned", self.state.step, reason), now)
            return None
        verdict = decide(self.state.policy, self.limits, self.state.step, seen.intervals, seen.drift["since"])
        self._carry_out(verdict, seen, now)
        self.store.save(self.state, seen.intervals[-2:], seen.drift)
        return verdict

    def _same_canary(self) -> bool:
        try:
            return self.files_of() == self.state.identity
        except (InputError, OSError):  # the folder is gone, or is being replaced
            return False

    def apply(self, verdict: Verdict | None, now: float) -> None:
        """Ends the open interval if it saw enough."""
        if verdict is None:
            return
        self.verdict = verdict
        if self._complete(self.ledger.open):
            self.ledger.next_interval(self.state.step, now)

    def _complete(self, interval: Interval) -> bool:
        return interval.step != self.state.step or (
            interval.tally("error_rate").total >= self.state.policy.min_requests
        )

    def _carry_out(self, verdict: Verdict, seen: Snapshot, now: float) -> None:
        state, findings = self.state, [finding.as_json() for finding in verdict.findings]
        complete = self._complete(seen.intervals[-1])
        if verdict.action == "return":
            self._return(Change("return", "returned", state.step, verdict.reason, findings), now)
        elif verdict.action == "widen" and state.status == "running" and complete:
            done = state.step == state.last_step
            status: Status = "promoted" if done else "running"
            change = Change("promote" if done else "widen", status, state.step + (not done), verdict.reason, findings)
            try:
                self.state = self.store.change(state, change, now)
            except StaleError:
                log.warning("somebody changed the roll-out meanwhile: not widened")
        elif complete:
            self.store.note(state, Change("hold", state.status, state.step, verdict.reason, findings), now)
        for alarm in seen.drift["alarms"][self.alarms_noted :]:
            self.store.note(state, Change("alarm", self.state.status, self.state.step, alarm), now)
            self.alarms_noted += 1

    def _return(self, change: Change, now: float) -> None:
        self.unstored = change  # the share is 0 from here on, whatever the store says
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
                    break  # somebody else went back to dense
            else:
                break
        log.warning("returned to the dense model: %s", self.unstored.reason)
        self.unstored = None


def begin_or_resume(
    store: Store, settings: Settings, limits: Mapping[str, float], now: float, *, new: bool = False
) -> Controller:
    """The roll-out of this canary. Raises InputError for another plan than it was begun with."""

    def files_of() -> str:
        return identity_of(settings)

    plan = plan_of(settings, limits)
    state, identity = store.current(), files_of()
    if state is None or state.identity != identity or new:
        before = "" if state is None else f", after roll-out {state.id} ({state.status})"
        state = store.begin(identity, plan, now, f"a new roll-out{before}")
    elif state.plan != plan:
        changed = ", ".join(sorted(name for name in plan if plan[name] != state.plan.get(name)))
        raise InputError(
            f"roll-out {state.id} was begun with another {changed}: give the same, or begin a new one with --new"
        )
    else:
        store.note(state, Change("restart", state.status, state.step, "the gateway was started again"), now)
    stored = store.drift(state)
    watch = Watch() if stored is None else Watch.from_json(stored, random.Random())
    ledger = Ledger.resumed(store.intervals(state), state.step, now)
    noted = len(watch.alarms)
    return Controller(store, state, limits, ledger, watch, files_of, looked=now, alarms_noted=noted)


def plan_of(settings: Settings, limits: Mapping[str, float]) -> dict[str, Any]:
    """What the evidence of a roll-out rests on, and so may not change while it runs."""
    return {"policy": settings.policy.model_dump(mode="json"), "limits": dict(limits)}


def identity_of(settings: Settings) -> str:
    """Which canary this is: its address, its model, and size and time of every file it serves, if they are known."""
    canary = settings.canary
    named = f"{canary.model or 'the model'} at {canary.url}"
    if canary.files is None:
        return named
    if not canary.files.is_dir():
        raise InputError(f"no folder {canary.files}: canary files are those of the model that is served")
    stamps = "\n".join(_stamp(path) for path in sorted(canary.files.rglob("*")) if path.is_file())
    return f"{named}, files {hashlib.sha256(stamps.encode()).hexdigest()[:16]}"


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{path.name} {about.st_size} {about.st_mtime_ns}"


def manual(store: Store, action: str, now: float, *, full: bool = False) -> State:
    """`promote` (one step, or to the last) and `abort` from the command line. Raises InputError where it is no use."""
    while True:
        state = store.current()
        if state is None:
            raise InputError("no roll-out yet: `niwaki rollout run` begins one")
        try:
            return store.change(state, _asked(state, action, full), now)
        except StaleError:
            continue  # the gateway decided meanwhile: look again


def _asked(state: State, action: str, full: bool) -> Change:
    if state.status != "running" and not (action == "abort" and state.status == "promoted"):
        raise InputError(f"roll-out {state.id} is {state.status}: only a running one can be {action}d")
    if action == "abort":
        return Change("abort", "aborted", state.step, "asked for on the command line")
    if state.step == state.last_step:
        return Change("promote", "promoted", state.step, "asked for on the command line")
    step = state.last_step if full else state.step + 1
    return Change("promote", "running", step, "asked for on the command line")
