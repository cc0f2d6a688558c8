"""Folders of a run: OUT, and what lies beside it until OUT is complete.

    OUT                     the result, complete or absent
    OUT.partial             the working folder; its fingerprint says what a resume continues
    OUT.replaced            the old OUT for the moment in which the new one takes its place
    OUT.shaped              the first stage of a chain, with `.partial` and `.replaced` of its own
    OUT.merged              the model of --merge-adapter, with `.partial` of its own
    OUT.rotated             the model of --rotate, with `.partial` of its own
    .OUT.lock               there while a process works on OUT, locked by it

Every removal deletes last what shows that niwaki wrote the folder. So after a kill at any point, the next run knows its
own folders.
"""

import fcntl
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

from niwaki.compression.run_record import RECORD, RUN
from niwaki.config.sources import LINEAGE, ROTATED
from niwaki.errors import OutputError, ResumeError
from niwaki.model.files import remove_folder, retire_folder

JOURNAL = "journal"
FINGERPRINT = "fingerprint.json"
LOCK = "lock"
ONE_STEP = ("export", "recover")  # fingerprints of runs that start again: exports, and recoveries of version 0.1
P = ParamSpec("P")
Value = TypeVar("Value")
MAX_NAME = 255 - len(".rotated.replaced")  # bytes; file systems allow 255


def place_of(out: str | Path) -> Path:
    """Return the absolute path of OUT, or of the folder that it links to. Raises OutputError if neither can be."""
    path = Path(out).absolute()
    try:
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{path} is a link to {path.readlink()}, which does not exist: create that folder, remove the link, "
                "or choose another OUT"
            )
        if path.is_symlink() or path.name == "..":
            path = path.resolve()
        if path.is_file():
            raise OutputError(f"{path} is a file: expected a folder name for the result")
    except OSError as error:
        raise OutputError(f"{path} cannot be a folder: {error.strerror}. Choose another OUT") from error
    if not path.name or len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"{path}: expected a folder name of 1 to {MAX_NAME} bytes for the result")
    _check_parent(path)
    return path


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other runs away from OUT, in all of their stages. Raises OutputError if one works there, or none can.

    The lock is a hidden file beside OUT. It ends with the process; the file is removed here, or by the next run.
    """
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = _taken(path)
    except BlockingIOError as error:
        raise OutputError(f"another niwaki is working on {out}: wait for it, or choose another place") from error
    except OSError as error:
        raise OutputError(f"cannot write to {out.parent}: {error.strerror}. Choose another place") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.close()


def alone_at(
    name: str, place: Callable[[Any], Path | None] = place_of
) -> Callable[[Callable[P, Value]], Callable[P, Value]]:
    """Return a decorator: the function runs `alone` at the place of its argument `name`, if it is given."""

    def decorate(function: Callable[P, Value]) -> Callable[P, Value]:
        bind = inspect.signature(function).bind

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Value:
            given = bind(*args, **kwargs).arguments.get(name)
            out = None if given is None else place(given)
            with nullcontext() if out is None else alone(out):
                return function(*args, **kwargs)

        return run

    return decorate


def partial_of(out: Path) -> Path:
    """Return the working folder of `out`."""
    return out.with_name(out.name + ".partial")


def replaced_of(out: Path) -> Path:
    """Return the place of an old `out` while the new one is moved."""
    return out.with_name(out.name + ".replaced")


def shaped_of(out: Path) -> Path:
    """Return the result of the first of two stages."""
    return out.with_name(out.name + ".shaped")


def merged_of(out: Path) -> Path:
    """Return the model of --merge-adapter."""
    return out.with_name(out.name + ".merged")


def rotated_of(out: Path) -> Path:
    """Return the model of --rotate."""
    return out.with_name(out.name + ".rotated")


def beside(out: Path) -> list[Path]:
    """Return the folders that a run of `out` may leave beside it."""
    stages = (out, shaped_of(out), merged_of(out), rotated_of(out))
    return [folder for stage in stages for folder in (partial_of(stage), replaced_of(stage))] + list(stages[1:])


def is_result(folder: Path) -> bool:
    """Return whether a folder is a result that niwaki wrote."""
    return (folder / RECORD / RUN).is_file()


def is_empty(folder: Path) -> bool:
    """Return whether nothing is there, or only empty folders."""
    try:
        if folder.is_symlink() or not folder.exists():
            return not folder.is_symlink()
        return folder.is_dir() and all(path.is_dir() and not path.is_symlink() for path in folder.rglob("*"))
    except OSError:  # an unreadable folder may not be empty
        return False


def resumable(partial: Path) -> bool:
    """Return whether a working folder is one that --resume continues."""
    path = partial / RECORD / JOURNAL / FINGERPRINT
    if not path.is_file():
        return False
    try:
        return not any(name in json.loads(path.read_text(encoding="utf-8")) for name in ONE_STEP)
    except (OSError, ValueError, TypeError):
        return True  # the resume says what is wrong with it


def keeps_parts(out: Path) -> bool:
    """Return whether an unfinished run of `out` has finished parts, or a finished stage, that a resume keeps."""
    journals = [partial_of(place) / RECORD / JOURNAL for place in (out, shaped_of(out))]
    parts = (path for journal in journals for path in journal.glob("*.json"))
    return is_result(shaped_of(out)) or any(path.name != FINGERPRINT for path in parts)


def check_free(out: Path, *, resume: bool, overwrite: bool, resumes: bool = True) -> None:
    """Refuse an OUT that exists, or an unfinished run, unless `resume` or `overwrite` allows it.

    Only folders that niwaki wrote are replaced. With `resume`, a finished OUT passes: its inputs are compared later.
    A command without --resume gives `resumes=False`. Raises OutputError or ResumeError; the step that it names works.
    """
    check_ours(out)
    unfinished = _unfinished(out)
    if not is_empty(out) and not (overwrite or (resume and unfinished in (None, shaped_of(out)))):
        both = " (add --resume to finish the run that was to replace it)" if unfinished and resumes else ""
        raise OutputError(f"{out} already exists: choose another OUT, or replace it with --overwrite{both}")
    if unfinished and not (resume or overwrite):
        go_on = "continue it with --resume" if resumes else "finish it with `niwaki compress`, choose another OUT"
        raise OutputError(f"{unfinished} holds an unfinished run: {go_on}, or drop it with --overwrite")
    sources = (merged_of(out), rotated_of(out))
    begun = (out, partial_of(out), *sources, *map(partial_of, sources))
    if resume and not unfinished and all(map(is_empty, begun)):
        raise ResumeError(f"nothing to resume: {partial_of(out)} does not exist. Start without --resume")


def check_ours(out: Path) -> None:
    """Refuse an OUT whose folders hold files that niwaki did not write, or that has no folder to lie in."""
    _check_parent(out)
    if out.is_file():
        raise OutputError(f"{out} is a file: expected a folder name for the result")
    for folder, mark in _folders(out):
        ours = not folder.is_symlink() and (folder / mark).exists()
        if not (ours or is_empty(folder)):
            raise OutputError(
                f"{folder} exists and is not a niwaki result, so it will not be replaced: choose another OUT"
            )


def check_apart(model: Path, out: Path) -> None:
    """Refuse an OUT, or a folder of its run, that is the model, lies in it or contains it."""
    source = model.resolve()
    for folder in (out, partial_of(out), replaced_of(out)):
        place = folder.resolve()
        if source == place or source in place.parents or place in source.parents:
            raise OutputError(
                f"OUT {out} and the model {model} share a folder, and writing one would destroy the other: "
                "choose an OUT outside the model"
            )


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse an OUT whose parent folder does not exist or has no room for the result.

    A file system without a size, such as /proc, says what is wrong when it is written.
    """
    _check_parent(out)
    size_bytes, _, free_bytes = shutil.disk_usage(out.parent)
    if size_bytes and free_bytes < needed_bytes:
        raise OutputError(
            f"{out.parent} has {free_bytes / 1e9:.2f} GB free, the result needs {needed_bytes / 1e9:.2f} GB: "
            "free space or choose another OUT"
        )


