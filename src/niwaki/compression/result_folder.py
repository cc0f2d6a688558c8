"""Output folder of one run: built beside its final place, complete or absent.

Work happens in `OUT.partial`, which is renamed to OUT at the end, so OUT never holds half a model. After a kill,
`--resume` continues there: the journal has every finished shard with its hash and the records of its matrices. A resume
is refused if anything that decides the bytes has changed.

    OUT/                        a normal Hugging Face folder
    OUT/niwaki/run.json         resolved recipe, seeds, versions, hashes, device, seconds, peak memory
    OUT/niwaki/blocks.jsonl     one line per matrix
    OUT/niwaki/events.jsonl     progress, one JSON object a line
    OUT.partial/niwaki/journal/ only while running
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from niwaki.compression.places import (
    FINGERPRINT,
    JOURNAL,
    LOCK,
    check_ours,
    is_empty,
    is_result,
    partial_of,
    remove,
    replaced_of,
    resumable,
)
from niwaki.compression.run_record import (
    RECORD,
    JournalEntry,
    MatrixRecord,
    ModuleRecord,
    RunRecord,
    read_run,
)
from niwaki.config.events import Event, Report
from niwaki.config.recipe import RENAMED_FIELDS
from niwaki.errors import InputError, OutputError, ResumeError
from niwaki.model.config_file import CONFIG
from niwaki.model.files import file_sha256, sync_folder, write_shard, write_text
from niwaki.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from niwaki.model.checkpoint import Checkpoint

EVENTS = "events.jsonl"
MODEL = "model"  # begins the names of hashes of the model in version 0.1
CONTENT = "model content"
OTHER_INPUTS = "{} is finished, from other inputs: changed since then"


class ResultFolder:
    """Working folder with its journal and event log. Use it as a context manager."""

    def __init__(self, out: Path, fingerprint: dict[str, str], *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.path = partial_of(out)
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.finished: dict[str, JournalEntry] = {}
        check_ours(out)
        left = resumable(self.path)
        if left and not (resume or overwrite):  # it began after the check of the command
            raise OutputError(f"{self.path} holds an unfinished run: continue it with --resume")
        self._continuing = resume and left
        if self._continuing:
            self._check_fingerprint()
        elif self.path.exists():
            if (self._journal / LOCK).is_file():
                self._take_lock().close()  # raises if another process writes there
            remove(self.path)
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            _cut_torn_line(self.path / RECORD / EVENTS)
            self._log: TextIO = (self.path / RECORD / EVENTS).open("a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._continuing:
            self._read_journal()
        else:
            write_text(self._journal / FINGERPRINT, json.dumps(fingerprint, indent=1, sort_keys=True))

    @property
    def _journal(self) -> Path:
        return self.path / RECORD / JOURNAL

    def __enter__(self) -> "ResultFolder":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a last line for which there is no room
            self._log.close()
        if not (self.finished or self._continuing or self._lock.closed):  # nothing here is worth a resume
            remove(self.path)
        self._lock.close()

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": round(time.time(), 3), "event": kind, **fields}
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish_part(self, name: str, entry: JournalEntry) -> None:
        """Record a complete part (a block, the embeddings, the allocation) in the journal and in `finished`."""
        write_text(self._journal / f"{name}.json", json.dumps(entry.dump()))
        self.finished[name] = entry

    def complete(self) -> None:
        """Move the folder to its final place, in exchange for an old OUT, and delete the journal.

        After a kill at any point, the old OUT, the new one, or a working folder to resume exists.
        """
        self._check_place()
        try:
            os.fsync(self._log.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error
        retired, journal = replaced_of(self.out), self.out / RECORD / JOURNAL
        if not resumable(self.path):  # no resume would remove the journal after a kill
            shutil.rmtree(self._journal)
        try:
            if self.out.exists():
                remove(retired)
                self.out.rename(retired)
            self.path.rename(self.out)
            sync_folder(self.out.parent)
        except OSError as error:
            raise OutputError(
                f"the result is complete in {self.path} but cannot move to {self.out}: {error}"
            ) from error
        shutil.rmtree(journal, ignore_errors=True)
        remove(retired)

    def discard(self) -> None:
        """Remove the working folder; no later run can use it."""
        self.__exit__()
        remove(self.path)

    def _check_place(self) -> None:
        """Refuse to replace what appeared at OUT during the run."""
        if not (self.overwrite or is_empty(self.out)):
            raise OutputError(
                f"{self.out} appeared during this run and is not replaced; the result is complete in {self.path}: "
                "move one of them, or repeat the command with --overwrite"
            )
        check_ours(self.out)

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write to {self.path}: {error.strerror}. Free space or choose another place")

    def _check_fingerprint(self) -> None:
        path = self._journal / FINGERPRINT
        try:
            before = current_hashes(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise ResumeError(f"{self.path} has no readable journal: start again with --overwrite") from error
        require_same(before, self.fingerprint, f"cannot resume {self.path}: changed since it began")

    def _read_journal(self) -> None:
        for entry_path in self._journal.glob("*.json"):
            if entry_path.name == FINGERPRINT:
                continue
            try:
                entry = JournalEntry.model_validate_json(entry_path.read_text(encoding="utf-8"))
            except ValueError:  # the part is made again
                continue
            if entry.shard is None or _same_content(self.path / entry.shard, entry.sha256):
                self.finished[entry_path.stem.replace("ends-", "embeddings-")] = entry  # its name in version 0.1
        for pattern in (".*.tmp", ".tmp*"):  # temporary files of niwaki and of safetensors
            for orphan in self.path.rglob(pattern):
                orphan.unlink()

    def _take_lock(self) -> TextIO:
        lock = (self._journal / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OutputError(
                f"another niwaki is working in {self.path}: wait for it, or choose another OUT"
            ) from error
        return lock


class Writer:
    """Background writer of finished parts. Each enters the journal, in order, when it is on the disk.

    At most `max_writes` parts are written at the same time, and a kill loses no more of them. With two, one is written
    while the other is hashed. Each step takes about as long, and both take longer than a GPU needs for a block.
    """

    def __init__(self, folder: ResultFolder, report: Report, max_writes: int = 1) -> None:
        self.folder = folder
        self.report = report
        self._max_writes = max_writes
        self._pool = ThreadPoolExecutor(max_writes, thread_name_prefix="save")
        self._pending: deque[tuple[str, Future[JournalEntry]]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After a failure elsewhere, parts in progress are still completed and enter the journal.
            self.flush()
        except OutputError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(
        self, part: str, shard: str, tensors: "dict[str, Tensor]", lines: Sequence[MatrixRecord | ModuleRecord]
    ) -> None:
        """Start to write one shard, after enough earlier writes are complete."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._start(part, shard, lambda path: write_shard(path, tensors), sorted(tensors), nbytes, lines)

    def copy(
        self, part: str, shard: str, checkpoint: "Checkpoint", names: Mapping[str, str],
        lines: Sequence[MatrixRecord | ModuleRecord] = (),
    ) -> None:  # fmt: skip
        """Start to copy the tensors `names` (new name → name in `checkpoint`) to one shard, byte for byte."""
        infos = checkpoint.stored_infos(names)
        nbytes = sum(info.nbytes for info in infos.values())
        self._start(part, shard, lambda path: checkpoint.copy(names, path), sorted(infos), nbytes, lines)

    def _start(
        self, part: str, shard: str, save: Callable[[Path], str], names: list[str], nbytes: int,
        lines: Sequence[MatrixRecord | ModuleRecord],
    ) -> None:  # fmt: skip
        path = self.folder.path / shard

        def finish() -> JournalEntry:
            sha256, size = save(path), path.stat().st_size
            return JournalEntry(
                shard=shard, sha256=sha256, bytes=size, tensors=names, tensor_bytes=nbytes, lines=lines
            )  # fmt: skip

        self.flush(self._max_writes - 1)
        self._pending.append((part, self._pool.submit(finish)))

    def flush(self, left: int = 0) -> None:
        """Wait until at most `left` parts are still being written; the others are on the disk and in the journal."""
        while len(self._pending) > left:
            part, future = self._pending.popleft()
            self.folder.finish_part(part, future.result())
            self.report(Event.SAVED, part=part)


