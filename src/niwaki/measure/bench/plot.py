"""Plot of a benchmark: the speedup of every variant over the dense model, and its memory.

Needs matplotlib (`pip install matplotlib`): plotly writes files only through a browser.

    draw(bench, Path("bench.svg"))
"""

from pathlib import Path
from typing import Any

from niwaki.errors import InputError
from niwaki.measure.bench.schema import Bench, Cell, Row
from niwaki.model.files import atomic_file

KINDS = (".png", ".svg", ".pdf")
COLOURS = ("#1b5e20", "#43a047", "#a5d6a7", "#5c6bc0", "#9fa8da")


def check_plot(path: Path) -> None:
    """Raise InputError for an unknown file type, or without matplotlib."""
    if path.suffix not in KINDS:
        raise InputError(f"--plot {path}: expected a file name that ends in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error


def draw(bench: Bench, path: Path) -> None:
    """Write the plot. Equal benchmarks give the same bytes of SVG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "niwaki"
    rows = [row for row in bench.rows if row.cells][::-1]
    figure = Figure(figsize=(10, 1.6 + 0.62 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_speed(speed, rows, bench)
    _draw_memory(memory, rows)
    speed.set_yticks(range(len(rows)), [row.variant for row in rows])
    settings = bench.settings
    where = bench.environment.accelerator or f"{bench.environment.processor}, {settings.threads} threads"
    random = ", random weights" if bench.random_weights else ""
    figure.legend(loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle(f"{bench.model}{random}, {settings.dtype}, {where}", fontsize=10)
    with atomic_file(path) as temporary:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def _draw_speed(axis: Any, rows: list[Row], bench: Bench) -> None:
    """Draw groups of bars, with a bar for every batch and one for the prompt."""
    named = [(f"decode, batch {batch}", number) for number, batch in enumerate(bench.settings.batches)]
    named += [(f"prompt of {bench.settings.prompt_tokens}", -1)] if bench.settings.prompt_tokens else []
    height = 0.8 / max(len(named), 1)
    for number, (label, column) in enumerate(named):
        cells = [row.columns(bench.settings)[column] for row in rows]
        places = [place + 0.4 - height * (number + 0.5) for place in range(len(rows))]
        colour = COLOURS[-1] if column < 0 else COLOURS[column % (len(COLOURS) - 1)]
        shown = [(place, one) for place, one in zip(places, cells, strict=True) if one is not None]
        axis.barh([p for p, _ in shown], [c.speedup.value for _, c in shown], height, color=colour, label=label)
        for place, one in shown:
            axis.text(one.speedup.value, place, f" {_speed_text(one)}", va="center", fontsize=6)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("speedup over dense (next to the bars: tokens/s)")
    axis.margins(x=0.12)


def _speed_text(cell: Cell) -> str:
    speed = cell.median_tokens_per_s
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _draw_memory(axis: Any, rows: list[Row]) -> None:
    """Draw a bar of peak memory per variant, with its weights over it."""
    peaks = [(row.peak_bytes or 0) / 1e9 for row in rows]
    weights = [(row.weight_bytes or 0) / 1e9 for row in rows]
    axis.barh(range(len(rows)), peaks, 0.6, color="#d7ccc8", label="peak")
    axis.barh(range(len(rows)), weights, 0.6, color="#6d4c41", label="weights")
    axis.set_xlabel("memory, GB")
