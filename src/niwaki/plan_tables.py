"""`niwaki plan` on a terminal."""

from typing import Any

from rich.console import Console

from niwaki.tables import print_table


def print_plan(console: Console, found: dict[str, Any]) -> None:
    """All of what `niwaki.plan` returns, the headline first."""
    model, recipe, machine = found["model"], found["recipe"], found["machine"]
    target = recipe["target"] or f"{recipe['target_bytes']:,} bytes"
    about = "measured now" if machine["measured"] else "published rates times what we reached on H100 and H200"
    _say(console, f"{model['type']}, {model['blocks']} blocks, {model['weights'] / 1e9:.3g} billion weights")
    _say(console, f"{recipe['method']} {target} on {machine['name']} ({about})")
    share = found["output_bytes"] / model["bytes"]
    rows = [
        ["weight files", f"{_bytes(found['output_bytes'])} of {_bytes(model['bytes'])} ({share:.1%})"],
        ["bits a weight, embeddings and all", f"{found['output_bits']:.3f}"],
        ["time", _time(found["seconds"])],
        ["of that", ", ".join(f"{name} {_time(s)}" for name, s in found["seconds_by_phase"].items())],
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


def _print_decode(console: Console, decode: dict[str, Any]) -> None:
    rows = []
    for name in ("before", "after"):
        own = decode[name]
        reached = own["reached_tokens_per_s"]
        told = "" if own["fits"] else f"does not fit {decode['machine']}: "
        told += "not measured" if reached is None else f"{reached:,.1f} ({own['reached_share']:.0%} of the ceiling)"
        rows.append([name, _bytes(own["bytes_per_token"]), f"{own['ceiling_tokens_per_s']:,.1f}", told])
    headers = ["decoding, batch 1", "bytes a token", "tokens/s at most", "tokens/s our kernels reach"]
    print_table(console, headers, rows)
    gained = decode["speedup_reached"]
    rate = f"{decode['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s"
    text = f"a ceiling: bytes over {rate}, {decode['speedup_ceiling']:.2f} times as fast at most"
    source = f", from {decode['source']}" if decode["source"] else ""
    _say(console, text + ("" if gained is None else f"; {gained:.2f} times by what our kernels reached{source}"))


def _print_money(console: Console, money: dict[str, Any]) -> None:
    _say(console, f"compressing costs {money['compress']:,.4g}")
    for name, what in (("ceiling", "at the ceilings"), ("reached", "by what our kernels reach")):
        if own := money.get(name):
            back = own["days_to_earn_back"]
            earned = "nothing is earned back" if back is None else f"earned back in {back:,.3g} days"
            _say(
                console,
                f"a day's tokens, one sequence at a time, {what}: {own['before_per_day']:,.4g} before, "
                f"{own['after_per_day']:,.4g} after, {own['saved_per_day']:,.4g} saved; {earned}",
            )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bytes(count: float) -> str:
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1.0))
    return f"{count / size:,.3g} {unit}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
