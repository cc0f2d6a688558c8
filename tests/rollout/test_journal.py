"""A state database that fails, hangs or is locked: no answer waits, nothing is lost, and the order stays."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from niwaki.cli.app import app as command
from niwaki.errors import InputError, OutputError
from niwaki.rollout import journal as journal_module
from niwaki.rollout import store as store_module
from niwaki.rollout.dense_mark import mark_of
from niwaki.rollout.journal import Journal
from niwaki.rollout.running import assemble
from niwaki.rollout.start import abort_by_mark
from niwaki.rollout.store import Change, Store
from support.rollouts import LIMITS, Setup, begun, feed, make, settings
from support.servers import until

STEP = {"steps": [0.5, 1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits for a database that is locked."""
    monkeypatch.setattr(store_module, "WAIT_S", 0.1)


@contextmanager
def locked(where: Path) -> Iterator[None]:
    """Another connection that holds the database, so that no write succeeds."""
    other = sqlite3.connect(where)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


@contextmanager
def frozen(store: Store) -> Iterator[None]:
    """A database that accepts and never answers."""
    free, read, write = threading.Event(), store._read, store._write

    @contextmanager
    def hang(usual: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
        free.wait(60)
        with usual() as connection:
            yield connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_read", partial(hang, read))
        patch.setattr(store, "_write", partial(hang, write))
        try:
            yield
        finally:
            free.set()


def failing() -> None:
    raise OutputError("the database is away")


def test_writes_are_kept_in_order_and_written_when_the_database_is_back() -> None:
    journal, written, away = Journal(), [], True

    def write(number: int) -> None:
        if away:
            failing()
        written.append(number)

    for number in range(3):
        journal.submit("note", partial(write, number))
    assert not journal.flush() and journal.away and journal.kept == 3
    journal.submit("dense", partial(write, 3))
    assert not written, "nothing overtakes"
    away = False
    assert journal.flush() and written == [0, 1, 2, 3] and not journal.away and not journal.kept


def test_a_bounded_number_is_kept_and_a_return_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_KEPT", 4)
    journal, written, away = Journal(), [], True

    def write(name: str) -> None:
        if away:
            failing()
        written.append(name)

    for kind in ("dense", "note", "audit", "audit", "save", "note", "note", "save", "poll", "poll"):
        journal.submit(kind, partial(write, kind))
        journal.flush()
    assert journal.kept == 4 and journal.dropped == 4
    away = False
    assert journal.flush() and written == ["dense", "note", "save", "poll"]


def test_a_write_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PATIENCE_S", 0.1)
    journal, free, done = Journal(), threading.Event(), []

    def hang() -> None:
        assert free.wait(20)

    journal.submit("note", hang)
    later = journal.submit("widen", lambda: done.append("widen"))
    assert not journal.flush(0.2) and journal.away
    began = time.monotonic()
    assert not journal.flush(60) and time.monotonic() - began < 5
    assert journal.withdraw(later), "it did not begin"
    free.set()
    until(journal.flush)
    assert not done and not journal.away


def test_a_write_that_the_database_refuses_stops_no_other(tmp_path: Path) -> None:
    controller, journal = begun(str(tmp_path / "s.sqlite")), Journal()
    broken = Change("hold", "running", 0, None)  # type: ignore[arg-type]
    journal.submit("note", partial(controller.store.note, controller.state, broken, 1.0))
    journal.submit("note", partial(controller.store.note, controller.state, Change("hold", "running", 0, "why"), 2.0))
    assert journal.flush(20)
    assert controller.store.decisions(controller.state)[0]["reason"] == "why"


def test_decisions_of_an_absence_are_stored_later_with_their_times(tmp_path: Path) -> None:
    where = tmp_path / "s.sqlite"
    controller = begun(str(where))
    with locked(where):
        for interval in (1, 2):  # holds, and what would be widened
            feed(controller, failed=False)
            with pytest.raises(OutputError, match="locked"):
                controller.tick(60.0 * interval)
        assert controller.share == 0.5 and controller.state.step == 0, "nothing widens that is not stored"
        feed(controller, failed=True)
        with pytest.raises(OutputError, match="locked"):
            controller.tick(180.0)
        assert controller.share == 0 and mark_of(str(where)).path.exists()
    controller.tick(500.0)
    decisions = controller.store.decisions(controller.state)[::-1]
    assert [one["at"] for one in decisions] == sorted(one["at"] for one in decisions)
    assert [one["action"] for one in decisions][-1] == "return" and decisions[-1]["at"] == 180.0
    assert [one["action"] for one in decisions].count("hold") >= 1
    assert sum(one.histogram("error_rate").total for one in controller.store.intervals(controller.state)) == 180
    assert controller.state.status == "returned" and not mark_of(str(where)).path.exists()


def test_widening_goes_on_when_the_database_is_back(tmp_path: Path) -> None:
    where = tmp_path / "s.sqlite"
    controller = begun(str(where))
    feed(controller, failed=False)
    controller.tick(60.0)
    feed(controller, failed=False)
    with locked(where), pytest.raises(OutputError):
        controller.tick(120.0)
    assert controller.state.step == 0
    controller.tick(180.0)
    assert controller.state.step == 1 and controller.share == 1.0


LOST = """
import os, signal, sqlite3
from niwaki.rollout import store
from support.rollouts import begun, feed
store.WAIT_S = 0.1
controller = begun(WHERE)
other = sqlite3.connect(WHERE)
other.execute("BEGIN EXCLUSIVE")
feed(controller, failed=True)
try:
    controller.tick(60.0)
finally:
    assert controller.share == 0
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_return_that_no_database_has_survives_a_kill(tmp_path: Path) -> None:
    where = str(tmp_path / "s.sqlite")
    paths = f"{Path(__file__).parents[1]}:{':'.join(sys.path)}"
    script = LOST.replace("WHERE", repr(where))
    ended = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": paths}, capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    stored = Store.open(where).current()
    assert stored is not None and stored.status == "running", "only the file has it"
    again = begun(where, now=100.0)
    assert again.state.status == "returned" and again.share == 0
    assert [one["action"] for one in again.store.decisions(again.state)] == ["restart", "return", "begin"]


def test_an_abort_acts_without_the_database_and_is_stored_later(tmp_path: Path) -> None:
    where = tmp_path / "s.sqlite"
    controller = begun(str(where))
    with locked(where):
        said = CliRunner().invoke(command, ["rollout", "abort", "--state", str(where)])
        assert said.exit_code == 0 and "the database does not answer: the abort is in" in said.output.replace("\n", " ")
        with pytest.raises(OutputError):
            controller.tick(1.0)
        assert controller.share == 0 and not controller.active
    controller.tick(2.0)
    assert controller.state.status == "aborted" and not mark_of(str(where)).path.exists()
    with pytest.raises(InputError, match="is aborted: only a running one can be aborted"):
        abort_by_mark(str(where), 3.0)
    assert not mark_of(str(where)).path.exists()


def test_an_abort_without_gateway_and_database_is_stored_at_the_next_start(tmp_path: Path) -> None:
    where = tmp_path / "s.sqlite"
    first = begun(str(where))
    with locked(where):
        assert CliRunner().invoke(command, ["rollout", "abort", "--state", str(where)]).exit_code == 0
    again = begun(str(where), now=9.0)
    assert again.state.id == first.state.id and again.state.status == "aborted"


def test_a_file_that_cannot_be_read_asks_for_dense(tmp_path: Path) -> None:
    where = tmp_path / "s.sqlite"
    controller = begun(str(where))
    mark_of(str(where)).path.write_text('{"rollout": nul')
    controller.tick(1.0)
    assert controller.share == 0 and controller.state.status == "aborted"


def test_the_file_has_a_place_before_a_roll_out_starts(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s.sqlite")
    with pytest.raises(InputError, match=r"cannot write .*gone/x, .*: choose --dense-file"):
        assemble(settings(), LIMITS, store, now=0.0, dense_file=tmp_path / "gone" / "x")
    assert store.current() is None
    own = mark_of("postgresql+psycopg://user:secret@db/one")
    assert own == mark_of("postgresql+psycopg://user:***@db/one") and own != mark_of("postgresql+psycopg://user@db/two")
    assert "secret" not in str(own.path)


def test_a_frozen_database_delays_no_request(tmp_path: Path) -> None:
    """Requests, audits and ticks go on. The dashboard says what is wrong, within its time."""

    async def work(setup: Setup) -> None:
        controller = setup.gateway.controller
        with frozen(controller.store):
            ticking = asyncio.create_task(asyncio.to_thread(setup.gateway.controller.judge, None, 1.0))
            pages = [asyncio.create_task(setup.client.get("/rollout/data")) for _ in range(40)]
            for number in range(100):
                answer = await asyncio.wait_for(setup.ask(number), 20)  # the database hangs for 60 s
                assert answer.status_code == 200
            await setup.gateway.background.idle()
            assert not setup.gateway.background.running["audit"], "no audit waits for the database"
            assert {(await page).status_code for page in pages} == {503}
            assert (await setup.client.get("/health")).status_code == 200
            assert "niwaki_rollout_kept" in (await setup.client.get("/metrics")).text
            await ticking
            kept = controller.journal.kept
        assert kept > 10
        until(controller.journal.flush)
        assert len(controller.store.audits(None)) >= kept - 1, "all but the one that reads the state"
        await setup.gateway.close()

    asyncio.run(work(make(tmp_path, settings(policy=STEP))))
