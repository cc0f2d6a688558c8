"""The command `niwaki export`: a result in the file format of another engine."""

from pathlib import Path
from typing import Annotated

import typer

from niwaki.cli.options import check_inputs, console, error_console, print_note
from niwaki.exporters.formats import FORMATS


def export(
    out: Annotated[Path, typer.Argument(help="A result of niwaki, or any model folder.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="New folder for the export.", show_default=False)],
    to: Annotated[
        str, typer.Option(help=f"{'; '.join(f'{name}: {format.purpose}' for name, format in FORMATS.items())}.")
    ],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Type of the matrices in gguf: f32, f16, bf16, q8_0, q4_0 ... Default: f16; f32 for a float32 model.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export of niwaki at DEST.")] = False,
) -> None:
    """Write OUT to DEST in the format of another engine."""
    check_inputs(str(out))
    from niwaki.cli.progress import Display
    from niwaki.exporters.export import export as run

    with Display(error_console) as display:
        record = run(out, dest, to=to, type=type_, overwrite=overwrite, report=display)
    about = record["export"]
    written = f"{about['to']} {about['format']}, {about['bits']:.3f} true bits a weight, {about['bytes']:,} bytes"
    console.print(f"{dest}: {written}, {about['seconds']} s", highlight=False, soft_wrap=True)
    for note in about.get("notes", ()):
        print_note(note)
