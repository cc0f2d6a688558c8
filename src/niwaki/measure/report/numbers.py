"""Formats of numbers for readers: sizes, ratios, changes and intervals, the same in every language.

change(0.375)  ->  "−62.5%"        speedup(Estimate(value=0.94, ...))  ->  the inverse, with its interval
"""

from niwaki.measure.schema import Estimate

MINUS = "−"
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Format bytes in the decimal unit with one to three digits before the point."""
    power = 0
    while abs(count) >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} B" if not power else f"{count:#.3g}".removesuffix(".") + f" {_UNITS[power]}"


def number(value: float) -> str:
    """Format with four significant digits; from 10,000 on whole, with separators."""
    return signed(f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}")


def ratio(value: float) -> str:
    """Format a ratio with its significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def percent(value: float, digits: int = 1) -> str:
    """Format a share in percent."""
    return signed(f"{100 * value:.{digits}f}%")


def change(value: float, digits: int = 1) -> str:
    """Format a ratio as its difference from 1 in percent, with a sign; from 10 on as a factor."""
    if value >= 10:
        return f"×{value:,.0f}" if value >= 100 else f"×{value:.1f}"
    text = f"{100 * (value - 1):+.{digits}f}"
    return signed(f"{text.lstrip('+-') if float(text) == 0 else text}%")


def factor(value: float) -> str:
    """Format a factor, as ×1.06."""
    return f"×{value:.2f}" if value < 100 else f"×{value:,.0f}"


def points(value: float) -> str:
    """Format a difference of shares in percentage points, with a sign and without the unit."""
    text = f"{100 * value:+.1f}"
    return signed(text.lstrip("+-") if float(text) == 0 else text)


def signed(text: str) -> str:
    """Replace the hyphen by the typographic minus sign."""
    return text.replace("-", MINUS) if text.startswith("-") or "e-" not in text else text.replace("e-", f"e{MINUS}")


def speedup(latency: Estimate) -> Estimate:
    """Return the speedup, the inverse of a ratio of times. The ends of its interval swap."""
    low, high = None, None
    if latency.low is not None and latency.high is not None and latency.low > 0:
        low, high = 1 / latency.high, 1 / latency.low
    return Estimate(value=1 / latency.value, low=low, high=high, units=latency.units)


def opposite(estimate: Estimate) -> Estimate:
    """Return a loss as a change, with the opposite sign. The ends of its interval swap."""
    return Estimate(
        value=-estimate.value,
        low=None if estimate.high is None else -estimate.high,
        high=None if estimate.low is None else -estimate.low,
        units=estimate.units,
    )


def unclear(estimate: Estimate, no_difference: float) -> bool:
    """Check that the interval contains the value of no difference, or that there is no interval."""
    return estimate.low is None or estimate.high is None or estimate.low <= no_difference <= estimate.high
