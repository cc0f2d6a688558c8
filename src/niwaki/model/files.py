"""Files: atomic writes, and files that are not what their names say.

A file under its final name is always complete. Content goes to a temporary file in the same folder, is flushed to the
disk, and is then renamed.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from niwaki.errors import InputError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

CACHE = "NIWAKI_CACHE"
POINTER = b"version https://git-lfs.github.com/spec/"


def cache_folder(part: str) -> Path:
    """Return the folder `part` in the cache of the user: of NIWAKI_CACHE, XDG_CACHE_HOME/niwaki, ~/.cache/niwaki."""
    given = os.environ.get(CACHE)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "niwaki"
    return (Path(given).expanduser() if given else base) / part


def require_content(path: Path, error: type[InputError]) -> None:
    """Raise `error` for a Git LFS pointer: a few lines that stand for a large file which was not fetched."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise error(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it"
            )


def write_shard(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write one safetensors file atomically and return its SHA-256. Raises OutputError and leaves no partial file."""
    from safetensors.torch import save_file  # needs torch, which other writers here do not

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary, ThreadPoolExecutor(1) as hasher:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it; save_file replaces the file by a private one
        save_file(contiguous, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        digest = hasher.submit(file_sha256, temporary)  # reads back from the page cache
        sync_file(temporary)
        return digest.result()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write one UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy one file atomically."""
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def atomic_file(path: Path) -> Any:
    """Yield a temporary path beside `path`. On success it is flushed to the disk and renamed to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {_reason(error)}. Free space or choose another place") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what another library raises on a full or read-only disk into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder}: {_reason(error)}. Free space or choose another place") from error


def remove_folder(folder: Path, last: str) -> None:
    """Remove a folder, what is at the path `last` below it after all others. A link is left alone.

    `last` shows who wrote the folder, also after a kill in the middle.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    kept = folder / last
    for parent in dict.fromkeys((folder, kept.parent)):
        for path in parent.iterdir() if parent.is_dir() else ():
            if path not in (kept, kept.parent):
                _delete(path)
    shutil.rmtree(folder, ignore_errors=True)


def retire_folder(folder: Path, aside: Path, last: str) -> None:
    """Remove a folder by way of `aside`, and what is there: after a kill, a part of it never counts as the whole."""
    remove_folder(aside, last)
    if folder.is_dir():
        folder.rename(aside)
        remove_folder(aside, last)


@contextmanager
def kept_by_interruption(retire: Callable[[], None]) -> Iterator[None]:
    """Call `retire` after the block, also if it fails. After an interruption, what it removes serves the next run."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        retire()
        raise
    retire()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
