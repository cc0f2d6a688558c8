"""Start of a roll-out, its identity, and the commands that change it by hand.

`begin_or_resume` chooses between both cases. The same canary with the same plan continues at its state, also if that is
`returned`. Another canary is another roll-out, from the first step.

    controller = begin_or_resume(store, settings, limits, time.time())
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from niwaki.errors import InputError, OutputError
from niwaki.rollout.controller import Controller
from niwaki.rollout.counters import RolloutCounters
from niwaki.rollout.dense_mark import DenseMark, mark_of
from niwaki.rollout.drift import DriftWatch
from niwaki.rollout.settings import RolloutSettings
from niwaki.rollout.store import Change, RolloutState, StaleError, Store

REQUESTED = "requested on the command line"


def begin_or_resume(
    store: Store,
    settings: RolloutSettings,
    limits: Mapping[str, float],
    now: float,
    *,
    new: bool = False,
    mark: DenseMark | None = None,
) -> Controller:
    """Return the controller of this canary. Raise InputError if its plan changed since the start."""

    def files_of() -> str:
        return identity_of(settings)

    plan = plan_of(settings, limits)
    mark = mark or mark_of(store.where)
    state, identity = _apply_kept(store, mark, store.current()), files_of()
    if state is None or state.identity != identity or new:
        before = "" if state is None else f", after roll-out {state.id} ({state.status})"
        state = store.begin(identity, plan, now, f"a new roll-out{before}")
    elif state.plan != plan:
        changed = ", ".join(sorted(name for name in plan if plan[name] != state.plan.get(name)))
        raise InputError(
            f"{changed} of roll-out {state.id} changed since its start: give the same, or start a new one with --new"
        )
    else:
        store.note(state, Change("restart", state.status, state.step, "the gateway was started again"), now)
    stored = store.drift(state)
    watch = DriftWatch() if stored is None else DriftWatch.from_json(stored, random.Random())
    counters = RolloutCounters.resumed(store.intervals(state), state.step, now)
    return Controller(
        store, state, limits, counters, watch, files_of, last_look=now, mark=mark, alarms_noted=len(watch.alarms),
        saved_to=counters.open.number,
    )  # fmt: skip


def _apply_kept(store: Store, mark: DenseMark, state: RolloutState | None) -> RolloutState | None:
    """Store the return or abort that a gateway or the command line kept while the database was away."""
    kept = mark.read()
    while kept is not None and state is not None and kept.rollout in (None, state.id):
        if state.status not in ("running", "promoted"):
            break
        try:
            state = store.change(state, replace(kept.change, step=state.step), kept.at)
        except StaleError:
            state = store.current()
    mark.clear()
    return state


def plan_of(settings: RolloutSettings, limits: Mapping[str, float]) -> dict[str, Any]:
    """Return the policy and the limits. They must not change during a roll-out, because its evidence rests on them."""
    return {"policy": settings.policy.model_dump(mode="json"), "limits": dict(limits)}


def identity_of(settings: RolloutSettings) -> str:
    """Return the identity of the canary: address, model, and a hash of name, size and time of each file it serves.

    Raise InputError if the folder of the files does not exist.
    """
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


def apply_command(store: Store, action: str, now: float, *, full: bool = False) -> RolloutState:
    """Apply `promote` (one step, or to the last) or `abort` by hand. Raise InputError if it cannot apply."""
    again = False
    while True:
        state = store.current()
        if state is None:
            raise InputError("no roll-out yet: `niwaki rollout run` starts one")
        if again and action == "abort" and state.status in ("aborted", "returned"):
            return state  # the gateway did it
        try:
            return store.change(state, _command_change(state, action, full), now)
        except StaleError:
            again = True  # the gateway decided at the same time: read again


def abort_by_mark(where: str, now: float, dense_file: Path | None = None) -> RolloutState | Path:
    """Apply an abort by the file that the gateway reads, then by the store. Return the file if the store is away.

    Raise InputError if there is nothing to abort. Raise OutputError if the gateway would not find the file: its place
    is certain beside an SQLite file, or where `dense_file` says.
    """
    mark, shared = mark_of(where, dense_file), "://" not in where or dense_file is not None
    if shared and ("://" in where or Path(where).is_file()):
        mark.keep(Change("abort", "aborted", 0, REQUESTED), now, None)
    try:
        after = apply_command(Store.open(where, create=False), "abort", now)
    except OutputError:
        if not shared:
            raise
        return mark.path
    except InputError:
        mark.clear()
        raise
    mark.clear()
    return after


def _command_change(state: RolloutState, action: str, full: bool) -> Change:
    if state.status != "running" and not (action == "abort" and state.status == "promoted"):
        raise InputError(
            f"roll-out {state.id} is {state.status}: only a running one can be {action.removesuffix('e')}ed"
        )
    if action == "abort":
        return Change("abort", "aborted", state.step, REQUESTED)
    if state.step == state.last_step:
        return Change("promote", "promoted", state.step, REQUESTED)
    step = state.last_step if full else state.step + 1
    return Change("promote", "running", step, REQUESTED)
