"""Sequential tests: they may be evaluated after every interval of a roll-out, and still keep their error.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 86(1), 2024).
The test of "the mean is at most m" bets a share of a capital on every observation x,

    K ← K · (1 + λ (x − m)),   0 < λ < 1/m,

which is fair or worse if the hypothesis holds. Thus K reaches 1/α with a probability of at most α (Ville). Bets are a
fixed grid and are averaged (their "diversified Kelly"). The other side is the same for 1 − x. A median is the mean of
an indicator, "x lies above m", with 1/2 in place of m.

A canary may become worse late, when a capital from the start of the roll-out is lost already. So a new capital starts
with each interval j, with weight 1/(j(j+1)). The weights sum to 1, so the sum is again such a capital, and its α holds
for the whole roll-out. A late change needs 2 ln j more evidence, and need not outweigh all earlier intervals. Dropped
intervals (`MAX_INTERVALS`) only remove capital. The only assumption: a canary that keeps the limit does so on average
at any time. Observations may depend on earlier ones.

Cost: intervals × distinct values × bets; milliseconds.

Legend: J intervals, V distinct values, K bets, M points on a grid.

    excess([histogram], 0.005, "mean") > math.log(20)     the mean is above 0.005, at 95 %
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from niwaki.rollout.histogram import Histogram, merge_histograms

Floats = NDArray[np.float64]
Centre = Literal["mean", "median"]
BETS_K = 0.8 * 4.0 ** -np.arange(6)  # shares of the largest bet that cannot lose the whole capital
MAX_INTERVALS = 256
GRID_M = np.linspace(0.001, 0.999, 999)


def excess(histograms: Sequence[Histogram], limit: float, centre: Centre, first: int = 1) -> float:
    """Return the log evidence that the centre lies above `limit` since some interval. The first interval is `first`."""
    growth_JK = np.stack([_growth(histogram, limit, centre, above=True) for histogram in histograms])
    return _since_any(growth_JK, first)


def shortfall(histograms: Sequence[Histogram], limit: float, centre: Centre, first: int = 1) -> float:
    """Return the log evidence that the centre lies below `limit` since some interval."""
    growth_JK = np.stack([_growth(histogram, limit, centre, above=False) for histogram in histograms])
    return _since_any(growth_JK, first)


def certainly_above(histograms: Sequence[Histogram], limit: float, centre: Centre) -> float:
    """Return the log evidence that the centre of all observations lies above `limit`."""
    return float(_log_mean_exp(_growth(merge_histograms(histograms), limit, centre, above=True)))


def certainly_below(histograms: Sequence[Histogram], limit: float, centre: Centre) -> float:
    """Return the log evidence that the centre of all observations lies below `limit`."""
    return float(_log_mean_exp(_growth(merge_histograms(histograms), limit, centre, above=False)))


def confidence_band(histograms: Sequence[Histogram], centre: Centre, confidence: float) -> tuple[float, float]:
    """Return a confidence sequence for the centre of all observations. It holds at all times at once."""
    whole, threshold = merge_histograms(histograms), math.log(2 / (1 - confidence))

    def above(point: int) -> bool:
        return _log_mean_exp(_growth(whole, float(GRID_M[point]), centre, above=True)) >= threshold

    def below(point: int) -> bool:
        return _log_mean_exp(_growth(whole, float(GRID_M[point]), centre, above=False)) >= threshold

    points = range(len(GRID_M))  # the evidence is monotonic along the grid
    low = bisect_left(points, True, key=lambda point: not above(point))
    high = bisect_left(points, True, key=below)
    return (float(GRID_M[low - 1]) if low else 0.0), (float(GRID_M[high]) if high < len(GRID_M) else 1.0)


def _growth(histogram: Histogram, limit: float, centre: Centre, *, above: bool) -> Floats:
    """Return the log factor [K] of one interval for each capital that bets on a centre beyond `limit`."""
    if not histogram.total:
        return np.zeros_like(BETS_K)
    values_V = histogram.low if above else 1 - histogram.high
    fair = limit if above else 1 - limit
    if centre == "median":
        values_V, fair = (values_V > fair).astype(np.float64), 0.5
    fair = min(max(fair, 1e-6), 1.0)
    factor_VK = 1 + (values_V[:, None] - fair) * (BETS_K / fair)
    grown_K: Floats = histogram.counts_V @ np.log(factor_VK)
    return grown_K


def _since_any(growth_JK: Floats, first: int) -> float:
    since_JK = np.cumsum(growth_JK[::-1], axis=0)[::-1][-MAX_INTERVALS:]
    last = first + len(growth_JK) - 1
    number_J = np.arange(last - len(since_JK) + 1, last + 1)
    capital_J = _log_mean_exp(since_JK) - np.log(number_J * (number_J + 1.0))
    return float(np.logaddexp.reduce(capital_J))


def _log_mean_exp(growth_K: Floats) -> float:
    """Return the log of the mean over the last axis."""
    return np.logaddexp.reduce(growth_K, axis=-1) - math.log(len(BETS_K))  # type: ignore[no-any-return]
