"""Counts add up without loss, and values lie between what a tally says."""

import json

import pytest

from niwaki.rollout.counters import Ledger, Times
from niwaki.rollout.histogram import Interval, Tally, added
from niwaki.rollout.sequential import MAX_INTERVALS
from niwaki.rollout.signals import SIGNALS


def test_points_are_exact_and_others_lie_between() -> None:
    tally = Tally()
    for value in (0.0, 0.25, 0.25, 0.3333, 1.0):
        tally.add(value)
    assert sorted(zip(tally.low, tally.high, tally.times, strict=True)) == [
        (0.0, 0.0, 1), (0.25, 0.25, 2), (0.333, 0.334, 1), (1.0, 1.0, 1),
    ]  # fmt: skip
    assert tally.total == 5 and tally.mean == pytest.approx(0.36670) and tally.median == 0.25
    assert added([tally, tally]).counts == {key: 2 * count for key, count in tally.counts.items()}
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tally.add(wrong)


def test_an_interval_survives_json() -> None:
    interval = Interval(3, 1, 12.5)
    interval.observe("top1_agreement", 0.9)
    interval.requests["canary"] += 2
    interval.skipped["why"] += 1
    assert Interval.from_json(json.loads(json.dumps(interval.as_json()))) is not interval
    again = Interval.from_json(json.loads(json.dumps(interval.as_json())))
    assert again.as_json() == interval.as_json() and again.tally("top1_agreement").total == 1


@pytest.mark.parametrize("name", list(SIGNALS))
def test_scales_turn_back(name: str) -> None:
    signal = SIGNALS[name]
    for scaled in (0.0, 0.1, 0.5, 1.0):
        assert signal.scaled(signal.value(scaled)) == pytest.approx(scaled)
    assert 0 <= signal.scaled(-1e9) <= signal.scaled(1e9) <= 1


def test_latencies_are_paired_at_the_same_time_and_once() -> None:
    ledger = Ledger(Interval(1, 0, 0.0))
    for number in range(20):  # the dense model answers more often: only its latest answers wait
        ledger.timed("stable", Times(False, 1.0, None, float(number + 1)))
    ledger.timed("canary", Times(True, 1.0, 0.5, 1.0))  # a stream waits for a stream
    assert not ledger.open.tally("decode_latency_ratio").total
    ledger.timed("canary", Times(False, 1.0, None, 10.0))
    ledger.timed("canary", Times(False, 1.0, None, 9.5))
    found = ledger.open.tally("decode_latency_ratio")
    assert found.total == 2
    assert SIGNALS["decode_latency_ratio"].value(found.mean) == pytest.approx(0.5, rel=0.01)  # 10/20 and 9.5/19
    assert not ledger.open.tally("prefill_latency_ratio").total


def test_old_intervals_become_one_and_nothing_is_lost() -> None:
    ledger = Ledger(Interval(1, 0, 0.0))
    for number in range(MAX_INTERVALS + 50):
        ledger.outcome(failed=number % 2 == 0)
        ledger.next_interval(0, float(number))
    assert len(ledger.closed) == MAX_INTERVALS - 1
    assert added(one.tally("error_rate") for one in ledger.intervals).total == MAX_INTERVALS + 50
    numbers = [one.number for one in ledger.intervals]
    assert numbers == list(range(numbers[0], MAX_INTERVALS + 52))
    again = Ledger.resumed(ledger.intervals, 0, 0.0)
    assert [one.as_json() for one in again.intervals] == [one.as_json() for one in ledger.intervals]
