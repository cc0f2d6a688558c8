"""Store of roll-outs: their state, each decision, the counts of each interval, audits.

It is an SQLite file, or PostgreSQL by its SQLAlchemy address, postgresql+psycopg://… (extra `postgres`). A decision and
its new state are one transaction. It is flushed to the disk before the gateway acts on it. Each change names the
version that it is based on. If the command line aborts first, a decision to widen fails. One gateway writes to one
store.

    store = Store.open("rollout.sqlite"); state = store.current()
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from niwaki.errors import InputError, OutputError
from niwaki.model.files import write_text
from niwaki.rollout.decision import Policy
from niwaki.rollout.histogram import Interval

WAIT_S = 5.0  # for a database on the network, or a file that another process locks
Status = Literal["running", "promoted", "returned", "aborted"]
_META = sql.MetaData()
_ROLLOUTS = sql.Table(
    "rollouts", _META,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("begun", sql.Float, nullable=False),
    sql.Column("identity", sql.Text, nullable=False),
    sql.Column("plan", sql.Text, nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("step", sql.Integer, nullable=False),
    sql.Column("version", sql.Integer, nullable=False),
    sql.Column("drift", sql.Text),
)  # fmt: skip
_DECISIONS = sql.Table(
    "decisions", _META,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("rollout", sql.Integer, nullable=False, index=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("action", sql.String(16), nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("step", sql.Integer, nullable=False),
    sql.Column("reason", sql.Text, nullable=False),
    sql.Column("findings", sql.Text, nullable=False),
)  # fmt: skip
_INTERVALS = sql.Table(
    "intervals", _META,
    sql.Column("rollout", sql.Integer, primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("counts", sql.Text, nullable=False),
)  # fmt: skip
_AUDITS = sql.Table(
    "audits", _META,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("rollout", sql.Integer, nullable=False, index=True),
    sql.Column("at", sql.Float, nullable=False),
    sql.Column("how", sql.String(16), nullable=False),
    sql.Column("tokens", sql.Integer, nullable=False),
    sql.Column("scores", sql.Text, nullable=False),
    sql.Column("texts", sql.Text),
)  # fmt: skip


@dataclass(frozen=True)
class RolloutState:
    """State of one roll-out. `plan`: the settings and limits of its start."""

    id: int
    begun: float
    identity: str
    plan: dict[str, Any]
    status: Status
    step: int
    version: int

    @cached_property  # each request needs the share
    def policy(self) -> Policy:
        """Return the policy of its start."""
        return Policy(**self.plan["policy"])

    @property
    def share(self) -> float:
        """Return the share of traffic that the canary gets."""
        return self.policy.steps[self.step] if self.status in ("running", "promoted") else 0.0

    @property
    def last_step(self) -> int:
        """Return the step with the largest share."""
        return len(self.policy.steps) - 1


@dataclass(frozen=True)
class Change:
    """Record of a decision: action, new state, reason and findings."""

    action: str
    status: Status
    step: int
    reason: str
    findings: Sequence[Mapping[str, Any]] = ()


class StaleError(Exception):
    """Error of a change whose state is no longer the stored one: read the state again."""


class Store:
    """Database of roll-outs. Its methods raise OutputError if it cannot be read or written."""

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine, self.where = engine, where

    @classmethod
    def open(cls, where: str | Path, *, create: bool = True) -> "Store":
        """Open a store by path or SQLAlchemy address. Raise InputError for a wrong one."""
        text = str(where)
        if "://" not in text:
            if not create and not Path(text).is_file():
                raise InputError(f"no roll-out at {text}: `niwaki rollout run --state {text}` starts one")
            if not Path(text).absolute().parent.is_dir():
                raise InputError(f"cannot keep the state in {text}: its folder does not exist")
            text = f"sqlite:///{Path(text).absolute()}"
        engine = _engine(text)
        store = cls(engine, engine.url.render_as_string(hide_password=True))
        with store._write() as connection:
            _META.create_all(connection)
        return store

    def current(self) -> RolloutState | None:
        """Return the latest roll-out, or None."""
        with self._read() as connection:
            row = connection.execute(sql.select(_ROLLOUTS).order_by(_ROLLOUTS.c.id.desc()).limit(1)).first()
        return None if row is None else _state(row)

    def begin(self, identity: str, plan: Mapping[str, Any], now: float, reason: str) -> RolloutState:
        """Start a new roll-out at its first step."""
        values = {
            "begun": now, "identity": identity, "plan": json.dumps(plan), "status": "running", "step": 0, "version": 1
        }  # fmt: skip
        with self._write() as connection:
            merge_histograms = connection.execute(sql.insert(_ROLLOUTS).values(**values))
            number = int(merge_histograms.inserted_primary_key[0])  # type: ignore[index]
            connection.execute(_decision(number, now, Change("begin", "running", 0, reason)))
        return RolloutState(number, now, identity, dict(plan), "running", 0, 1)

    def change(self, state: RolloutState, change: Change, now: float) -> RolloutState:
        """Write a decision and its new state. Raise StaleError if `state` is no longer the stored one."""
        with self._write() as connection:
            updated = connection.execute(
                sql.update(_ROLLOUTS)
                .where(_ROLLOUTS.c.id == state.id, _ROLLOUTS.c.version == state.version)
                .values(status=change.status, step=change.step, version=state.version + 1)
            )
            if updated.rowcount != 1:
                raise StaleError
            connection.execute(_decision(state.id, now, change))
        return replace(state, status=change.status, step=change.step, version=state.version + 1)

    def note(self, state: RolloutState, change: Change, now: float) -> None:
        """Write a decision that changes no state: hold, alarm, restart."""
        with self._write() as connection:
            connection.execute(_decision(state.id, now, change))

    def save(self, state: RolloutState, intervals: Sequence[Interval], drift: Mapping[str, Any] | None = None) -> None:
        """Replace the counts of intervals, and the state of the drift tests."""
        with self._write() as connection:
            for interval in intervals:
                same = (_INTERVALS.c.rollout == state.id) & (_INTERVALS.c.number == interval.number)
                connection.execute(sql.delete(_INTERVALS).where(same))
                counts = json.dumps(interval.as_json())
                values = {"rollout": state.id, "number": interval.number, "counts": counts}
                connection.execute(sql.insert(_INTERVALS).values(**values))
            if drift is not None:
                own = _ROLLOUTS.c.id == state.id
                connection.execute(sql.update(_ROLLOUTS).where(own).values(drift=json.dumps(drift)))

    def intervals(self, state: RolloutState) -> list[Interval]:
        """Return all intervals, oldest first. The last may be open."""
        chosen = sql.select(_INTERVALS.c.counts).where(_INTERVALS.c.rollout == state.id).order_by(_INTERVALS.c.number)
        with self._read() as connection:
            return [Interval.from_json(json.loads(row.counts)) for row in connection.execute(chosen)]

    def drift(self, state: RolloutState) -> dict[str, Any] | None:
        """Return the stored state of the drift tests."""
        with self._read() as connection:
            text = connection.execute(sql.select(_ROLLOUTS.c.drift).where(_ROLLOUTS.c.id == state.id)).scalar()
        return None if text is None else dict(json.loads(text))

    def decisions(self, state: RolloutState, limit: int = 200) -> list[dict[str, Any]]:
        """Return the latest decisions, newest first."""
        chosen = sql.select(_DECISIONS).where(_DECISIONS.c.rollout == state.id).order_by(_DECISIONS.c.id.desc())
        with self._read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(chosen.limit(limit))]
        return [{**row, "findings": json.loads(row["findings"])} for row in rows]

    def add_audit(
        self, state: RolloutState, now: float, how: str, tokens: int, scores: Mapping[str, float], texts: Any | None
    ) -> None:
        """Write an audited answer. `texts` is None unless texts may be kept."""
        values = {
            "rollout": state.id, "at": now, "how": how, "tokens": tokens, "scores": json.dumps(scores),
            "texts": None if texts is None else json.dumps(texts),
        }  # fmt: skip
        with self._write() as connection:
            connection.execute(sql.insert(_AUDITS).values(**values))

    def audits(self, state: RolloutState | None, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the audits of one roll-out, or of all (None), newest first."""
        chosen = sql.select(_AUDITS).order_by(_AUDITS.c.id.desc()).limit(limit)
        if state is not None:
            chosen = chosen.where(_AUDITS.c.rollout == state.id)
        with self._read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(chosen)]
        return [
            {**row, "scores": json.loads(row["scores"]), "texts": row["texts"] and json.loads(row["texts"])}
            for row in rows
        ]

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise OutputError(f"cannot write the roll-out state {self.where}: {_reason(error)}") from error

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise OutputError(f"cannot read the roll-out state {self.where}: {_reason(error)}") from error


