"""Tests that may be looked at after every interval, for as long as a roll-out runs, and still keep their error.

The source is Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 86(1), 2024):
against "the mean is at most m" one bets a share of a capital on every observation,

    K ← K · (1 + λ (x − m)),   0 < λ < 1/m,

which is fair or worse if the hypothesis holds, so that K ever reaches 1/α with probability at most α (Ville). Bets are
a fixed grid, averaged (their "diversified Kelly"). The other side is the same for 1 − x. A median is a mean: of whether
a value lies above m, with 1/2 in place of m.

A canary may go bad late, when a capital that began with the roll-out is long lost. So a new capital begins with every
interval j, with weight 1/(j(j+1)); the weights sum to 1, so that the sum is again such a capital, and its α holds for
the whole roll-out. Late changes cost 2 ln j more evidence, not all that came before. Intervals that are dropped
(`MAX_INTERVALS`) only take capital away. Nothing is assumed of the traffic but that, if the canary keeps the limit, it
does so on average at any time; observations may depend on those before.

Cost: intervals × distinct values × bets; milliseconds.

Legend: J intervals, V distinct values, K bets, M places on a grid.

    excess([tally], 0.005, "mean") > math.log(20)     the mean is above 0.005, at 95 %
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from niwaki.rollout.histogram import Tally, added

Floats = NDArray[np.float64]
Centre = Literal["mean", "median"]
BETS_K = 0.8 * 4.0 ** -np.arange(6)  # shares of the largest bet that cannot lose everything
MAX_INTERVALS = 256
GRID_M = np.linspace(0.001, 0.999, 999)


def excess(tallies: Sequence[Tally], limit: float, centre: Centre, first: int = 1) -> float:
    """Log evidence that the centre lies above `limit` since some interval; the first tally is of interval `first`."""
    growth_JK = np.stack([_growth(tally, limit, centre, above=True) for tally in tallies])
    return _since_any(growth_JK, first)


def shortfall(tallies: Sequence[Tally], limit: float, centre: Centre, first: int = 1) -> float:
    """Log evidence that the centre lies below `limit` since some interval."""
    growth_JK = np.stack([_growth(tally, limit, centre, above=False) for tally in tallies])
    return _since_any(growth_JK, first)


def certainly_above(tallies: Sequence[Tally], limit: float, centre: Centre) -> float:
    """Log evidence that the centre of everything seen lies above `limit`."""
    return float(_log_mean_exp(_growth(added(tallies), limit, centre, above=True)))


def certainly_below(tallies: Sequence[Tally], limit: float, centre: Centre) -> float:
    """Log evidence that the centre of everything seen lies below `limit`."""
    return float(_log_mean_exp(_growth(added(tallies), limit, centre, above=False)))


def band(tallies: Sequence[Tally], centre: Centre, confidence: float) -> tuple[float, float]:
    """A confidence sequence for the centre of everything seen: at any time, all at once, with this confidence."""
    whole, least = added(tallies), math.log(2 / (1 - confidence))

    def above(place: int) -> bool:
        return _log_mean_exp(_growth(whole, float(GRID_M[place]), centre, above=True)) >= least

    def below(place: int) -> bool:
        return _log_mean_exp(_growth(whole, float(GRID_M[place]), centre, above=False)) >= least

    places = range(len(GRID_M))  # the evidence only falls, or only rises, along the grid
    low = bisect_left(places, True, key=lambda place: not above(place))
    high = bisect_left(places, True, key=below)
    return (float(GRID_M[low - 1]) if low else 0.0), (float(GRID_M[high]) if high < len(GRID_M) else 1.0)


def _growth(tally: Tally, limit: float, centre: Centre, *, above: bool) -> Floats:
    """Log factor [K] by which one interval multiplies each capital that bets on the centre being beyond `limit`."""
    if not tally.total:
        return np.zeros_like(BETS_K)
    values_V = tally.low if above else 1 - tally.high
    fair = limit if above else 1 - limit
    if centre == "median":
        values_V, fair = (values_V > fair).astype(np.float64), 0.5
    fair = min(max(fair, 1e-6), 1.0)
    factor_VK = 1 + (values_V[:, None] - fair) * (BETS_K / fair)
    grown_K: Floats = tally.times @ np.log(factor_VK)
    return grown_K


def _since_any(growth_JK: Floats, first: int) -> float:
    since_JK = np.cumsum(growth_JK[::-1], axis=0)[::-1][-MAX_INTERVALS:]
    last = first + len(growth_JK) - 1
    number_J = np.arange(last - len(since_JK) + 1, last + 1)
    capital_J = _log_mean_exp(since_JK) - np.log(number_J * (number_J + 1.0))
    return float(np.logaddexp.reduce(capital_J))


def _log_mean_exp(growth_K: Floats) -> float:
    """Over the last axis."""
    return np.logaddexp.reduce(growth_K, axis=-1) - math.log(len(BETS_K))  # type: ignore[no-any-return]
