"""The command line in forked children of this process, which has imported everything: exit code, output, seconds."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from niwaki.cli.app import main

CRASHED = 97  # exit code of a child whose Python raised what the command line does not handle
Row = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """End of a child. `code` is negative for a signal."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """Return the last line of the errors, or of the output."""
        return ["", *(self.err.strip() or self.out.strip()).splitlines()][-1]

    @property
    def clean(self) -> bool:
        """Return whether the child did its work, or refused it with a message and without a traceback."""
        return self.code == 0 or (self.code > 0 and self.code != CRASHED and "Traceback" not in self.err)


def forked(work: Callable[[], object]) -> int:
    """Begin `work` in a child and return its process id. Its exit code is that of a SystemExit, 0 or CRASHED."""
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        torch.set_num_threads(1)  # threads of the parent are not in the child
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0) if isinstance(stop.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def waited(child: int) -> int:
    """Wait for a child and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin(*arguments: object, before: Callable[[], object] | None = None, told: Path | None = None) -> int:
    """Begin `niwaki ARGUMENTS` in a child after `before`, and return its process id; its output goes to `told`."""

    def work() -> None:
        with (told or Path(os.devnull)).open("w", encoding="utf-8") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            sys.argv = ["niwaki", *map(str, arguments)]
            if before is not None:
                before()
            main()

    return forked(work)


def niwaki(*arguments: object, before: Callable[[], object] | None = None) -> Ended:
    """Run `niwaki ARGUMENTS` in a child to its end."""
    with tempfile.TemporaryDirectory() as folder:
        told, began = Path(folder) / "told", time.monotonic()
        code = waited(begin(*arguments, before=before, told=told))
        text = told.read_text(encoding="utf-8", errors="replace")
        return Ended(code, text, text if code else "", time.monotonic() - began)