def export_texts(store: Store, path: Path, *, overwrite: bool = False) -> int:
    """Write prompt and answer of each audit with texts, oldest first, and return their number.

    The file is a .jsonl with one `text` per line, for `niwaki adapt --data` and `niwaki compare --data`.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} already exists: choose another file, or replace it with --overwrite")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    audits = store.audits(None)
    kept = [one for one in reversed(audits) if one["texts"]]
    if not kept:
        raise InputError(
            f"{len(audits)} audits, none with its text: texts are kept if the gateway runs with --keep-texts"
        )
    lines = [json.dumps({"text": one["texts"]["prompt"] + one["texts"]["answer"]}, ensure_ascii=False) for one in kept]
    write_text(path, "\n".join(lines) + "\n")
    return len(kept)


def _engine(address: str) -> Engine:
    try:
        url = sql.make_url(address)
        networked = url.get_backend_name() == "postgresql"
        # A decision cannot wait for a broken network. A connection that a restart closed is opened again.
        timeouts = {"connect_timeout": round(WAIT_S), "tcp_user_timeout": round(1000 * WAIT_S)} if networked else {}
        engine = sql.create_engine(url, connect_args=timeouts, pool_pre_ping=networked)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--state: no module {error.name} for {url.drivername}: pip install 'niwaki[postgres]', "
            "and start the address with postgresql+psycopg://"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--state: expected a path or an address of SQLAlchemy: {reason}") from error
    if networked or engine.dialect.name == "sqlite":
        sql.event.listen(engine, "connect", _limit_statements if networked else _make_durable)
    return engine


def _limit_statements(connection: Any, _: Any) -> None:
    """Limit the time of each statement on a new connection."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {1000 * WAIT_S:.0f}")
    connection.commit()


def _make_durable(connection: Any, _: Any) -> None:
    """Set up a connection whose commits are on the disk when they return, and whose readers never wait."""
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={1000 * WAIT_S:.0f}", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _decision(rollout: int, now: float, change: Change) -> sql.Insert:
    return sql.insert(_DECISIONS).values(
        rollout=rollout, at=now, action=change.action, status=change.status, step=change.step, reason=change.reason,
        findings=json.dumps(list(change.findings)),
    )  # fmt: skip


def _state(row: Any) -> RolloutState:
    return RolloutState(row.id, row.begun, row.identity, json.loads(row.plan), row.status, row.step, row.version)


def _reason(error: SQLAlchemyError) -> str:
    """Return the first line of an error, without its statement and values, which may hold texts."""
    return str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
