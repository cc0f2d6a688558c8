"""What outlives the gateway: the state of roll-outs, every decision, the counts of every interval, audits.

An embedded SQLite file by default, or PostgreSQL by its SQLAlchemy address, postgresql+psycopg://… (extra `postgres`).
A decision and the state it leads to are one transaction, flushed to the disk before anybody acts on it.
Every change names the version it saw: if the command line aborted meanwhile, a decision to widen comes too late and
fails. One gateway writes to one store.

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
from niwaki.rollout.decision import Policy
from niwaki.rollout.histogram import Interval

WAIT_S = 5  # for a database on the network
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
class State:
    """One roll-out as it stands. `plan`: the settings and limits that it was begun with."""

    id: int
    begun: float
    identity: str
    plan: dict[str, Any]
    status: Status
    step: int
    version: int

    @cached_property  # every request asks for the share
    def policy(self) -> Policy:
        """As it was begun with."""
        return Policy(**self.plan["policy"])

    @property
    def share(self) -> float:
        """The share of traffic that the canary gets."""
        return self.policy.steps[self.step] if self.status in ("running", "promoted") else 0.0

    @property
    def last_step(self) -> int:
        """The step with the largest share."""
        return len(self.policy.steps) - 1


@dataclass(frozen=True)
class Change:
    """What is written of a decision: what was done, the state it leads to, why, and on what it rests."""

    action: str
    status: Status
    step: int
    reason: str
    findings: Sequence[Mapping[str, Any]] = ()


class StaleError(Exception):
    """Somebody else changed the state meanwhile: read it again."""


class Store:
    """All reads and writes. Raises OutputError where the store cannot be read or written."""

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine, self.where = engine, where

    @classmethod
    def open(cls, where: str | Path, *, create: bool = True) -> "Store":
        """A store by path or SQLAlchemy address. Raises InputError for an address that leads nowhere."""
        text = str(where)
        if "://" not in text:
            if not create and not Path(text).is_file():
                raise InputError(f"no roll-out at {text}: `niwaki rollout run --state {text}` begins one")
            if not Path(text).absolute().parent.is_dir():
                raise InputError(f"cannot keep the state in {text}: its folder does not exist")
            text = f"sqlite:///{Path(text).absolute()}"
        engine = _engine(text)
        store = cls(engine, engine.url.render_as_string(hide_password=True))
        with store._write() as connection:
            _META.create_all(connection)
        return store

    def current(self) -> State | None:
        """The latest roll-out, or None."""
        with self._read() as connection:
            row = connection.execute(sql.select(_ROLLOUTS).order_by(_ROLLOUTS.c.id.desc()).limit(1)).first()
        return None if row is None else _state(row)

    def begin(self, identity: str, plan: Mapping[str, Any], now: float, reason: str) -> State:
        """A new roll-out at its first step."""
        values = {
            "begun": now, "identity": identity, "plan": json.dumps(plan), "status": "running", "step": 0, "version": 1
        }  # fmt: skip
        with self._write() as connection:
            added = connection.execute(sql.insert(_ROLLOUTS).values(**values))
            number = int(added.inserted_primary_key[0])  # type: ignore[index]
            connection.execute(_decision(number, now, Change("begin", "running", 0, reason)))
        return State(number, now, identity, dict(plan), "running", 0, 1)

    def change(self, state: State, change: Change, now: float) -> State:
        """Writes a decision and the state it leads to. Raises StaleError if `state` is no longer what is stored."""
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

    def note(self, state: State, change: Change, now: float) -> None:
        """Writes a decision that changes nothing: hold, an alarm, a restart."""
        with self._write() as connection:
            connection.execute(_decision(state.id, now, change))

    def save(self, state: State, intervals: Sequence[Interval], drift: Mapping[str, Any] | None = None) -> None:
        """Writes the counts of intervals over what was there, and where the drift alarm stands."""
        with self._write() as connection:
            for interval in intervals:
                here = (_INTERVALS.c.rollout == state.id) & (_INTERVALS.c.number == interval.number)
                connection.execute(sql.delete(_INTERVALS).where(here))
                counts = json.dumps(interval.as_json())
                values = {"rollout": state.id, "number": interval.number, "counts": counts}
                connection.execute(sql.insert(_INTERVALS).values(**values))
            if drift is not None:
                own = _ROLLOUTS.c.id == state.id
                connection.execute(sql.update(_ROLLOUTS).where(own).values(drift=json.dumps(drift)))

    def intervals(self, state: State) -> list[Interval]:
        """All intervals, oldest first; the last may be unfinished."""
        chosen = sql.select(_INTERVALS.c.counts).where(_INTERVALS.c.rollout == state.id).order_by(_INTERVALS.c.number)
        with self._read() as connection:
            return [Interval.from_json(json.loads(row.counts)) for row in connection.execute(chosen)]

    def drift(self, state: State) -> dict[str, Any] | None:
        """Where the drift alarm stood."""
        with self._read() as connection:
            text = connection.execute(sql.select(_ROLLOUTS.c.drift).where(_ROLLOUTS.c.id == state.id)).scalar()
        return None if text is None else dict(json.loads(text))

    def decisions(self, state: State, most: int = 200) -> list[dict[str, Any]]:
        """The latest decisions, newest first."""
        chosen = sql.select(_DECISIONS).where(_DECISIONS.c.rollout == state.id).order_by(_DECISIONS.c.id.desc())
        with self._read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(chosen.limit(most))]
        return [{**row, "findings": json.loads(row["findings"])} for row in rows]

    def add_audit(
        self, state: State, now: float, how: str, tokens: int, scores: Mapping[str, float], texts: Any | None
    ) -> None:
        """One audited answer; `texts` only where they may be kept."""
        values = {
            "rollout": state.id, "at": now, "how": how, "tokens": tokens, "scores": json.dumps(scores),
            "texts": None if texts is None else json.dumps(texts),
        }  # fmt: skip
        with self._write() as connection:
            connection.execute(sql.insert(_AUDITS).values(**values))

    def audits(self, state: State | None, most: int | None = None) -> list[dict[str, Any]]:
        """Audits of one roll-out, newest first, or of all (None)."""
        chosen = sql.select(_AUDITS).order_by(_AUDITS.c.id.desc()).limit(most)
        if state is not None:
            chosen = chosen.where(_AUDITS.c.rollout == state.id)
        with self._read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(chosen)]
        return [
            {**row, "scores": json.loads(row["scores"]), "texts": row["texts"] and json.loads(row["texts"])}
            for row in rows
        ]

    def close(self) -> None:
        """Ends all connections."""
        self.engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise OutputError(f"cannot write the roll-out state {self.where}: {_said(error)}") from error

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise OutputError(f"cannot read the roll-out state {self.where}: {_said(error)}") from error


def _engine(address: str) -> Engine:
    try:
        url = sql.make_url(address)
        networked = url.get_backend_name() == "postgresql"
        # A decision cannot wait for a network that is gone; what a restart closed is opened again unnoticed.
        patience = {"connect_timeout": WAIT_S, "tcp_user_timeout": 1000 * WAIT_S} if networked else {}
        engine = sql.create_engine(url, connect_args=patience, pool_pre_ping=networked)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--state: no module {error.name} for {url.drivername}: pip install 'niwaki[postgres]', "
            "and begin the address with postgresql+psycopg://"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"--state: expected a path or an address of SQLAlchemy: {said}") from error
    if networked or engine.dialect.name == "sqlite":
        sql.event.listen(engine, "connect", _patient if networked else _durable)
    return engine


def _patient(connection: Any, _: Any) -> None:
    """A statement ends within seconds, one way or the other."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {1000 * WAIT_S}")
    connection.commit()


def _durable(connection: Any, _: Any) -> None:
    """A commit is on the disk when it returns, and readers do not wait for the writer."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _decision(rollout: int, now: float, change: Change) -> sql.Insert:
    return sql.insert(_DECISIONS).values(
        rollout=rollout, at=now, action=change.action, status=change.status, step=change.step, reason=change.reason,
        findings=json.dumps(list(change.findings)),
    )  # fmt: skip


def _state(row: Any) -> State:
    return State(row.id, row.begun, row.identity, json.loads(row.plan), row.status, row.step, row.version)


def _said(error: SQLAlchemyError) -> str:
    """The first line, without the statement and its values: they may hold texts."""
    return str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
