"""Confidence intervals and tests for a paired comparison of two models on the same data.

Tokens of one text are not independent, so whole units (documents, windows) are resampled, never tokens. This is a
cluster bootstrap of the ratio of sums Σx/Σn. Its quantiles are corrected for bias and skewness (BCa; Efron 1987). For
few units they are widened by the ratio of Student's t to the normal (Hesterberg 2015, "What teachers should know about
the bootstrap", §5).

Flips of answers may be rare or absent. So questions are resampled from (b+1, c+1) flips in n+2, after Bonett and Price
(2012), with the same normal limit. The test is the exact McNemar test. The median over rounds has the exact interval of
order statistics.

Simulations check all of it: 5 % false alarms at 95 % if there is no difference. A hard case has skewed documents of 20
to 600 tokens (1500 simulations). Its rate is 7.3 % for 20 documents, 6.7 % for 40, 5.5 % for 100.

Cost: RESAMPLES passes over the units, none over tokens.

Legend: U units, R resamples.

    mean_interval(nll_difference_U, tokens_U, 0.95, numpy.random.default_rng(0))
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 4000
MAX_COUNTS = 2**23  # drawn at once
_NORMAL = NormalDist()


def min_units(confidence: float) -> int:
    """Return the min number of independent units for an interval: 1/(1 − confidence), rounded up.

    With fewer units, the tails of the interval hold less than one unit.
    """
    return math.ceil(round(1 / (1 - confidence), 6))


def mean_interval(
    total_U: Floats, count_U: Floats, confidence: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return Σtotal/Σcount and its interval over two or more units. Equal units give an interval of zero width."""
    units, mean = len(total_U), float(total_U.sum() / count_U.sum())
    influence_U = total_U - mean * count_U
    energy = float(np.square(influence_U).sum())
    if energy <= (1e-12 * float(np.abs(total_U).sum())) ** 2:
        return mean, mean, mean
    resampled_R = np.sort(_resampled_means(total_U, count_U, rng))
    acceleration = float((influence_U**3).sum()) / (6 * energy**1.5)
    below = float((resampled_R < mean).mean() + (resampled_R == mean).mean() / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        moved = bias + math.sqrt(units / (units - 1)) * student_quantile(tail, units - 1)
        level = _NORMAL.cdf(bias + moved / (1 - acceleration * moved)) if acceleration * moved < 1 else float(moved > 0)
        ends.append(float(np.quantile(resampled_R, level)))
    return mean, ends[0], ends[1]


def share_interval(
    total_U: Floats, count_U: Floats, confidence: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return a share of tokens and its interval over units.

    A share of exactly 0 or 1 gets the rule of three over units. If a share p of units had exceptions, U units would
    show none with probability (1 − p)^U.
    """
    mean, low, high = mean_interval(total_U, count_U, confidence, rng)
    without_exceptions = ((1 - confidence) / 2) ** (1 / len(total_U))
    if mean == 1:
        low = without_exceptions
    if mean == 0:
        high = 1 - without_exceptions
    return mean, max(low, 0.0), min(high, 1.0)


def loss_interval(
    right_to_wrong: int, wrong_to_right: int, questions: int, confidence: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the lost accuracy, (right→wrong − wrong→right) / questions, and its interval over questions."""
    trials = questions + 2
    shares = np.array([right_to_wrong + 1, wrong_to_right + 1, questions - right_to_wrong - wrong_to_right]) / trials
    flips_R3 = rng.multinomial(trials, shares, size=RESAMPLES)
    low, high = np.quantile((flips_R3[:, 0] - flips_R3[:, 1]) / trials, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (right_to_wrong - wrong_to_right) / questions, float(low), float(high)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Return the exact two-sided p of the hypothesis that flips are equally likely in both directions."""
    flips, fewer = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    return min(1.0, 2 * _coin_tail(flips, fewer))


def median_interval(values: list[float], confidence: float) -> tuple[float, float | None, float | None]:
    """Return the median and its distribution-free interval, from the k-th value to the k-th last.

    Too few values give None for both ends.
    """
    ordered, count = sorted(values), len(values)
    inside = [k for k in range(1, (count + 1) // 2 + 1) if 2 * _coin_tail(count, k - 1) <= 1 - confidence + 1e-12]
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return (median, ordered[inside[-1] - 1], ordered[-inside[-1]]) if inside else (median, None, None)


def student_quantile(level: float, freedom: int) -> float:
    """Return a quantile of Student's t by the Cornish–Fisher series, within 0.001 from 10 degrees of freedom on."""
    z = _NORMAL.inv_cdf(level)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )


def _resampled_means(total_U: Floats, count_U: Floats, rng: np.random.Generator) -> Floats:
    units, means = len(total_U), []
    sums_U2 = np.stack([total_U, count_U], axis=1)
    rows = max(1, MAX_COUNTS // units)
    for first in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - first)
        times_RU = rng.multinomial(units, np.full(units, 1 / units), size=size)
        drawn_R2 = times_RU.astype(np.float64) @ sums_U2
        means.append(drawn_R2[:, 0] / drawn_R2[:, 1])
    return np.concatenate(means)


def _coin_tail(count: int, max_heads: int) -> float:
    """Return P(X ≤ max_heads) of `count` fair coins."""
    return float(sum(math.comb(count, k) for k in range(max_heads + 1)) / 2**count)
