"""Check of the files of a result: their SHA-256 against that in run.json.

The safetensors format detects a truncated file and a broken header, but not a changed weight. And config.json or the
tokenizer decide as much as the weights. So all files that decide what the model computes have a hash: weights, configs,
tokenizer, chat templates, code, and the records of niwaki. The model card and licences are for people and have none.

    checked = check_weights(Path("OUT"))
    replace_files(Path("OUT"), write)  # after the run, hashes and files change together

Cost: every byte is read and hashed once, several files in parallel, about 1.5 GB/s per core.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from niwaki.compression.places import alone
from niwaki.compression.run_record import FORMAT, RECORD, RUN, Record, RunRecord, read_record, write_record
from niwaki.errors import CheckpointError, OutputError
from niwaki.model.aux_files import STEMS, aux_files
from niwaki.model.files import file_sha256, sync_folder
from niwaki.model.shards import INDEX, SUFFIX, check_link
from niwaki.runtime.contextual.predictor_files import TENSORS

_NOT_HASHED = (RUN, "events.jsonl")  # the first holds the hashes, the second is a log
UNVERIFIED = "config.json, tokenizer and records were not verified: the result is older than their hashes"


def hashed_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files that decide what a model computes, without its weights, by relative path."""
    return {name: file_sha256(folder / name) for name in _deciding(folder) if name != TENSORS}


def check_weights(folder: Path) -> int | None:
    """Check all files; return the bytes of the weights, or None for a model that niwaki did not make.

    A result of an earlier version has hashes of its weights alone (see `state_of`). Raises CheckpointError with the
    first file that is missing, changed, or not in run.json.
    """
    record, path = read_record(folder), folder / RECORD / RUN
    if record is None:
        return None
    weights = record.file_hashes
    if weights is None:
        raise CheckpointError(f"{path} has no SHA-256 of the weights: expected the record that niwaki wrote")
    known = {**(record.files or {}), **weights}
    there = {file.name for file in folder.iterdir() if file.suffix == SUFFIX or file.name in weights}
    there |= {TENSORS} & set(_deciding(folder))
    there |= set(_deciding(folder)) if record.files is not None else set()
    if unknown := sorted(there - known.keys()):
        raise CheckpointError(
            f"{folder / unknown[0]}: {path} has no SHA-256 of it: expected the files of one run; move it elsewhere"
        )
    if missing := sorted(name for name in known.keys() - there if record.pending.get(name) != ""):
        raise CheckpointError(f"{folder} misses {missing[0]}, which {path} names: copy the whole folder again")
    files = {name: folder / name for name in sorted(there)}
    for file in files.values():
        check_link(folder, file)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(files) or 1)) as pool:
        for name, sha256 in zip(files, pool.map(file_sha256, files.values()), strict=True):
            if sha256 not in (known[name], record.pending.get(name)):
                raise CheckpointError(
                    f"{folder / name} is not the file that niwaki wrote: expected SHA-256 {known[name][:12]}…, got "
                    f"{sha256[:12]}…; copy it again, or compress again"
                )
    return sum(files[name].stat().st_size for name in weights if name in files)


def state_of(folder: Path, checked: int | None) -> str:
    """Return in words what `check_weights` checked."""
    if checked is None:
        return "not a result of niwaki"
    record = read_record(folder)
    if record is None or record.files is None:
        return f"{checked:,} bytes of weights match run.json; {UNVERIFIED}"
    return f"{checked:,} bytes of weights match run.json, and so do {len(record.files)} other files"


def replace_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Replace files of a result by those that `write(place)` writes below another folder, and their hashes in run.json.

    run.json first accepts the old and the new content, and only the new one in the end. So a result passes
    `check_weights` even if the process is killed between two steps. One process at a time may do this.
    """
    try:
        with alone(folder / RECORD):
            _replace(folder, write)
    except OSError as error:
        raise OutputError(f"cannot write to {folder / RECORD}: {error.strerror or error}") from error


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    for left in (folder / RECORD).glob(".next-*"):  # of a killed process
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=folder / RECORD, prefix=".next-") as temporary:
        write(Path(temporary))
        _put(folder, Path(temporary))


def _put(folder: Path, place: Path) -> None:
    """Move the files below `place` into a result, with their hashes."""
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    record = read_record(folder)
    hashed = [name for name in names if record and (record.files is not None or name in (record.file_hashes or {}))]
    if record and hashed:
        pending = {name: _accepted(folder, record, name) for name in hashed}
        record = _with_hashes(record, {name: file_sha256(place / name) for name in hashed})
        write_record(folder, record.model_copy(update={"pending": pending}))
    for name in names:
        (place / name).replace(folder / name)
        sync_folder((folder / name).parent)
    if record and hashed:
        write_record(folder, record.model_copy(update={"pending": {}}))


def _accepted(folder: Path, record: Record, name: str) -> str:
    """Return the hash of a file as it is now, "" if there is none, that of the record if neither is accepted."""
    known = {**(record.files or {}), **(record.file_hashes or {})}.get(name, "")
    now = file_sha256(folder / name) if (folder / name).is_file() else ""
    return now if now in ("", record.pending.get(name)) else known


def _with_hashes(record: Record, changes: Mapping[str, str]) -> Record:
    """Return the record with new hashes. One without hashes of files beside the weights gets none of them."""
    update: dict[str, object] = {"format": FORMAT}
    if isinstance(record, RunRecord):
        weights = {name: changes[name] for name in record.result.sha256 if name in changes}
        if weights:
            sha256 = record.result.sha256 | weights
            update["result"] = record.result.model_copy(update={"sha256": sha256})
    if record.files is not None:
        update["files"] = record.files | {name: value for name, value in changes.items() if name != TENSORS}
    return record.model_copy(update=update)


def _deciding(folder: Path) -> list[str]:
    """Return the files of a result beside its weights that decide what it computes, or what niwaki says of it."""
    found = [path for path in aux_files(folder) if path.suffix != ".md" and not path.name.upper().startswith(STEMS)]
    found += [path for path in folder.iterdir() if path.name == INDEX or path.name.startswith("adapter_")]
    records = folder / RECORD
    if records.is_dir():
        found += [
            path for path in records.iterdir()
            if path.is_file() and path.name not in _NOT_HASHED and not path.name.startswith(".")
        ]  # fmt: skip
    return sorted(str(path.relative_to(folder)) for path in found)
