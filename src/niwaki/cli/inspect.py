"""The command that explains a result; `cli` puts it under its name."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def inspect(
    out: Annotated[Path, typer.Argument(help="A result of `niwaki compress`.", show_default=False)],
    why: Annotated[
        str | None, typer.Option(help="One matrix in full, for example model.layers.3.mlp.down_proj.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Explain OUT: what was cut, where, why, and at what error."""
    from niwaki.compression.inspect import inspect as run
    from niwaki.compression.inspect import read_record

    read_record(out)  # a folder that is no result is refused before torch is loaded
    from niwaki.cli.inspect_tables import print_inspection, print_why
    from niwaki.compression.why import why as explain

    found = run(out) if why is None else explain(out, why)
    if json_:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif why is None:
        print_inspection(console, found)
    else:
        print_why(console, found)