def fingerprint(
    checkpoint: "Checkpoint",
    tokens: str,
    recipe: Mapping[str, Any],
    *,
    dense_stream: bool,
    threads: int | None,
    like: Mapping[str, str],
) -> dict[str, str]:
    """Return hashes of everything that decides the bytes of a result, by the names that a refused resume shows.

    Takes the hash of the calibration `tokens`, and the recipe as JSON. `threads` is None if the result does not depend
    on them. `like`: the fingerprint to compare with, see `_model_hashes`.
    """
    inputs = _model_hashes(checkpoint, like)
    inputs["data (calibration tokens)"] = tokens
    inputs |= {f"config ({name})": json.dumps(value) for name, value in recipe.items() if name != "calibration"}
    inputs["seed"] = inputs.pop("config (seed)")
    inputs["config (dense_stream)"] = str(dense_stream)
    inputs |= {f"version ({name})": version(name) for name in ("torch", "transformers")}
    inputs["version (niwaki)"] = __version__
    inputs["threads"] = "" if threads is None else str(threads)
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in inputs.items()}


def stored_fingerprint(out: Path) -> dict[str, str]:
    """Return the fingerprint of the unfinished run of OUT, else of the finished one, {} if there is no readable one."""
    try:
        if resumable(partial_of(out)):
            path = partial_of(out) / RECORD / JOURNAL / FINGERPRINT
            return current_hashes(json.loads(path.read_text(encoding="utf-8")))
        return current_hashes(read_run(out).fingerprint) if is_result(out) else {}
    except (OSError, ValueError, AttributeError, InputError):
        return {}  # the resume says what is wrong with it


