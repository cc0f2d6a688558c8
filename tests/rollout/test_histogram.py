"""Counts add up without loss, and values lie between what a histogram says."""

import json

import pytest

from niwaki.rollout.counters import AnswerTimes, RolloutCounters
from niwaki.rollout.histogram import Histogram, Interval, merge_histograms
from niwaki.rollout.sequential import MAX_INTERVALS
from niwaki.rollout.signals import SIGNALS


def test_points_are_exact_and_others_lie_between() -> None:
    histogram = Histogram()
    for value in (0.0, 0.25, 0.25, 0.3333, 1.0):
        histogram.add(value)
    assert sorted(zip(histogram.low, histogram.high, histogram.counts_V, strict=True)) == [
        (0.0, 0.0, 1), (0.25, 0.25, 2), (0.333, 0.334, 1), (1.0, 1.0, 1),
    ]  # fmt: skip
    assert histogram.total == 5 and histogram.mean == pytest.approx(0.36670) and histogram.median == 0.25
    assert merge_histograms([histogram, histogram]).counts == {
        key: 2 * count for key, count in histogram.counts.items()
    }
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            histogram.add(wrong)


def test_an_interval_survives_json() -> None:
    interval = Interval(3, 1, 12.5)
    interval.observe("top1_agreement", 0.9)
    interval.requests["canary"] += 2
    interval.skipped["why"] += 1
    assert Interval.from_json(json.loads(json.dumps(interval.as_json()))) is not interval
    again = Interval.from_json(json.loads(json.dumps(interval.as_json())))
    assert again.as_json() == interval.as_json() and again.histogram("top1_agreement").total == 1


def test_an_interval_of_an_older_store_is_read() -> None:
    interval = Interval(1, 0, 0.0)
    interval.observe("error_rate", 0.0)
    stored = interval.as_json()
    stored["tallies"] = stored.pop("histograms")
    assert Interval.from_json(stored).as_json() == interval.as_json()


@pytest.mark.parametrize("name", list(SIGNALS))
def test_scales_turn_back(name: str) -> None:
    signal = SIGNALS[name]
    for scaled in (0.0, 0.1, 0.5, 1.0):
        assert signal.scaled(signal.value(scaled)) == pytest.approx(scaled)
    assert 0 <= signal.scaled(-1e9) <= signal.scaled(1e9) <= 1


def test_latencies_are_paired_at_the_same_time_and_once() -> None:
    counters = RolloutCounters(Interval(1, 0, 0.0))
    for number in range(20):  # the dense model answers more often: only its latest answers wait
        counters.add_times("stable", AnswerTimes(False, 1.0, None, float(number + 1)))
    counters.add_times("canary", AnswerTimes(True, 1.0, 0.5, 1.0))  # a stream waits for a stream
    assert not counters.open.histogram("decode_latency_ratio").total
    counters.add_times("canary", AnswerTimes(False, 1.0, None, 10.0))
    counters.add_times("canary", AnswerTimes(False, 1.0, None, 9.5))
    found = counters.open.histogram("decode_latency_ratio")
    assert found.total == 2
    assert SIGNALS["decode_latency_ratio"].value(found.mean) == pytest.approx(0.5, rel=0.01)  # 10/20 and 9.5/19
    assert not counters.open.histogram("prefill_latency_ratio").total


def test_old_intervals_become_one_and_nothing_is_lost() -> None:
    counters = RolloutCounters(Interval(1, 0, 0.0))
    for number in range(MAX_INTERVALS + 50):
        counters.count_outcome(failed=number % 2 == 0)
        counters.next_interval(0, float(number))
    assert len(counters.closed) == MAX_INTERVALS - 1
    assert merge_histograms(one.histogram("error_rate") for one in counters.intervals).total == MAX_INTERVALS + 50
    numbers = [one.number for one in counters.intervals]
    assert numbers == list(range(numbers[0], MAX_INTERVALS + 52))
    again = RolloutCounters.resumed(counters.intervals, 0, 0.0)
    assert [one.as_json() for one in again.intervals] == [one.as_json() for one in counters.intervals]
