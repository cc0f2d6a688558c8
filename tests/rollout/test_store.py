"""State that outlives the gateway: decisions before deeds, restarts, kills, full disks, and other hands."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql

from niwaki.errors import InputError, OutputError
from niwaki.rollout.dense_mark import mark_of
from niwaki.rollout.start import apply_command, begin_or_resume, identity_of
from niwaki.rollout.store import Change, StaleError, Store
from support.rollouts import LIMITS, begun, feed, settings

POSTGRES = os.environ.get("NIWAKI_TEST_DATABASE", "")  # such as postgresql+psycopg://me@127.0.0.1/test


@pytest.fixture(params=["sqlite", *(["postgresql"] if POSTGRES else [])])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store: a file, or a schema of its own in the database of NIWAKI_TEST_DATABASE."""
    if request.param == "sqlite":
        yield str(tmp_path / "state.sqlite")
        return
    engine, schema = sql.create_engine(POSTGRES), f"niwaki_{uuid.uuid4().hex}"
    with engine.begin() as connection:
        connection.execute(sql.text(f"CREATE SCHEMA {schema}"))
    yield f"{POSTGRES}?options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(sql.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


def test_a_restart_goes_on_where_it_was(where: str) -> None:
    first = begun(where)
    for interval in (1, 2):
        feed(first, failed=False)
        first.tick(60.0 * interval)
    assert first.state.step == 1
    feed(first, failed=False)
    first.watch.add("a prompt", 0.9, 3)
    first.looked = 0.0
    first.store.save(first.state, first.intervals_now()[-1:], first.watch.as_json())
    again = begun(where, now=130.0)
    assert again.state == first.state and again.watch.as_json() == first.watch.as_json()
    assert [one.as_json() for one in again.intervals_now()] == [one.as_json() for one in first.intervals_now()]
    again.tick(190.0)
    assert again.state.status == "promoted"
    actions = [one["action"] for one in again.store.decisions(again.state)]
    assert actions == ["promote", "restart", "widen", "hold", "begin"]


def test_a_return_is_kept_over_restarts_and_only_a_new_roll_out_starts_again(where: str) -> None:
    first = begun(where)
    feed(first, failed=True)
    first.tick(60.0)
    assert first.state.status == "returned" and first.share == 0
    again = begun(where, now=70.0)
    assert again.state.status == "returned" and again.share == 0
    anew = begin_or_resume(again.store, settings(), LIMITS, 80.0, new=True)
    assert (anew.state.id, anew.state.status, anew.share) == (2, "running", 0.5)
    assert not anew.counters.open.histograms


def test_another_canary_is_another_roll_out(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "predictor").write_text("one")
    own = settings(canary={"url": "http://canary", "files": str(folder)})
    first = begun(where, own)
    feed(first, failed=False)
    first.tick(60.0)
    assert first.active
    (folder / "predictor").write_text("a new predictor")  # what `niwaki adapt` does
    feed(first, failed=False)
    first.tick(120.0)
    assert first.state.status == "returned" and first.share == 0
    assert "start a new roll-out of the new canary" in first.store.decisions(first.state)[0]["reason"]
    second = begun(where, own, now=130.0)
    assert (second.state.id, second.state.step, second.state.status) == (2, 0, "running")
    assert identity_of(own) != first.state.identity
    (folder / "predictor").unlink()
    folder.rmdir()  # gone altogether
    feed(second, failed=False)
    second.tick(190.0)
    assert second.state.status == "returned"
    with pytest.raises(InputError, match="no folder"):
        begun(where, own, now=200.0)


def test_an_alarm_is_noted_once_and_asks_for_new_proof(where: str) -> None:
    controller = begun(where)
    for interval in (1, 2):
        feed(controller, failed=False)
        if interval == 2:  # it would be widened now
            controller.watch.alarms.append("the prompts changed")
            controller.watch.since = 3
        controller.tick(60.0 * interval)
    assert controller.state.step == 0 and controller.verdict is not None
    assert "top1_agreement is not yet certain" in controller.verdict.reason
    for interval in (3, 4):
        feed(controller, failed=False)
        controller.tick(60.0 * interval)
    assert controller.state.step == 1
    actions = [one["action"] for one in controller.store.decisions(controller.state)]
    assert actions.count("alarm") == 1 and actions[0] == "widen"


def test_limits_do_not_change_under_way(where: str) -> None:
    first = begun(where)
    with pytest.raises(
        InputError, match="limits of roll-out 1 changed since its start: give the same, or start a new one with --new"
    ):
        begin_or_resume(first.store, settings(), {**LIMITS, "top1_agreement": 0.5}, 0.0)


def test_by_hand(where: str, tmp_path: Path) -> None:
    controller = begun(where)
    assert apply_command(controller.store, "promote", 1.0).step == 1
    controller.tick(2.0)
    assert controller.share == 1.0  # noticed at the next tick
    assert apply_command(controller.store, "promote", 3.0).status == "promoted"
    assert apply_command(controller.store, "abort", 4.0).status == "aborted"
    controller.tick(5.0)
    assert controller.share == 0.0 and not controller.active
    with pytest.raises(InputError, match="is aborted: only a running one can be promoted"):
        apply_command(controller.store, "promote", 6.0)
    with pytest.raises(InputError, match="no roll-out yet"):
        apply_command(Store.open(tmp_path / "other.sqlite"), "abort", 0.0)


