"""The command that measures speed and memory; `cli` puts it under its name."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from niwaki.errors import InputError

FORMS = "bitmap, 2:4, 2:4+4bit, 4bit, 1.6bit, structured, contextual, dense; all if no OUT is given."
Outs = Annotated[
    list[str] | None, typer.Argument(metavar="[OUT]...", help="Results to measure as they are.", show_default=False)
]
err_console = Console(stderr=True)


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="The dense model: a local folder or a hub id; random weights if the folder holds a config.json alone.",
            show_default=False,
        ),
    ],
    out: Outs = None,
    forms: Annotated[str | None, typer.Option(help=FORMS)] = None,
    batch: Annotated[str, typer.Option(help="Sequences that write at once; none: no decoding.")] = "1,4,16",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is read; 0: none.")] = 2048,
    new: Annotated[int, typer.Option(help="Tokens that every sequence writes.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens before them.")] = 128,
    rounds: Annotated[int, typer.Option(help="Turns of every form with the dense model.")] = 5,
    seconds: Annotated[float, typer.Option(help="No turn begins after so long with one form and batch.")] = 60.0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [dim]\\[default: as torch has them][/]")] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    json_: Annotated[Path | None, typer.Option("--json", help="Write every round to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure decoding, prompts and memory of a model in every form, beside the bandwidth of this machine."""
    from niwaki.cli.bench_tables import print_bench
    from niwaki.cli.progress import Display
    from niwaki.measure.bench.benchmark import bench as run
    from niwaki.measure.bench.plot import check_plot, draw
    from niwaki.model.files import write_text

    _check_file("--json", json_)
    _check_file("--plot", plot)
    if plot is not None:
        check_plot(plot)
    with Display(err_console) as display:
        found = run(
            model,
            out or (),
            forms=None if forms is None else [name.strip() for name in forms.split(",") if name.strip()],
            batches=batch_numbers(batch),
            context=context,
            new_tokens=new,
            prompt_tokens=prompt,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            device=device,
            dtype=dtype,
            report=display,
        )
    print_bench(Console(), found)
    if json_ is not None:
        write_text(json_, found.model_dump_json(indent=1) + "\n")
    if plot is not None:
        draw(found, plot)


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise InputError(f"{option} {path} is a folder: expected a file name")


def batch_numbers(text: str) -> tuple[int, ...]:
    """`1,4,16` or `none`. Raises InputError for anything else."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"batch must be numbers such as 1,4,16, or none, got {text!r}") from error
