"""Changes of a file while somebody reads it."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file


def write_in_place(path: Path) -> None:
    """Write two other bytes near the end."""
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\x01\x02")


def write_with_old_times(path: Path) -> None:
    """Write two other bytes, and set the time of modification back."""
    status = path.stat()
    write_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Put another file of safetensors at the same place."""
    tensors = {name: tensor + 0.5 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").replace(path)


def cut(path: Path) -> None:
    """Cut the second half off."""
    os.truncate(path, path.stat().st_size // 2)