def test_whoever_decided_on_an_old_state_comes_too_late(where: str) -> None:
    controller = begun(where)
    seen = controller.state
    apply_command(controller.store, "abort", 1.0)
    with pytest.raises(StaleError):
        controller.store.change(seen, Change("widen", "running", 1, "late"), 2.0)
    assert controller.store.current() is not None
    feed(controller, failed=False)
    feed(controller, failed=False)
    controller.tick(60.0)
    assert controller.state.status == "aborted" and controller.share == 0


def test_a_store_that_fails_stops_widening_and_never_a_return(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write the roll-out state: disk full")

    controller = begun(where)
    with monkeypatch.context() as broken:
        broken.setattr(controller.store, "change", full)
        broken.setattr(controller.store, "current", full)
        feed(controller, failed=False)
        feed(controller, failed=False)
        with pytest.raises(OutputError, match="disk full"):
            controller.tick(60.0)
        assert controller.share == 0.5 and controller.state.step == 0  # not widened
        for _ in range(5):
            feed(controller, failed=True)
        with pytest.raises(OutputError, match="disk full"):
            controller.tick(120.0)
        assert controller.share == 0.0 and not controller.active  # back on dense all the same
    stored = controller.store.current()
    assert stored is not None and stored.status == "running"
    controller.tick(121.0)  # the disk is there again
    stored = controller.store.current()
    assert stored is not None and stored.status == "returned" and controller.unstored is None


BEGUN = """
import os, signal
from niwaki.rollout import store
from support.rollouts import begun, feed
controller = begun(WHERE)
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
"""
AFTER = f"""{BEGUN}
before = controller.store.change
controller.store.change = lambda *given: (before(*given), killed())  # stored, and not yet carried out
feed(controller, failed=True)
controller.tick(60.0)
"""
BETWEEN = f"""{BEGUN}
store._decision = killed  # the state is written, the decision that led to it is not
feed(controller, failed=True)
controller.tick(60.0)
"""


def run_until_killed(script: str, where: str) -> None:
    tests = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{tests}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"}
    whole = script.replace("WHERE", repr(where))
    ended = subprocess.run([sys.executable, "-c", whole], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_return_survives_a_kill_right_after_it_was_decided(where: str) -> None:
    run_until_killed(AFTER, where)
    again = begun(where, now=61.0)
    assert again.state.status == "returned" and again.share == 0
    assert again.store.decisions(again.state)[1]["action"] == "return"


def test_a_kill_between_two_writes_leaves_neither_and_the_file_keeps_the_return(where: str) -> None:
    run_until_killed(BETWEEN, where)
    store = Store.open(where)
    left = store.current()
    assert left is not None and left.status == "running" and left.version == 1
    assert [one["action"] for one in store.decisions(left)] == ["begin"]
    again = begun(where, now=61.0)
    assert again.state.status == "returned" and again.share == 0
    decisions = store.decisions(again.state)
    assert [one["action"] for one in decisions] == ["restart", "return", "begin"]
    assert decisions[1]["at"] == 60.0 and not mark_of(where).path.exists()


def test_decisions_and_audits_are_read_back(where: str) -> None:
    controller = begun(where)
    store, state = controller.store, controller.state
    store.add_audit(state, 5.0, "served", 8, {"top1_agreement": 0.5}, None)
    store.add_audit(state, 6.0, "shadow", 3, {"top1_agreement": 1.0}, {"prompt": "庭", "answer": "木", "places": []})
    newest, oldest = store.audits(state)
    assert newest["texts"]["prompt"] == "庭" and oldest["texts"] is None and oldest["scores"] == {"top1_agreement": 0.5}
    assert store.audits(state, limit=1) == [newest]
    store.note(state, Change("hold", "running", 0, "why", [{"signal": "kl"}]), 7.0)
    assert store.decisions(state, 1)[0]["findings"] == [{"signal": "kl"}]
    assert json.dumps(state.plan)


def test_texts_in_any_characters(where: str) -> None:
    """JSON may name half a character, which no database takes."""
    controller = begun(where)
    texts = {"prompt": "\x00 \ud800 庭", "answer": "", "places": []}
    controller.store.add_audit(controller.state, 5.0, "served", 1, {}, texts)
    assert controller.store.audits(controller.state)[0]["texts"] == texts


@pytest.mark.skipif(not POSTGRES, reason="needs NIWAKI_TEST_DATABASE")
@pytest.mark.parametrize("where", ["postgresql"], indirect=True)
def test_a_database_that_was_restarted_is_found_again(where: str) -> None:
    controller = begun(where)
    own = sql.create_engine(POSTGRES)
    with own.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND pid = :pid"
        with controller.store.engine.connect() as mine:
            pid = mine.execute(sql.text("SELECT pg_backend_pid()")).scalar()
        connection.execute(sql.text(others), {"pid": pid})
    own.dispose()
    feed(controller, failed=True)
    controller.tick(60.0)
    assert controller.unstored is None and begun(where, now=61.0).state.status == "returned"


def test_addresses_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InputError, match="its folder does not exist"):
        Store.open(tmp_path / "gone" / "state.sqlite")
    with pytest.raises(InputError, match="starts one"):
        Store.open(tmp_path / "state.sqlite", create=False)
    with pytest.raises(InputError, match="an address of SQLAlchemy"):
        Store.open("nonsense://somewhere")
    with pytest.raises(InputError, match=r"no module psycopg .*pip install 'niwaki\[postgres\]'"):
        Store.open("postgresql+psycopg://127.0.0.1/none")
    (tmp_path / "text").write_text("this is no data base" * 100)
    with pytest.raises(OutputError, match="not a database"):
        Store.open(tmp_path / "text")
