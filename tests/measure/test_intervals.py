"""Closed forms, and the rate of false alarms where nothing differs."""

import math

import numpy as np
import pytest

from niwaki.measure.intervals import (
    loss_interval,
    mcnemar,
    mean_interval,
    median_interval,
    min_units,
    share_interval,
    student_quantile,
)

SIMULATIONS = 400
PLAUSIBLE = range(9, 35)  # of 400 at 5 %: P(outside) = 0.3 % for a binomial


def simulated_texts(rng: np.random.Generator, units: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Differences of log-likelihood summed over documents of very different lengths, alike within a document."""
    tokens_U = rng.integers(20, 600, size=units).astype(float)
    own_U = rng.gamma(2.0, 0.05, size=units) - 0.1  # skewed, mean 0
    noise_U = rng.normal(size=units) * 0.4 * np.sqrt(tokens_U)
    return tokens_U * (own_U + shift) + noise_U, tokens_U


@pytest.mark.parametrize("units", [25, 60])
def test_texts_raise_5_percent_false_alarms_at_95(units: int) -> None:
    rng = np.random.default_rng(units)
    alarms = 0
    for _ in range(SIMULATIONS):
        _, low, high = mean_interval(*simulated_texts(rng, units), 0.95, rng)
        alarms += not low <= 0 <= high
    assert alarms in PLAUSIBLE


def test_resampling_tokens_would_raise_many_more() -> None:
    """The reason for units: with tokens taken as independent the interval is far too narrow."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(SIMULATIONS):
        total_U, tokens_U = simulated_texts(rng, 40)
        naive = 0.4 / math.sqrt(tokens_U.sum())
        alarms += abs(total_U.sum() / tokens_U.sum()) > 1.96 * naive
    assert alarms > 120


def test_answers_raise_5_percent_false_alarms_at_95() -> None:
    rng = np.random.default_rng(2)
    by_interval = by_test = 0
    for _ in range(SIMULATIONS):
        b, c, _ = rng.multinomial(300, [0.06, 0.06, 0.88])
        _, low, high = loss_interval(int(b), int(c), 300, 0.95, rng)
        by_interval += not low <= 0 <= high
        by_test += mcnemar(int(b), int(c)) < 0.05
    assert by_interval in PLAUSIBLE
    assert by_test <= 34, "the exact test never exceeds its level"


def test_agreement_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(SIMULATIONS):
        tokens_U = rng.integers(50, 400, size=40)
        agreed_U = rng.binomial(tokens_U, rng.beta(18, 2, size=40))  # documents differ, 90 % on average
        _, low, high = share_interval(agreed_U.astype(float), tokens_U.astype(float), 0.95, rng)
        missed += not low <= 0.9 <= high
    assert missed in PLAUSIBLE


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(4)
    found = sum(mean_interval(*simulated_texts(rng, 60, shift=0.05), 0.95, rng)[1] > 0 for _ in range(50))
    assert found > 40


def test_the_interval_of_equal_counts_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=200)
    mean, low, high = mean_interval(values, np.ones(200), 0.95, rng)
    half = 1.9720 * values.std(ddof=1) / math.sqrt(200)  # Student, 199 degrees of freedom
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.12 * half)
    assert high == pytest.approx(mean + half, abs=0.12 * half)


def test_losses_have_the_limit_of_bonett_and_price() -> None:
    b, c, n = 40, 25, 1000
    loss, low, high = loss_interval(b, c, n, 0.95, np.random.default_rng(0))
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    assert loss == 0.015
    assert (low, high) == pytest.approx((p - q - half, p - q + half), abs=0.0015)


def test_no_flips_are_not_certainty() -> None:
    loss, low, high = loss_interval(0, 0, 50, 0.95, np.random.default_rng(0))
    assert loss == 0 and low <= -0.03 and high >= 0.03
    mean, low, high = share_interval(np.full(30, 100.0), np.full(30, 100.0), 0.95, np.random.default_rng(0))
    assert (mean, high) == (1, 1) and low == pytest.approx(0.025 ** (1 / 30))


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)  # the ends 0 and 1 of 10 fair coins
    assert mcnemar(5, 5) == 1
    assert mcnemar(3, 8) == mcnemar(8, 3)


def test_the_median_takes_order_statistics() -> None:
    assert median_interval([3.0, 1.0, 2.0], 0.95) == (2.0, None, None)
    assert median_interval([float(k) for k in range(1, 7)], 0.95) == (3.5, 1.0, 6.0)  # 2/64 outside
    assert median_interval([float(k) for k in range(1, 7)], 0.98) == (3.5, None, None)
    assert median_interval([float(k) for k in range(1, 10)], 0.95) == (5.0, 2.0, 8.0)  # 20/512 outside


@pytest.mark.parametrize(("freedom", "wanted"), [(10, 2.2281), (19, 2.0930), (60, 2.0003), (10**6, 1.95997)])
def test_student_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(wanted, abs=1e-3)


def test_least_units() -> None:
    assert [min_units(c) for c in (0.9, 0.95, 0.99)] == [10, 20, 100]
