"""Tables on a terminal. Numbers are never cut."""

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NAME_COLUMNS = 12  # a narrower first column is not readable


def print_table(console: Console, headers: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print rows. The first column may fold; the others stay whole, even if the table is wider than the console.

    Nothing folds if the output goes to a pipe or a file.
    """
    widths = [max(cell_len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    min_width = min(widths[0], NAME_COLUMNS)
    others = sum(width + 2 for width in widths[1:])
    framed = not console.is_terminal or min_width + others + len(headers) + 3 <= console.width
    edges = len(headers) + 3 if framed else 0
    table = Table(title=title, box=box.HEAVY_HEAD if framed else None, pad_edge=framed)
    if console.is_terminal:
        table.width = others + edges + max(min_width, min(widths[0], console.width - others - edges))
    else:
        table.width = others + edges + widths[0]
    table.add_column(escape(headers[0]), overflow="fold")
    for header, width in zip(headers[1:], widths[1:], strict=True):
        table.add_column(escape(header), no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, crop=False, highlight=False)
