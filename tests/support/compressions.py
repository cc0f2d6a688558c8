"""Arguments of small compressions, interrupted runs, and the contents of folders."""

from pathlib import Path
from typing import Any

import pytest

import niwaki

SMALL = {"samples": 6, "seq_len": 16}


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    """Return arguments of a small compression on the CPU, with changes."""
    return {
        "method": "sparsegpt",
        "target": "2:4",
        "calibration": {"files": (str(text),), **SMALL},
        "device": "cpu",
        **changes,
    }


def interrupt_after(blocks: int, model: Path, out: Path, text: Path, /, **changes: Any) -> None:
    """Interrupt a run as a user does, after `blocks` blocks are on the disk."""

    def report(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == f"block-{blocks - 1:05d}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, out, report=report, **settings(text, **changes))
    assert not out.exists()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