def current_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of a fingerprint under the present names of what they are of."""
    renamed = {f"config ({old})": f"config ({new})" for old, new in RENAMED_FIELDS.items()}
    return {renamed.get(name, name): value for name, value in hashes.items()}


def finished_record(out: Path, fingerprint: dict[str, str], *, overwrite: bool) -> RunRecord | None:
    """Return the record of a finished OUT that was made from the same inputs, None if there is no finished OUT.

    Raises ResumeError naming what differs. With `overwrite`, an OUT that differs is to be replaced: None.
    """
    if not is_result(out):
        return None
    try:
        record = read_run(out)
    except InputError as error:
        if overwrite:
            return None
        raise ResumeError(f"{out} is finished, but its run.json cannot be compared: use --overwrite") from error
    before = current_hashes(record.fingerprint)
    if overwrite and before != fingerprint:
        return None
    require_same(before, fingerprint, OTHER_INPUTS.format(out))
    return record


def require_same(before: dict[str, str], now: dict[str, str], message: str) -> None:
    """Raise ResumeError with the names of the hashes that differ."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise ResumeError(
            f"{message}: {', '.join(sorted(changed))}. Restore it, or start again with --overwrite instead of --resume"
        )


def _model_hashes(checkpoint: "Checkpoint", like: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a fingerprint that is of the model: hashes of contents.

    If `like` is a fingerprint of version 0.1, which knows modification times instead, they are as it has them.
    """
    dated = f"{MODEL} ({CONFIG})" in like
    hashes = checkpoint.dated_fingerprint() if dated else checkpoint.fingerprint()
    return {f"{MODEL if dated else CONTENT} ({name})": value for name, value in hashes.items()}


def _same_content(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _cut_torn_line(path: Path) -> None:
    """Cut the half line off that a kill left at the end of a file of lines."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