def remove(folder: Path) -> None:
    """Remove a folder of a run; what shows that niwaki wrote it is deleted last."""
    remove_folder(folder, f"{RECORD}/{RUN}")


def retire(folder: Path, aside: Path) -> None:
    """Remove a complete folder of a run, by way of `aside`, and what a killed run left there."""
    retire_folder(folder, aside, f"{RECORD}/{RUN}")


def drop_unfinished(out: Path, *, keep_source: bool) -> None:
    """Remove what earlier runs left beside OUT. An old OUT that was set aside by a killed run comes back."""
    with _locks(out):
        if not out.exists() and is_result(replaced_of(out)):
            replaced_of(out).rename(out)
        remove(partial_of(out))
        _remove_stages(out, keep_source)


def sweep(out: Path) -> None:
    """Remove what a kill left of a run whose OUT is complete."""
    with _locks(out):
        if not resumable(partial_of(out)):
            remove(partial_of(out))
        shutil.rmtree(out / RECORD / JOURNAL, ignore_errors=True)
        remove(replaced_of(out))
        _remove_stages(out, keep_source=False)


def _folders(out: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of a run, each with the path below it that shows that niwaki wrote it."""
    shaped, merged, run = shaped_of(out), merged_of(out), f"{RECORD}/{RUN}"
    yield out, run
    yield partial_of(out), RECORD
    yield replaced_of(out), run
    yield shaped, run
    yield partial_of(shaped), RECORD
    yield replaced_of(shaped), run
    yield merged, LINEAGE
    yield partial_of(merged), RECORD
    yield replaced_of(merged), RECORD
    rotated = rotated_of(out)
    yield rotated, ROTATED
    yield partial_of(rotated), RECORD
    yield replaced_of(rotated), RECORD


def _unfinished(out: Path) -> Path | None:
    """Return the folder of the latest step of an unfinished run of `out`, None if there is none."""
    for folder in (partial_of(out), partial_of(shaped_of(out))):
        if resumable(folder):
            return folder
    return shaped_of(out) if is_result(shaped_of(out)) else None


def _check_parent(out: Path) -> None:
    if not out.parent.is_dir():
        there = "is not a folder" if out.parent.exists() else "does not exist: create it"
        raise OutputError(f"{out.parent} {there}, or choose another OUT")


def _taken(path: Path) -> TextIO:
    """Return the locked file at `path`. An earlier holder may have removed the file that was opened: then again."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_stages(out: Path, keep_source: bool) -> None:
    remove(partial_of(shaped_of(out)))
    retire(shaped_of(out), replaced_of(shaped_of(out)))
    for source in () if keep_source else (merged_of(out), rotated_of(out)):
        retire(source, partial_of(source))
        remove(replaced_of(source))


@contextmanager
def _locks(out: Path) -> Iterator[None]:
    """Hold the locks of the working folders. Raises OutputError if another process has one."""
    taken = []
    try:
        for partial in (partial_of(out), partial_of(shaped_of(out))):
            path = partial / RECORD / JOURNAL / LOCK
            if path.is_file():
                taken.append(path.open("r+"))
                try:
                    fcntl.flock(taken[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise OutputError(
                        f"another niwaki is working in {partial}: wait for it, or choose another OUT"
                    ) from error
        yield
    finally:
        for lock in taken:
            lock.close()
