"""`niwaki plan` on a terminal: as many digits as a prediction has, and what every row counts."""

import math
from typing import Any

from rich.console import Console

from niwaki.cli.tables import print_table

PHASES = {
    "walk": "compressing the blocks",
    "scans": "measuring the dense blocks before",
    "trials": "shapes on trial",
    "gradients": "gradients",
    "ends": "embeddings and head",
    "text": "text",
    "opening": "opening the model, as just measured here",
}
SMALL = 0.02  # phases below this share of the time are not named


def print_plan(console: Console, found: dict[str, Any]) -> None:
    """All of what `niwaki.plan` returns, the headline first."""
    model, recipe, machine = found["model"], found["recipe"], found["machine"]
    target = recipe["target"] or f"{recipe['target_bytes']:,} bytes"
    about = "measured now" if machine["measured"] else "published rates times what we reached on H100 and H200"
    _say(console, f"{model['type']}, {model['blocks']} blocks, {_count(model['weights'])} weights")
    _say(console, f"{recipe['method']} {target} on {machine['name']} ({about})")
    share, before = found["output_bytes"] / model["bytes"], 8 * model["bytes"] / max(model["weights"], 1)
    rows = [
        ["weight files", f"{_bytes(found['output_bytes'])} of {_bytes(model['bytes'])} ({share:.1%})"],
        ["bits a weight in the matrices of the blocks, scales and all", f"{found['matrix_bits']:.2f}"],
        ["bits a weight in the files, embeddings and head included", f"{found['output_bits']:.2f} of {before:.2f}"],
        ["time", f"about {_time(found['seconds'])}"],
        *_phases(found),
        ["peak memory of the process", _bytes(found["peak_rss_bytes"])],
    ]
    if found["peak_device_bytes"]:
        rows.append(["peak memory of the device", _bytes(found["peak_device_bytes"])])
    rows.append(["disk while it runs", _bytes(found["disk_bytes"])])
    print_table(console, ["compression", "predicted"], rows)
    _print_decode(console, found["decode"])
    if found["money"] is not None:
        _print_money(console, found["money"])
        for name in ("before", "after"):
            if not found["decode"][name]["fits"]:
                _say(console, f"no cost of a day: the model {name} does not fit one {machine['name']}")
    if not recipe["calibration"]["files"] and "walk" in found["seconds_by_phase"]:
        _say(
            console, "note: without --calibration, methods that need text let the model write it first; that is counted"
        )
    for text in found["warnings"]:
        _say(console, f"warning: {text}")


def _phases(found: dict[str, Any]) -> list[list[str]]:
    """A row for everything that takes a share of the time worth naming."""
    by_phase = found["seconds_by_phase"].items()
    named = sorted((one for one in by_phase if one[1] >= SMALL * found["seconds"]), key=lambda one: -one[1])
    return [[f"  of that {PHASES[name]}", _time(seconds)] for name, seconds in named]


def _print_decode(console: Console, decode: dict[str, Any]) -> None:
    rows = []
    for name in ("before", "after"):
        own = decode[name]
        reached = own["reached_tokens_per_s"]
        told = "" if own["fits"] else f"does not fit {decode['machine']}: "
        told += (
            "not measured" if reached is None else f"{_figures(reached)} ({own['reached_share']:.0%} of the ceiling)"
        )
        rows.append([name, _bytes(own["bytes_per_token"]), _figures(own["ceiling_tokens_per_s"]), told])
    headers = ["writing, one sequence", "read for a token", "tokens/s, ceiling", "tokens/s, our kernels"]
    print_table(console, headers, rows)
    gained = decode["speedup_reached"]
    rate = f"{_figures(decode['bandwidth_bytes_per_s'] / 1e9)} GB/s"
    text = f"ceiling: what is read for a token, at {rate}; it counts nothing else, and small models stay far below it. "
    text += f"At most {decode['speedup_ceiling']:.2f} times as fast"
    source = f", from {decode['source']}" if decode["source"] else ""
    _say(console, text + ("" if gained is None else f"; {gained:.2f} times by what our kernels reached{source}"))


def _print_money(console: Console, money: dict[str, Any]) -> None:
    """A row for what is paid once, then what a day's tokens cost."""
    rows = [["compressing, once", _cost(money["compress"])]]
    for name, what in (("ceiling", "at the ceilings"), ("reached", "by what our kernels reach")):
        if own := money.get(name):
            back = own["days_to_earn_back"]
            tokens = f"a day's {_figures(money['tokens_per_day'])} tokens {what}"
            rows += [[f"{tokens}, {when}", _cost(own[f"{when}_per_day"])] for when in ("before", "after", "saved")]
            rows.append(
                ["  earned back in", "never: nothing is saved" if back is None else f"{_figures(back, 2)} days"]
            )
    price = _figures(money["price_per_hour"])
    print_table(console, [f"cost, in the currency of {price} an hour", "predicted"], rows)
    if len(rows) > 1:
        _say(console, "tokens are written one sequence at a time")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figures(value: float, digits: int = 3) -> str:
    """So many digits that mean something, zeros behind them, and no exponent."""
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def _cost(value: float) -> str:
    """Two places; what is less says so."""
    return "less than 0.01" if 0 < abs(value) < 0.005 else f"{value:,.2f}"


def _count(weights: int) -> str:
    unit, size = next(((u, s) for u, s in (("billion", 1e9), ("million", 1e6)) if weights >= s), ("", 1.0))
    return f"{_figures(weights / size)} {unit}".strip()


def _bytes(count: float) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1.0))
    return f"{_figures(count / size)} {unit}" if size > 1 else f"{count:,.0f} bytes"


def _time(seconds: float) -> str:
    """Two digits: a prediction of seconds may be off by half."""
    if seconds < 120:
        return f"{_figures(seconds, 2)} s"
    return f"{_figures(seconds / 60, 2)} min" if seconds < 7200 else f"{_figures(seconds / 3600, 2)} h"
