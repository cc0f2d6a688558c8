"""The output folder of one compression: built beside its final place, complete or absent.

Work happens in `OUT.partial`, which is renamed to OUT at the very end, so OUT never holds half a model. After
a kill, `--resume` continues there: the journal names every finished shard with its hash and the report lines
of its block. A resume is refused when anything that decides the bytes has changed.

    OUT/                        a normal Hugging Face folder
    OUT/niwaki/run.json         resolved recipe, seeds, versions, hashes, device, seconds, peak memory
    OUT/niwaki/blocks.jsonl     one line per matrix
    OUT/niwaki/events.jsonl     progress, one JSON object a line
    OUT.partial/niwaki/journal/ only while running
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from niwaki.checkpoint import file_sha256, sync_folder, write_shard, write_text
from niwaki.errors import OutputError, ResumeError

RECORD = "niwaki"
FINGERPRINT = "fingerprint.json"


class Run:
    """A working folder with its journal and event log. Use as a context manager."""

    def __init__(self, out: Path, fingerprint: dict[str, str], *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.finished: dict[str, dict[str, Any]] = {}
        check_free(out, self.folder, resume=resume, overwrite=overwrite)
        continuing = resume and (self._journal / FINGERPRINT).is_file()  # killed before that, nothing was done
        if continuing:
            self._check_fingerprint()
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._log: TextIO = (self.folder / RECORD / "events.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror}. Choose another place") from error
        if continuing:
            self._read_journal()
        else:
            write_text(self._journal / FINGERPRINT, json.dumps(fingerprint, indent=1, sort_keys=True))

    @property
    def _journal(self) -> Path:
        return self.folder / RECORD / "journal"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._lock.close()

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl."""
        line = {"time": round(time.time(), 3), "event": kind, **fields}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def finish_part(self, name: str, entry: dict[str, Any]) -> None:
        """Records that a part (a block, the ends, the allocation) is safely on disk, with what belongs to it."""
        write_text(self._journal / f"{name}.json", json.dumps(entry))
        self.finished[name] = entry

    def complete(self) -> None:
        """Moves the folder to its final place, replacing an old OUT only now, and drops the journal.

        Killed at any point in here, either the old OUT, the new one, or a working folder to resume is there.
        """
        self._log.flush()
        os.fsync(self._log.fileno())
        retired = self.out.with_name(self.out.name + ".replaced")
        shutil.rmtree(retired, ignore_errors=True)
        try:
            if self.out.exists():
                self.out.rename(retired)
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise OutputError(
                f"the result is complete in {self.folder} but cannot move to {self.out}: {error}"
            ) from error
        shutil.rmtree(self.out / RECORD / "journal")
        shutil.rmtree(retired, ignore_errors=True)

    def discard(self) -> None:
        """Removes the working folder: nothing in it can be of use."""
        self.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_fingerprint(self) -> None:
        path = self._journal / FINGERPRINT
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(f"{self.folder} has no readable journal: start again with --overwrite") from error
        changed = [key for key in {**before, **self.fingerprint} if before.get(key) != self.fingerprint.get(key)]
        if changed:
            raise ResumeError(
                f"cannot resume {self.folder}: changed since it began: {', '.join(sorted(changed))}. "
                "Restore it, or start again with --overwrite"
            )

    def _read_journal(self) -> None:
        for entry_path in self._journal.glob("*.json"):
            entry = json.loads(entry_path.read_text(encoding="utf-8"))
            shard = entry.get("shard")
            if shard is None or _same_content(self.folder / shard, entry["sha256"]):
                self.finished[entry_path.stem] = entry
        for orphan in self.folder.rglob(".*.tmp"):
            orphan.unlink()

    def _take_lock(self) -> TextIO:
        lock = (self.folder / RECORD / "journal" / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OutputError(
                f"another niwaki is working in {self.folder}: wait for it, or choose another OUT"
            ) from error
        return lock


class Writer:
    """Writes one finished part in the background and journals it when it is on the disk.

    One at a time, so that a kill loses at most one finished block.
    """

    def __init__(self, run: Run, report: Callable[..., None]) -> None:
        self.run = run
        self.report = report
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: tuple[str, Future[dict[str, Any]]] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After a failure elsewhere, what is already being written may still be finished and journalled.
            self._settle()
        except OutputError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, part: str, shard: str, tensors: dict[str, Tensor], lines: list[dict[str, Any]]) -> None:
        """Starts writing one shard, once the one before it is done."""
        path = self.run.folder / shard

        def save() -> dict[str, Any]:
            sha256 = write_shard(path, tensors)
            return {
                "shard": shard,
                "sha256": sha256,
                "bytes": path.stat().st_size,
                "tensors": sorted(tensors),
                "lines": lines,
            }

        self._settle()
        self._pending = (part, self._pool.submit(save))

    def _settle(self) -> None:
        if self._pending is None:
            return
        (part, future), self._pending = self._pending, None
        self.run.finish_part(part, future.result())
        self.report("saved", part=part)


def check_free(out: Path, partial: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses an OUT that exists, or an unfinished run, unless told what to do with it."""
    if out.is_file():
        raise OutputError(f"{out} is a file: expected a folder name for the result")
    with contextlib.suppress(OSError):
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise OutputError(f"{out} already exists: choose another OUT, or replace it with --overwrite")
    if partial.exists() and not (resume or overwrite):
        raise OutputError(f"{partial} holds an unfinished run: continue it with --resume, or drop it with --overwrite")
    if resume and not partial.exists():
        raise ResumeError(f"nothing to resume: {partial} does not exist")


def _same_content(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256
