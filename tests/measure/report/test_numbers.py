"""Numbers as they are shown."""

import pytest

from niwaki.measure.report import numbers as show
from niwaki.measure.schema import Estimate
from support.reports import estimate


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (14_696_792, "14.7 MB"), (999_600, "1.00 MB"), (5.5e9, "5.50 GB"),
     (123_000_000, "123 MB"), (4e15, "4.00 PB")],
)  # fmt: skip
def test_sizes(count: float, shown: str) -> None:
    assert show.size(count) == shown


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(0.375, "−62.5%"), (1.0, "0.0%"), (1.0001, "0.0%"), (0.9999, "0.0%"), (1.06, "+6.0%"), (4.505, "+350.5%"),
     (12.0, "×12.0"), (1234.5, "×1,234")],
)  # fmt: skip
def test_changes(ratio: float, shown: str) -> None:
    assert show.change(ratio) == shown


def test_other_forms() -> None:
    assert [show.number(value) for value in (1.05, 0.00001, -0.5, 12345.6)] == ["1.05", "1e−05", "−0.5", "12,346"]
    assert [show.points(value) for value in (0.03, -0.034, 0.0, -0.0001)] == ["+3.0", "−3.4", "0.0", "0.0"]
    assert [show.ratio(value) for value in (1.0596, 123.45, 12345.0)] == ["1.060", "123.5", "12,345"]
    assert (show.percent(0.8482), show.percent(0.95, 0), show.factor(1.064)) == ("84.8%", "95%", "×1.06")


def test_an_interval_turns_over_with_its_value() -> None:
    faster = show.speedup(estimate(0.8, 0.5, 1.25))
    assert (faster.value, faster.low, faster.high) == (1.25, 0.8, 2.0)
    gained = show.opposite(estimate(0.03, -0.02, 0.08))
    assert (gained.value, gained.low, gained.high) == (-0.03, -0.08, 0.02)
    alone = show.speedup(Estimate(value=0.5, low=None, high=None, units=1))
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)


def test_a_difference_is_unclear_where_the_interval_holds_none() -> None:
    assert show.unclear(estimate(1.1, 0.9, 1.3), 1)
    assert not show.unclear(estimate(1.1, 1.01, 1.3), 1)
    assert show.unclear(estimate(1.1, None, None), 1)
