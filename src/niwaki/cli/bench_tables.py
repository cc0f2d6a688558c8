"""`niwaki bench` on a terminal."""

from typing import TYPE_CHECKING

from rich.console import Console

from niwaki.cli.tables import print_table

if TYPE_CHECKING:
    from niwaki.measure.bench.schema import Bench, Cell, Row

NONE = "–"


def print_bench(console: Console, found: "Bench") -> None:
    """One row a form: speeds and their ratio to dense, bytes, share of the bandwidth, and what multiplied."""
    settings = found.settings
    what = f"{found.model} ({found.architecture}, {found.blocks} blocks, {found.parameters / 1e9:.3g} billion weights"
    where = found.environment.accelerator or f"{found.environment.processor}, {settings.threads} threads"
    _say(console, f"{what}{', random' if found.random_weights else ''}), {settings.dtype} on {where}")
    headers = ["form"]
    headers += [f"decode ×{batch}, tok/s" for batch in settings.batches]
    headers += [f"prompt {settings.prompt_tokens}, tok/s"] if settings.prompt_tokens else []
    headers += ["weights", "peak", "of bandwidth", "kernel"]
    rows = [[_name(row), *_cells(row, found)] for row in found.rows if not row.reason]
    print_table(console, headers, rows)
    for row in found.rows:
        if row.reason:
            _say(console, f"{row.form}: {row.reason}")
    for line in _notes(found):
        _say(console, line)


def _cells(row: "Row", found: "Bench") -> list[str]:
    cells = [NONE if cell is None else _speed(cell) for cell in row.columns(found.settings)]
    first = row.decode[0] if row.decode else None
    share = NONE if first is None or first.bandwidth_share is None else f"{first.bandwidth_share:.0%}"
    kernels = list(dict.fromkeys(cell.kernel for cell in row.cells))
    return [*cells, _bytes(row.weight_bytes), _bytes(row.peak_bytes), share, "; ".join(kernels)]


def _name(row: "Row") -> str:
    return f"{row.form} ({row.about})"


def _speed(cell: "Cell") -> str:
    speed = cell.median_tokens_per_s
    return f"{speed:,.{0 if speed >= 100 else 1}f} ±{cell.spread_frac / 2:.0%} ({cell.speedup.value:.2f}×)"


def _notes(found: "Bench") -> list[str]:
    """What the numbers stand on, and what ran otherwise than one would think."""
    settings, cells = found.settings, [cell for row in found.rows for cell in row.cells]
    rounds = _range([len(cell.tokens_per_s) for cell in cells])
    lines = [
        f"decoding {settings.new_tokens} tokens behind {settings.context} ({settings.steps}); every form in turns with "
        f"the dense model, medians of {rounds} rounds ± half of what they span, × the median ratio of a round"
    ]
    rates = [row.bandwidth_bytes_per_s / 1e9 for row in found.rows if row.bandwidth_bytes_per_s]
    if rates and settings.batches:
        lines.append(
            f"of bandwidth: the weights that a step reads at batch {settings.batches[0]}, of {min(rates):,.0f} to "
            f"{max(rates):,.0f} GB/s measured beside it"
        )
    lines += [f"{row.form}: {row.detail}" for row in found.rows if row.detail]
    for row in found.rows:
        lines += [f"{row.form}, {_what(cell)}: {cell.note}" for cell in row.cells if cell.note]
        slow = [_what(cell) for cell in row.cells if _is_slower(cell)]
        if slow and row.form != "dense":
            lines.append(f"{row.form} is slower than dense: {', '.join(slow)}")
    return [*lines, f"quality {found.quality}"]


def _is_slower(cell: "Cell") -> bool:
    """In every round: single ones say little on a busy machine."""
    return all(own < dense for own, dense in zip(cell.tokens_per_s, cell.dense_tokens_per_s, strict=True))


def _what(cell: "Cell") -> str:
    return f"prompt {cell.tokens}" if cell.read_bytes is None and cell.sequences == 1 else f"decode ×{cell.sequences}"


def _range(values: list[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _bytes(count: int | None) -> str:
    if count is None:
        return NONE
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
