"""File that keeps a return to dense, or an abort, until the database has it.

It is on the disk before the database is asked, so neither a restart nor a kill loses it while the database is away. It
lies beside an SQLite file, else in the current folder (`--dense-file`). The gateway reads it at each tick, so that
`niwaki rollout abort` works without the database.

    mark = DenseMark(Path("rollout.sqlite.dense")); mark.keep(Change("abort", "aborted", 0, "why"), now, rollout=3)
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError

from niwaki.errors import InputError
from niwaki.model.files import write_text
from niwaki.rollout.store import Change


@dataclass(frozen=True)
class KeptChange:
    """Change of the file. `rollout`: its number, None for the one that is current."""

    rollout: int | None
    at: float
    change: Change


@dataclass(frozen=True)
class DenseMark:
    """File of one store."""

    path: Path

    def check(self) -> None:
        """Raise InputError if the file could not be written, before a return needs it."""
        folder = self.path.absolute().parent
        if not os.access(folder, os.W_OK):
            raise InputError(f"cannot write {self.path}, which keeps a return to dense: choose --dense-file")

    def keep(self, change: Change, now: float, rollout: int | None) -> None:
        """Write a change, on the disk when this returns. Raise OutputError."""
        values: dict[str, Any] = {"rollout": rollout, "at": now, "action": change.action, "status": change.status}
        values |= {"step": change.step, "reason": change.reason, "findings": list(change.findings)}
        write_text(self.path, json.dumps(values))

    def read(self) -> KeptChange | None:
        """Return the change, None without one. A file that holds anything else asks for dense too."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            text = ""
        try:
            values: dict[str, Any] = json.loads(text)
            change = Change(*(values[name] for name in ("action", "status", "step", "reason", "findings")))
            if change.status not in ("returned", "aborted"):
                raise ValueError(change.status)
            return KeptChange(values["rollout"], float(values["at"]), change)
        except (ValueError, KeyError, TypeError):
            reason = f"{self.path.name} is there and is not readable"
            return KeptChange(None, 0.0, Change("abort", "aborted", 0, reason))

    def clear(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def mark_of(where: str, chosen: Path | None = None) -> DenseMark:
    """Return the mark of a store, by its path or address. Raise InputError for an address of nothing."""
    path = chosen
    if path is None and "://" not in where:
        path = Path(f"{where}.dense")
    if path is None:
        try:
            url = sql.make_url(where)
        except ArgumentError as error:
            raise InputError(f"--state: expected a path or an address of SQLAlchemy: {error}") from error
        if url.get_backend_name() == "sqlite" and url.database:
            path = Path(f"{url.database}.dense")
        else:
            named = hashlib.sha256(url.render_as_string(hide_password=True).encode()).hexdigest()[:8]
            path = Path(f"rollout-{named}.dense")
    return DenseMark(path)
