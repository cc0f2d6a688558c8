"""The lowest state is what it was when its error was measured."""

import pytest
import torch

from niwaki.methods.shared.best_state import BestState, cosine


def test_the_lowest_state_comes_back() -> None:
    a, b = torch.zeros(2), torch.ones(3, requires_grad=True)
    lowest = BestState([a, b], 5.0)
    for value, error in ((1.0, 4.0), (2.0, 3.0), (3.0, 3.5), (4.0, float("nan"))):
        a.fill_(value)
        with torch.no_grad():
            b.fill_(value)
        lowest.offer(error)
    lowest.restore()
    assert a.tolist() == [2, 2] and b.tolist() == [2, 2, 2]
    assert (lowest.start_error, lowest.error, lowest.improved) == (5.0, 3.0, True)


def test_without_improvement_the_start_comes_back() -> None:
    a = torch.zeros(2)
    lowest = BestState([a], 1.0)
    a.fill_(9)
    lowest.offer(1.0)
    lowest.restore()
    assert a.tolist() == [0, 0] and not lowest.improved


def test_cosine_falls_from_one_to_nearly_nothing() -> None:
    rates = [cosine(step, 10) for step in range(10)]
    assert rates[0] == 1 and rates[5] == pytest.approx(0.5) and rates[9] < 0.03
    assert rates == sorted(rates, reverse=True)
