"""Entry point of the command line: the commands, and niwaki's own errors as one line with exit code 2."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape

from niwaki.cli import rollout
from niwaki.cli.bench import bench
from niwaki.cli.compare import compare, gate
from niwaki.cli.compress import compress
from niwaki.cli.contextual import adapt, calibrate_gate
from niwaki.cli.demo import demo
from niwaki.cli.evaluate import evaluate
from niwaki.cli.export import export
from niwaki.cli.generate import generate
from niwaki.cli.inspect import inspect
from niwaki.cli.methods import methods
from niwaki.cli.options import console, error_console
from niwaki.cli.plan import plan
from niwaki.cli.recover import recover
from niwaki.cli.serve import serve
from niwaki.errors import NiwakiError
from niwaki.version import __version__

app = typer.Typer(name="niwaki", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"niwaki {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make pretrained language models smaller and faster after training, and prove what that cost."""


# The order of this list is the order of `niwaki --help`.
COMMANDS: tuple[Callable[..., None], ...] = (
    compress, recover, export, generate, methods, demo, evaluate, bench, compare, gate, adapt, calibrate_gate, inspect,
    plan,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(rollout.app, name="rollout")
app.command()(serve)


def main() -> None:
    """Run the command line. Print one line and exit with code 2 if niwaki refuses the input."""
    try:
        app()
    except NiwakiError as error:
        error_console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
