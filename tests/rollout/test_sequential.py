"""Evidence that may be looked at any time: against by-hand values, slow references and simulation."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from niwaki.rollout.histogram import Histogram
from niwaki.rollout.sequential import (
    BETS_K,
    MAX_INTERVALS,
    certainly_above,
    certainly_below,
    confidence_band,
    excess,
    shortfall,
)


def histogram(*values: float) -> Histogram:
    found = Histogram()
    for value in values:
        found.add(value)
    return found


def slow_excess(intervals: list[list[float]], limit: float) -> float:
    """The definition, one observation and one capital at a time."""
    whole = 0.0
    for begin in range(len(intervals)):
        capitals = []
        for bet in BETS_K:
            capital = 1.0
            for value in (one for interval in intervals[begin:] for one in interval):
                capital *= 1 + bet / limit * (value - limit)
            capitals.append(capital)
        whole += sum(capitals) / len(capitals) / ((begin + 1) * (begin + 2))
    return math.log(whole)


def test_evidence_is_the_definition() -> None:
    rng = random.Random(0)
    intervals = [[rng.randrange(1000) / 1000 for _ in range(6)] for _ in range(4)]
    histograms = [histogram(*values) for values in intervals]
    for limit in (0.2, 0.5, 0.9):
        assert excess(histograms, limit, "mean") == pytest.approx(slow_excess(intervals, limit), abs=1e-9)
        turned = [[1 - value for value in values] for values in intervals]
        assert shortfall(histograms, limit, "mean") == pytest.approx(slow_excess(turned, 1 - limit), abs=1e-9)


def test_a_median_is_a_mean_of_signs() -> None:
    values = [0.2, 0.9, 0.8, 0.7, 0.95, 0.3]
    signs = histogram(*(float(value > 0.6) for value in values))
    assert excess([histogram(*values)], 0.6, "median") == pytest.approx(excess([signs], 0.5, "mean"))


def test_values_between_two_points_never_speak_louder_than_they_are() -> None:
    between = [0.12345 + 0.001 * place for place in range(40)]
    exact = math.log(np.mean([np.prod([1 + bet / 0.1 * (v - 0.1) for v in between]) for bet in BETS_K]))
    assert certainly_above([histogram(*between)], 0.1, "mean") <= exact
    assert certainly_above([histogram(*between)], 0.1, "mean") == pytest.approx(exact, rel=0.1)


def test_a_late_change_is_found_within_an_interval_of_it() -> None:
    good, bad = histogram(*[0.0] * 300), histogram(*[0.0] * 282, *[1.0] * 18)
    needed = math.log(5 / 0.05)
    assert excess([good] * 100, 0.003, "mean") < 0
    assert excess([*[good] * 100, bad], 0.003, "mean") > needed
    assert certainly_above([*[good] * 100, bad], 0.003, "mean") < 0  # what began with the roll-out is blind by then


def test_intervals_that_are_dropped_only_take_evidence_away() -> None:
    bad = histogram(1.0, 0.0)
    many = [bad] * (MAX_INTERVALS + 20)
    kept = excess(many[20:], 0.6, "mean", first=21)
    assert kept <= excess(many[20:], 0.6, "mean", first=1)
    assert excess(many, 0.6, "mean") == pytest.approx(kept, abs=1e-9)


@pytest.mark.parametrize("chance", [0.003, 0.5])
def test_false_alarms_at_the_limit_keep_their_share_though_looked_at_every_time(chance: float) -> None:
    """150 streams whose mean is exactly the limit, looked at after every one of 10 intervals."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(150):
        seen: list[Histogram] = []
        for _ in range(10):
            hits = int(rng.binomial(100, chance))
            seen.append(Histogram({0: 100 - hits, 2000: hits}))
        alarms += any(excess(seen[:until], chance, "mean") >= math.log(20) for until in range(1, 11))
    assert alarms / 150 <= 0.05


def test_bands_hold_the_truth_and_shrink() -> None:
    rng = np.random.default_rng(2)
    missed, widths = 0, []
    for _ in range(30):
        values = rng.beta(8, 2, size=400)
        bands = [confidence_band([histogram(*values[:until])], "mean", 0.95) for until in (50, 100, 200, 400)]
        missed += any(not low <= 0.8 <= high for low, high in bands)
        widths.append([high - low for low, high in bands])
    assert missed <= 2
    means = np.mean(widths, axis=0)
    assert all(later < sooner for sooner, later in pairwise(means)) and means[-1] < 0.1
    assert confidence_band([Histogram()], "mean", 0.95) == (0.0, 1.0)


def test_both_sides_agree_with_the_band() -> None:
    seen = [histogram(*[0.9] * 60, *[0.8] * 60)]
    low, high = confidence_band(seen, "mean", 0.95)
    assert low < 0.85 < high
    assert certainly_above(seen, low, "mean") >= math.log(40) > certainly_above(seen, low + 0.002, "mean")
    assert certainly_below(seen, high, "mean") >= math.log(40) > certainly_below(seen, high - 0.002, "mean")
