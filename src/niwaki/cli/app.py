"""Entry point of the command line: the commands, and errors as one line.

Exit code 0 means done, and 1 that a gate failed. 2 means wrong input, or a machine that cannot do the work. 3 is a
crash of niwaki itself, 130 an interrupt, and 141 a reader of the output that went away.
"""

import errno
import importlib.abc
import os
import platform
import re
import resource
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

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
from niwaki.cli.rotate import rotate
from niwaki.cli.serve import serve
from niwaki.errors import InputError, NiwakiError
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
    compress, rotate, recover, export, generate, methods, demo, evaluate, bench, compare, gate, adapt, calibrate_gate,
    inspect, plan,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(rollout.app, name="rollout")
app.command()(serve)


REFUSED, CRASHED, BROKEN_PIPE = 2, 3, 141
# Faults of the machine: the user can mend them, and a trace would not help.
_MACHINE_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOMEM, errno.EADDRINUSE, errno.EFBIG,
}  # fmt: skip
TORCH_BYTES = 1 << 30  # of address space to import torch; with less, its libraries abort the process or hang
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
_SECRET_WORDS = ("key", "token", "password", "secret")


def main() -> None:
    """Run the command line. Print one line for an error and exit with the code of its kind."""
    try:
        if 0 <= (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < TORCH_BYTES:
            sys.meta_path.insert(0, _NoRoom(limit))
        app()
    except NiwakiError as error:
        _refuse(str(error))
    except SystemExit as end:
        if end.code == 1 and isinstance(end.__context__, BrokenPipeError):  # 1 would be a failed gate
            sys.exit(BROKEN_PIPE)
        raise
    except Exception as error:  # a fault of niwaki: no exception may reach the interpreter, whose code is 1
        if (problem := machine_problem(error)) is not None:
            _refuse(problem)
        name = type(error).__name__
        lines = str(error).strip().splitlines()
        error_console.print(
            f"[red]niwaki crashed:[/] {escape(f'{name}: {lines[0][:200]}' if lines else name)}. This is a fault of "
            f"niwaki. Please report it, with the trace in {escape(str(write_trace(error, sys.argv)))}",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(CRASHED)


class _NoRoom(importlib.abc.MetaPathFinder):
    """Finder that refuses to import torch under a limit of the address space."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "torch":
            raise InputError(
                f"this process may use {self.limit / 1e9:.2f} GB of address space (ulimit -v), and torch alone needs "
                f"{TORCH_BYTES / 1e9:.2f} GB: raise the limit"
            )


def _refuse(problem: str) -> None:
    """Print `problem` in one line and exit with 2."""
    error_console.print(f"[red]error:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    sys.exit(REFUSED)


def machine_problem(error: Exception) -> str | None:
    """Return one line for an error whose cause is the machine (disk, rights, memory), None for any other error."""
    if (fault := _fault(error)) is not None:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{where}{os.strerror(fault).lower()}: free space or change the rights, then run again"
    torch = sys.modules.get("torch")  # an error of torch needs torch to be loaded
    named = isinstance(error, RuntimeError | OSError | ImportError) and any(word in str(error) for word in _NO_MEMORY)
    if named or isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return (
            "not enough memory for this work: `niwaki plan` says what it needs. Lower --samples, --seq-len or "
            "--batch-tokens, or use a machine with more"
        )
    return None


def _fault(error: Exception) -> int | None:
    """Return the number of a fault of the machine. Libraries written in Rust name it in their text alone."""
    named = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(named[1]) if named else None
    return number if number in _MACHINE_FAULTS else None


def write_trace(error: Exception, argv: Sequence[str]) -> Path:
    """Write the trace of `error`, the versions and the command, without its secrets, to a new file. Return its path."""
    versions = {"python": platform.python_version(), "niwaki": __version__}
    for name in ("torch", "transformers", "safetensors"):
        versions[name] = metadata.version(name)
    text = "\n".join([
        f"command: {shlex.join(without_secrets(argv))}",
        f"machine: {platform.platform()}",
        f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        "",
        "".join(traceback.format_exception(error)),
    ])  # fmt: skip
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix=f"niwaki-crash-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".txt", delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Return the words of a command with the values of options that hold a key or a password replaced by `***`."""
    words: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and any(part in name.lower() for part in _SECRET_WORDS) and "tokens" not in name
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return words
