"""State that outlives the gateway: decisions before deeds, restarts, kills, full disks, and other hands."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from niwaki.errors import InputError, OutputError
from niwaki.rollout.controller import Controller, begin_or_resume, identity_of, manual
from niwaki.rollout.settings import Settings
from niwaki.rollout.signals import SIGNALS
from niwaki.rollout.store import Change, StaleError, Store
from rollout_helpers import LIMITS, settings


def begun(folder: Path, own: Settings | None = None, now: float = 0.0) -> Controller:
    return begin_or_resume(Store.open(folder / "state.sqlite"), own or settings(), LIMITS, now)


def feed(controller: Controller, *, failed: bool) -> None:
    """An interval's worth of evidence."""
    for _ in range(60):
        controller.ledger.outcome(failed=failed)
        controller.ledger.audited({"top1_agreement": 1.0, "perplexity_ratio": 1.0})
        for name in ("prefill_latency_ratio", "decode_latency_ratio"):
            controller.ledger.open.observe(name, SIGNALS[name].scaled(1.0))


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    first = begun(tmp_path)
    for interval in (1, 2):
        feed(first, failed=False)
        first.tick(60.0 * interval)
    assert first.state.step == 1
    feed(first, failed=False)
    first.watch.add("a prompt", 0.9, 3)
    first.looked = 0.0
    first.store.save(first.state, first.copied()[-1:], first.watch.as_json())
    again = begun(tmp_path, now=130.0)
    assert again.state == first.state and again.watch.as_json() == first.watch.as_json()
    assert [one.as_json() for one in again.copied()] == [one.as_json() for one in first.copied()]
    again.tick(190.0)
    assert again.state.status == "promoted"
    actions = [one["action"] for one in again.store.decisions(again.state)]
    assert actions == ["promote", "restart", "widen", "hold", "begin"]


def test_a_return_is_kept_over_restarts_and_only_a_new_roll_out_begins_anew(tmp_path: Path) -> None:
    first = begun(tmp_path)
    feed(first, failed=True)
    first.tick(60.0)
    assert first.state.status == "returned" and first.share == 0
    again = begun(tmp_path, now=70.0)
    assert again.state.status == "returned" and again.share == 0
    anew = begin_or_resume(again.store, settings(), LIMITS, 80.0, anew=True)
    assert (anew.state.id, anew.state.status, anew.share) == (2, "running", 0.5)
    assert not anew.ledger.open.tallies


def test_another_canary_is_another_roll_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "predictor").write_text("one")
    own = settings(canary={"url": "http://canary", "files": str(folder)})
    first = begun(tmp_path, own)
    feed(first, failed=False)
    first.tick(60.0)
    assert first.active
    (folder / "predictor").write_text("a new predictor")  # what `niwaki adapt` does
    feed(first, failed=False)
    first.tick(120.0)
    assert first.state.status == "returned" and first.share == 0
    assert "a new canary is a new roll-out" in first.store.decisions(first.state)[0]["reason"]
    second = begun(tmp_path, own, now=130.0)
    assert (second.state.id, second.state.step, second.state.status) == (2, 0, "running")
    assert identity_of(own) != first.state.identity
    (folder / "predictor").unlink()
    folder.rmdir()  # gone altogether
    feed(second, failed=False)
    second.tick(190.0)
    assert second.state.status == "returned"
    with pytest.raises(InputError, match="no folder"):
        begun(tmp_path, own, now=200.0)


def test_an_alarm_is_noted_once_and_asks_for_new_proof(tmp_path: Path) -> None:
    controller = begun(tmp_path)
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


def test_limits_do_not_change_under_way(tmp_path: Path) -> None:
    first = begun(tmp_path)
    with pytest.raises(InputError, match="begun with another limits: give the same, or begin a new one with --new"):
        begin_or_resume(first.store, settings(), {**LIMITS, "top1_agreement": 0.5}, 0.0)


def test_by_hand(tmp_path: Path) -> None:
    controller = begun(tmp_path)
    assert manual(controller.store, "promote", 1.0).step == 1
    controller.tick(2.0)
    assert controller.share == 1.0  # noticed at the next tick
    assert manual(controller.store, "promote", 3.0).status == "promoted"
    assert manual(controller.store, "abort", 4.0).status == "aborted"
    controller.tick(5.0)
    assert controller.share == 0.0 and not controller.active
    with pytest.raises(InputError, match="is aborted: only a running one can be promoted"):
        manual(controller.store, "promote", 6.0)
    with pytest.raises(InputError, match="no roll-out yet"):
        manual(Store.open(tmp_path / "other.sqlite"), "abort", 0.0)


def test_whoever_decided_on_an_old_state_comes_too_late(tmp_path: Path) -> None:
    controller = begun(tmp_path)
    seen = controller.state
    manual(controller.store, "abort", 1.0)
    with pytest.raises(StaleError):
        controller.store.change(seen, Change("widen", "running", 1, "late"), 2.0)
    assert controller.store.current() is not None
    feed(controller, failed=False)
    feed(controller, failed=False)
    controller.tick(60.0)
    assert controller.state.status == "aborted" and controller.share == 0


def test_a_store_that_fails_stops_widening_and_never_a_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write the roll-out state: disk full")

    controller = begun(tmp_path)
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


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import begun, feed
controller = begun(Path({folder!r}))
before = controller.store.change
def killed(*arguments):
    state = before(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)  # stored, and not yet carried out
controller.store.change = killed
feed(controller, failed=True)
controller.tick(60.0)
"""


def test_a_return_survives_a_kill_right_after_it_was_decided(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here), folder=str(tmp_path))
    environment = {"PYTHONPATH": f"{here.parent}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    again = begun(tmp_path, now=61.0)
    assert again.state.status == "returned" and again.share == 0
    assert again.store.decisions(again.state)[1]["action"] == "return"


def test_decisions_and_audits_are_read_back(tmp_path: Path) -> None:
    controller = begun(tmp_path)
    store, state = controller.store, controller.state
    store.add_audit(state, 5.0, "served", 8, {"top1_agreement": 0.5}, None)
    store.add_audit(state, 6.0, "shadow", 3, {"top1_agreement": 1.0}, {"prompt": "庭", "answer": "木", "places": []})
    newest, oldest = store.audits(state)
    assert newest["texts"]["prompt"] == "庭" and oldest["texts"] is None and oldest["scores"] == {"top1_agreement": 0.5}
    assert store.audits(state, most=1) == [newest]
    store.note(state, Change("hold", "running", 0, "why", [{"signal": "kl"}]), 7.0)
    assert store.decisions(state, 1)[0]["findings"] == [{"signal": "kl"}]
    assert json.dumps(state.plan)


def test_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its folder does not exist"):
        Store.open(tmp_path / "gone" / "state.sqlite")
    with pytest.raises(InputError, match="begins one"):
        Store.open(tmp_path / "state.sqlite", create=False)
    with pytest.raises(InputError, match="an address of SQLAlchemy"):
        Store.open("nonsense://somewhere")
    (tmp_path / "text").write_text("this is no data base" * 100)
    with pytest.raises(OutputError, match="not a database"):
        Store.open(tmp_path / "text")
