"""Heatmap over the depth of a model, a character per block. A higher character is a larger value.

On a narrow terminal several neighbouring blocks share one character, their mean. Piped output shows every block.
"""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from niwaki.cli.options import print_line

BARS = "▁▂▃▄▅▆▇█"
COLOURS = ("#2c7fb8", "#41b6c4", "#7fcdbb", "#c7e9b4", "#fed976", "#feb24c", "#fc8d59", "#d7301f")


def print_heatmap(
    to: Console, rows: dict[str, tuple[list[float | None], float]], number: Callable[[float], str]
) -> None:
    """Print a row per name: a character per value, and what `number` says of the value of the whole row."""
    known = [value for values, _ in rows.values() for value in values if value is not None]
    low, high = min(known), max(known)
    wide = max(map(len, rows))
    room = max(8, to.width - wide - 24) if to.is_terminal else 10**6
    for name, (values, value) in rows.items():
        line = Text(f"  {name:<{wide}}  ")
        line.append(cells(fewer(values, room), low, high, to.is_terminal))
        line.append(f"  {number(value)}")
        to.print(line, soft_wrap=True, highlight=False)
    same = ", the same everywhere" if high - low < 1e-9 else ""
    print_line(f"  {BARS[0]} {number(low)}   {BARS[-1]} {number(high)}{same}", to)


def cells(values: Sequence[float | None], low: float, high: float, colour: bool) -> Text:
    """Return a character for each value, and · for an unknown one."""
    text, span = Text(), high - low
    for value in values:
        if value is None:
            text.append("·")
            continue
        step = min(int((value - low) / span * len(BARS)), len(BARS) - 1) if span > 1e-12 else len(BARS) // 2
        text.append(BARS[step], style=COLOURS[step] if colour else "")
    return text


def fewer(values: Sequence[float | None], room: int) -> list[float | None]:
    """Return at most `room` values, each the mean of its neighbours."""
    if len(values) <= room:
        return list(values)
    means: list[float | None] = []
    for place in range(room):
        part = values[place * len(values) // room : (place + 1) * len(values) // room]
        known = [value for value in part if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means
