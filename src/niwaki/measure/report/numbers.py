"""Numbers as people read them: sizes, ratios, changes and intervals, the same in every language.

change(0.375)  ->  "−62.5%"        speedup(Estimate(value=0.94, ...))  ->  the inverse, with its interval
"""

from niwaki.measure.schema import Estimate

MINUS = "−"
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    power = 0
    while abs(count) >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} B" if not power else f"{count:#.3g}".removesuffix(".") + f" {_UNITS[power]}"


def number(value: float) -> str:
    """Four significant digits, separators from ten thousand on."""
    return signed(f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}")


def ratio(value: float) -> str:
    """A ratio with the digits that still tell something."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return signed(f"{100 * value:.{digits}f}%")


def change(value: float, digits: int = 1) -> str:
    """How far a ratio lies from one, in percent and with its sign; as a factor where percents become unreadable."""
    if value >= 10:
        return f"×{value:,.0f}" if value >= 100 else f"×{value:.1f}"
    text = f"{100 * (value - 1):+.{digits}f}"
    return signed(f"{text.lstrip('+-') if float(text) == 0 else text}%")


def factor(value: float) -> str:
    """×1.06."""
    return f"×{value:.2f}" if value < 100 else f"×{value:,.0f}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign and without the unit."""
    text = f"{100 * value:+.1f}"
    return signed(text.lstrip("+-") if float(text) == 0 else text)


def signed(text: str) -> str:
    """The minus sign of typography for the hyphen."""
    return text.replace("-", MINUS) if text.startswith("-") or "e-" not in text else text.replace("e-", f"e{MINUS}")


def speedup(latency: Estimate) -> Estimate:
    """Times as fast, from a ratio of times: the inverse, whose interval turns over."""
    low, high = None, None
    if latency.low is not None and latency.high is not None and latency.low > 0:
        low, high = 1 / latency.high, 1 / latency.low
    return Estimate(value=1 / latency.value, low=low, high=high, units=latency.units)


def opposite(found: Estimate) -> Estimate:
    """A loss as a change: the sign turns over, and with it the interval."""
    return Estimate(
        value=-found.value,
        low=None if found.high is None else -found.high,
        high=None if found.low is None else -found.low,
        units=found.units,
    )


def unclear(found: Estimate, nothing: float) -> bool:
    """Whether the interval holds `nothing`, the value of no difference; also without an interval."""
    return found.low is None or found.high is None or found.low <= nothing <= found.high
