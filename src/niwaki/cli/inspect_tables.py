"""`niwaki inspect` on a terminal: tables, a heatmap over depth, error growth; colour only where there is a terminal.

A heatmap has a row for every kind of matrix and a character for every block: the higher, the more. Where a terminal is
too narrow, neighbouring blocks share a character, which is their mean. In a pipe nothing is shortened.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from niwaki.cli.tables import print_table
from niwaki.methods.mask_scores import QUANTILES

BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("#2c7fb8", "#41b6c4", "#7fcdbb", "#c7e9b4", "#fed976", "#feb24c", "#fc8d59", "#d7301f")
ERROR = "error: what is lost of an output on the calibration text, ‖changed − dense‖² / ‖dense‖²; 0 is none, 1 is all"
TITLES = {"zeros_frac": "zeros", "bits": "bits a weight", "removed_frac": "gone", "run_frac": "run"}


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """All of what `inspect` returns."""
    made = found["made"]
    _say(console, f"{found['out']}: {found['kind']}, {made['method']} {made['target']}, {made['date']}")
    for line in found["methods"]:
        _say(console, f"  {line}")
    print_table(console, ["measured", "value"], _facts(found))
    for stage in found["stages"]:
        _say(console, f"before that: {stage['method']} {stage['target']}, {_shape_text(stage['allocation'])}")
    if text := _shape_text(found["allocation"]):
        _say(console, f"shape: {text}")
    _say(console, f"allocation: {found['allocation']['rule']}")
    title = TITLES[found["measure"]]
    if found["matrices"]:
        _say(console, f"\n{title} by depth, first block to last")
        _print_heatmap(console, {name: (row["values"], row["value"]) for name, row in found["matrices"].items()}, title)
    if found["blocks"]:
        _print_depth(console, found["blocks"])
        _print_cut(console, found, title)
    if "predictor" in found:
        _print_predictor(console, found)
    for text in found["notes"]:
        _say(console, f"note: {text}")


def print_why(console: Console, found: dict[str, Any]) -> None:
    """All of what `why` returns."""
    rows, columns = found["shape"]
    _say(console, f"{found['matrix']}, {rows} × {columns}, target {found['target']}")
    total = max(rows * columns, 1)
    gone = [["weights that are gone with heads or neurons", f"{found['removed']:,}"]] if found["removed"] else []
    facts = [
        *gone,
        ["weights kept", f"{found['kept']:,} ({found['kept'] / total:.4%})"],
        ["weights zero", f"{found['cut']:,} ({found['cut'] / total:.4%})"],
        ["stored", f"{found['bytes']:,} bytes, {found['bits']:.3f} bits a weight"],
        ["tokens it saw", f"{found['tokens']:,}"],
    ]
    facts += [[_ERRORS[name], f"{value:.6g}"] for name, value in found["errors"].items()]
    if found["error_elsewhere"] is not None:
        facts.append(["the same matrix in other blocks, mean error", f"{found['error_elsewhere']:.6g}"])
    for name, value in found["detail"].items():
        facts.append([name.replace("_", " "), _detail(name, value)])
    print_table(console, ["", "value"], facts)
    _say(console, f"chosen by: {found['chosen_by']}")
    for reason in found["reasons"]:
        _say(console, f"reason: {reason}")
    if found["scores"]:
        _print_scores(console, found["scores"])


_ERRORS = {
    "error_before_update": "error before the rest was updated",
    "error": "error as stored",
    "block_error": "error of the whole block's output",
    "drift": "drift of the hidden states behind the block",
    "heldout_error_start": "held-out block error before learning",
    "heldout_error": "held-out block error after learning",
}


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _facts(found: dict[str, Any]) -> list[list[str]]:
    made, measured = found["made"], found["measured"]
    share = measured["bytes"] / measured["dense_bytes"]
    rows = [
        ["bytes of the weight files", f"{measured['bytes']:,} of {measured['dense_bytes']:,} ({share:.2%})"],
        ["matrices", f"{measured['matrices']:,}, {measured['weights']:,} weights"],
        ["bits a weight in them as stored, scales and all", f"{measured['bits']:.3f}, {measured['packed']} packed"],
    ]
    if found["measure"] != "bits":
        rows.insert(2, ["zeros in them", f"{measured['zeros_frac']:.4%}"])
    if "method_bits" in measured:
        rows.append(["bits a weight as the method counts", f"{measured['method_bits']:.3f}"])
    if "ends_bits" in measured:
        rows.append(["bits a weight in embeddings and head", f"{measured['ends_bits']:.3f}"])
    windows = made["calibration"]
    calibration = "none" if windows is None else f"{windows['windows']} windows of {windows['tokens']} tokens"
    rows += [["calibration", calibration], ["seconds", f"{measured['seconds']:,} on {made['device']}"]]
    rows.append(["peak memory", f"{measured['peak_rss_bytes'] / 1e9:.2f} GB"])
    if measured["peak_device_bytes"]:
        rows.append(["peak memory of the device", f"{measured['peak_device_bytes'] / 1e9:.2f} GB"])
    return rows


def _shape_text(allocation: dict[str, Any]) -> str:
    if "shape" not in allocation:
        return ""
    shape = allocation["shape"]
    counts = [f"{_span(shape[kind])} {what}" for kind, what in (("neurons", "neurons"), ("heads", "groups of heads"))]
    gone = f", blocks {', '.join(map(str, shape['dropped']))} removed" if shape.get("dropped") else ""
    where = "" if allocation.get("cut", True) else ", stored as zeros"
    tried = f"; {len(allocation['trials'])} shapes tried" if allocation.get("trials") else ""
    return f"{' and '.join(counts)} a block{gone}{where}, {allocation['removed_frac']:.2%} of the blocks gone{tried}"


def _span(value: int | list[int]) -> str:
    return f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)


def _print_heatmap(console: Console, rows: dict[str, tuple[list[float | None], float]], title: str) -> None:
    known = [value for values, _ in rows.values() for value in values if value is not None]
    low, high = min(known), max(known)
    wide = max(map(len, rows))
    room = max(8, console.width - wide - 24) if console.is_terminal else 10**6
    for name, (values, value) in rows.items():
        line = Text(f"  {name:<{wide}}  ")
        line.append(_cells(_fewer(values, room), low, high, console.is_terminal))
        line.append(f"  {_number(value, title)}")
        console.print(line, soft_wrap=True, highlight=False)
    same = ", the same everywhere" if high - low < 1e-9 else ""
    _say(console, f"  {BARS[0]} {_number(low, title)}   {BARS[-1]} {_number(high, title)}{same}")


def _cells(values: Sequence[float | None], low: float, high: float, colour: bool) -> Text:
    """A character for each value, · for one that is not known."""
    text, span = Text(), high - low
    for value in values:
        if value is None:
            text.append("·")
            continue
        step = min(int((value - low) / span * len(BARS)), len(BARS) - 1) if span > 1e-12 else len(BARS) // 2
        text.append(BARS[step], style=COLOURS[step] if colour else "")
    return text


def _fewer(values: Sequence[float | None], room: int) -> list[float | None]:
    """Means of neighbours, as many as there is room for."""
    if len(values) <= room:
        return list(values)
    found: list[float | None] = []
    for place in range(room):
        part = values[place * len(values) // room : (place + 1) * len(values) // room]
        known = [value for value in part if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def _number(value: float, title: str) -> str:
    return f"{value:.3f}" if title == TITLES["bits"] else f"{value:.2%}"


def _print_depth(console: Console, blocks: list[dict[str, Any]]) -> None:
    """How the error grows: of each block on its own inputs, and of everything up to it."""
    for name, title in (("error", "error of each block's output"), ("drift", "drift behind each block")):
        values = [block[name] for block in blocks]
        if known := [value for value in values if value is not None]:
            line = Text(f"\n{title}, {known[0]:.3g} in the first to {known[-1]:.3g} in the last\n  ")
            room = max(8, console.width - 4) if console.is_terminal else len(values)
            line.append(_cells(_fewer(values, room), 0.0, max(known), console.is_terminal))
            line.append(f"  most {max(known):.3g}")
            console.print(line, soft_wrap=True, highlight=False)


def _print_cut(console: Console, found: dict[str, Any], title: str) -> None:
    """What was cut and at what error, if text was seen: by kind of matrix, by block, and the worst."""
    measure = found["measure"]
    seen = any(block["error"] is not None or block["worst"] is not None for block in found["blocks"])
    headers = ["matrix", title, "bytes", *(["mean error", "most"] if seen else [])]
    rows = [
        [name, _number(row["value"], title), f"{row['bytes']:,}", _error(row["error"]), _error(row["max_error"])]
        for name, row in found["matrices"].items()
    ]
    print_table(console, headers, [row[: len(headers)] for row in rows])
    rows = [
        [
            f"{block['block']}{' removed' if block['gone'] else ''}",
            _number(block[measure], title),
            f"{block['bytes']:,}",
            _error(block["error"]),
            "" if block["worst"] is None else f"{block['worst']} {block['worst_error']:.3g}",
        ]
        for block in found["blocks"]
    ]
    headers = ["block", title, "bytes", *(["block error", "worst matrix"] if seen else [])]
    print_table(console, headers, [row[: len(headers)] for row in rows])
    _say(console, ERROR if seen else "no errors: the method saw no text (compress with --calibration to have them)")
    for line in found["worst"]:
        before = line["error_before_update"] if measure != "bits" else None
        was = "" if before in (None, line["error"]) else f", {before:.4g} before the rest was updated"
        _say(console, f"lost most: block {line['block']} {line['matrix']}, error {line['error']:.4g}{was}")


def _print_predictor(console: Console, found: dict[str, Any]) -> None:
    """What decides at run time in the place of a cut."""
    about = found["predictor"]
    rows = [
        ["parameters", f"{about['parameters']:,}, {about['share_of_decoder']:.2%} of the decoder's"],
        ["reads", ", ".join(about["features"]) or "nothing: a static mask"],
        ["rank, samples", f"{about.get('rank', 0)}, {about['samples']:,}"],
        ["skipped on average", f"{about['skipped_frac']:.2%} of what can be skipped"],
        ["rule", ", ".join(f"{name} {value}" for name, value in about["rule"].items())],
        ["runs", ", ".join(f"{name} {value}" for name, value in about["running"].items())],
    ]
    held = about.get("held_out_kept")
    if held:
        rows.append(["importance kept, held out", f"{max(held.values()):.4f} by the best half"])
    print_table(console, ["predictor", "value"], rows)
    for kind, row in found["matrices"].items():
        line = Text(f"  importance of the {kind} that run: ")
        line.append(_cells(row["importance"], 0.0, 1.0, console.is_terminal))
        console.print(line, soft_wrap=True, highlight=False)


def _print_scores(console: Console, scores: dict[str, Any]) -> None:
    """The distribution over log₁₀ of the score, kept and cut apart, and where it was divided."""
    _say(console, f"\nscores of {scores['sampled']:,} weights sampled over the matrix, on a logarithmic scale")
    if "log10" in scores:
        most = max(*scores["kept"], *scores["cut"], 1)
        low, high = (10**power for power in scores["log10"])
        for name in ("kept", "cut"):
            line = Text(f"  {name:<5}")
            line.append("".join(" " if not n else BARS[min(n * len(BARS) // most, 7)] for n in scores[name]))
            line.append(f"  {sum(scores[name]):,}")
            console.print(line, soft_wrap=True, highlight=False)
        _say(console, f"       {low:.3g} … {high:.3g}")
    if scores["zero"]:
        _say(console, f"  {scores['zero']:,} scores are zero")
    quantiles = zip(QUANTILES, scores["quantiles"], strict=True)
    _say(console, "  quantiles: " + ", ".join(f"{q:.0%} {value:.3g}" for q, value in quantiles))
    if "lost" in scores:
        least, middle, max_lost = scores["lost"]
        where = (
            "one threshold" if scores["thresholds"] == 1 else f"{scores['thresholds']:,} thresholds (rows or panels)"
        )
        _say(console, f"  highest score that was cut: {least:.4g} to {max_lost:.4g}, median {middle:.4g}; {where}")
    else:
        _say(console, "  no threshold: weights were compared within groups of neighbours")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _detail(name: str, value: Any) -> str:
    if name == "parts":
        return "; ".join(
            f"{p['columns']} columns at {p['bits']} bits, {p['grid']}, groups of {p['group']}" for p in value
        )
    if name == "sparse":
        return f"{value['layout']} of {value['values']}, {value['bytes']:,} bytes of values"
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}" if name == "row_zeros" and value else f"{len(value)}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
