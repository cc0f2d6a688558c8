"""The command `niwaki bench`, and its table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from niwaki.cli.options import (
    Device,
    StoredDtype,
    check_inputs,
    check_output_file,
    console,
    error_console,
    first_given,
    hidden_alias,
    print_line,
)
from niwaki.cli.tables import print_table
from niwaki.errors import InputError

if TYPE_CHECKING:
    from niwaki.measure.bench.schema import Bench, Cell, Row

MODEL_HELP = "The dense model: a local folder, a GGUF file or a hub id. Random weights if there is only a config.json."
VARIANTS_HELP = "bitmap, 2:4, 2:4+4bit, 4bit, 1.6bit, structured, contextual, inputs, dense. Default without OUT: all."
SECONDS_HELP = "Seconds after which no new round of one variant and batch begins."
NONE = "–"


def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    out: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT]...", help="Results to measure as they are.", show_default=False)
    ] = None,
    variants: Annotated[str | None, typer.Option(help=VARIANTS_HELP)] = None,
    forms: Annotated[str | None, hidden_alias("--forms")] = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences that decode at once. none: no decoding.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt of the prefill. 0: no prefill.")] = 2048,
    new: Annotated[int, typer.Option(help="Tokens that each sequence generates.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens before the generated ones.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds of each variant, in turns with the dense model.")] = 5,
    seconds: Annotated[float, typer.Option(help=SECONDS_HELP)] = 60.0,
    threads: Annotated[int | None, typer.Option(help="Threads of the CPU. [dim]\\[default: those of torch][/]")] = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    json_: Annotated[Path | None, typer.Option("--json", help="Write each round to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure decode, prefill and memory of a model in each variant, next to the bandwidth of this machine."""
    check_output_file("--json", json_)
    check_output_file("--plot", plot)
    check_inputs(*(out or ()), device=device)
    from niwaki.cli.progress import Display
    from niwaki.measure.bench.benchmark import bench as run
    from niwaki.measure.bench.plot import check_plot, draw
    from niwaki.measure.bench.schema import write_bench

    if plot is not None:
        check_plot(plot)
    names = first_given(variants, forms)
    settings: dict[str, Any] = {"context": context, "new_tokens": new, "prompt_tokens": prompt, "rounds": rounds}
    machine: dict[str, Any] = {"seconds": seconds, "threads": threads, "device": device, "dtype": dtype}
    with Display(error_console) as display:
        result = run(
            model,
            out or (),
            variants=None if names is None else [name.strip() for name in names.split(",") if name.strip()],
            batches=batch_numbers(batch),
            report=display,
            **settings,
            **machine,
        )
    print_bench(console, result)
    if json_ is not None:
        write_bench(json_, result)
    if plot is not None:
        draw(result, plot)


def batch_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of `1,4,16`, or none of `none`. Raises InputError for any other text."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"batch must be numbers such as 1,4,16, or none, got {text!r}") from error


def print_bench(to: Console, result: "Bench") -> None:
    """Print one row per variant: speeds and their ratio to dense, bytes, share of the bandwidth, and the kernel."""
    settings = result.settings
    about = (
        f"{result.model} ({result.architecture}, {result.blocks} blocks, {result.parameters / 1e9:.3g} billion weights"
    )
    device = result.environment.accelerator or f"{result.environment.processor}, {settings.threads} threads"
    print_line(f"{about}{', random' if result.random_weights else ''}), {settings.dtype} on {device}", to)
    headers = ["variant"]
    headers += [f"decode ×{batch}, tok/s" for batch in settings.batches]
    headers += [f"prompt {settings.prompt_tokens}, tok/s"] if settings.prompt_tokens else []
    headers += ["weights", "peak", "of bandwidth", "kernel"]
    rows = [[_name(row), *_cells(row, result)] for row in result.rows if not row.reason]
    print_table(to, headers, rows)
    for row in result.rows:
        if row.reason:
            print_line(f"{row.variant}: {row.reason}", to)
    for line in _notes(result):
        print_line(line, to)


def _cells(row: "Row", result: "Bench") -> list[str]:
    cells = [NONE if cell is None else _speed(cell) for cell in row.columns(result.settings)]
    first = row.decode[0] if row.decode else None
    share = NONE if first is None or first.bandwidth_share is None else f"{first.bandwidth_share:.0%}"
    kernels = list(dict.fromkeys(cell.kernel for cell in row.cells))
    return [*cells, _bytes(row.weight_bytes), _bytes(row.peak_bytes), share, "; ".join(kernels)]


def _name(row: "Row") -> str:
    return f"{row.variant} ({row.about})"


def _speed(cell: "Cell") -> str:
    speed = cell.median_tokens_per_s
    return f"{speed:,.{0 if speed >= 100 else 1}f} ±{cell.spread_frac / 2:.0%} ({cell.speedup.value:.2f}×)"


def _notes(result: "Bench") -> list[str]:
    """Return what the numbers rest on, and each variant that ran in an unexpected way."""
    settings, cells = result.settings, [cell for row in result.rows for cell in row.cells]
    rounds = _range([len(cell.tokens_per_s) for cell in cells])
    lines = [
        f"decode of {settings.new_tokens} tokens after {settings.context} ({settings.steps}); each variant in turns "
        f"with the dense model, medians of {rounds} rounds ± half of their range, × the median ratio of a round"
    ]
    rates = [row.bandwidth_bytes_per_s / 1e9 for row in result.rows if row.bandwidth_bytes_per_s]
    if rates and settings.batches:
        lines.append(
            f"of bandwidth: the weights that a step reads at batch {settings.batches[0]}, of {min(rates):,.0f} to "
            f"{max(rates):,.0f} GB/s measured beside it"
        )
    lines += [f"{row.variant}: {row.detail}" for row in result.rows if row.detail]
    for row in result.rows:
        lines += [f"{row.variant}, {_what(cell)}: {cell.note}" for cell in row.cells if cell.note]
        slow = [_what(cell) for cell in row.cells if _is_slower(cell)]
        if slow and row.variant != "dense":
            lines.append(f"{row.variant} is slower than dense: {', '.join(slow)}")
    return [*lines, f"quality {result.quality}"]


def _is_slower(cell: "Cell") -> bool:
    """Check whether every round was slower: single rounds say little on a busy machine."""
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
