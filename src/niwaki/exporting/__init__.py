"""A result of `niwaki compress` in the format of another engine.

The new folder is built beside its final place and renamed at the end, so it is complete or absent. It keeps the
record of the compression: `niwaki/run.json` gains a field `export`, `niwaki/blocks.jsonl` is copied.

    niwaki.export("OUT", "DEST", to="compressed-tensors")
"""

import importlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from niwaki.card import model_card
from niwaki.checkpoint import Checkpoint
from niwaki.errors import CheckpointError, InputError, unknown
from niwaki.run import RECORD, Run, check_apart, check_free, check_space, circumstances, partial_of
from niwaki.writing import copy_file, file_sha256, write_text

Report = Callable[..., None]
FORMATS = {"compressed-tensors": "niwaki.exporting.compressed_tensors"}


class Exporter(Protocol):
    """What the module of a format offers."""

    def check(self, checkpoint: Checkpoint, record: Mapping[str, Any]) -> Any:
        """How this result with its run.json is written in the format. Raises InputError for one that cannot be."""

    def write(self, checkpoint: Checkpoint, plan: Any, folder: Path, report: Report) -> dict[str, Any]:
        """Writes weights and config to `folder`; `plan` is from `check`. Returns what the record tells of them."""


def export(
    out: str | Path, dest: str | Path, *, to: str, overwrite: bool = False, report: Report | None = None
) -> dict[str, Any]:
    """Writes the quantized result `out` to the new folder `dest` in the format `to` (see FORMATS).

    Returns the content of DEST/niwaki/run.json. `report(event, **fields)` is called as the work proceeds.

    Raises InputError for an unknown format, a missing library or a result that the format cannot hold, OutputError
    for a `dest` that cannot be written; nothing is left behind.
    """
    started = time.perf_counter()
    if to not in FORMATS:
        raise InputError(unknown("export format", to, FORMATS))
    exporter = cast(Exporter, importlib.import_module(FORMATS[to]))
    dest = Path(dest).absolute()
    check_free(dest, partial_of(dest), resume=False, overwrite=overwrite)
    checkpoint = Checkpoint.open(out)
    before = _record_of(checkpoint.folder)
    plan = exporter.check(checkpoint, before)
    check_apart(checkpoint.folder, dest)
    check_space(dest, checkpoint.nbytes)
    with Run(dest, {"export": to}, resume=False, overwrite=overwrite) as run:

        def tell(event: str, **fields: Any) -> None:
            run.event(event, **fields)
            if report is not None:
                report(event, **fields)

        try:
            for source in checkpoint.companions():
                copy_file(source, run.folder / source.name)
            written = exporter.write(checkpoint, plan, run.folder, tell)
            record = before | {"export": _export_record(to, checkpoint.folder, run.folder, written, started)}
            copy_file(checkpoint.folder / RECORD / "blocks.jsonl", run.folder / RECORD / "blocks.jsonl")
            write_text(run.folder / "README.md", model_card(record))
            write_text(run.folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except BaseException:
            run.discard()
            raise
        run.complete()
    return record


def _record_of(folder: Path) -> dict[str, Any]:
    """The run.json of the compression. Raises CheckpointError for a folder without one."""
    path = folder / RECORD / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable {RECORD}/run.json: expected a folder that `niwaki compress` wrote"
        ) from error
    return record


def _export_record(to: str, source: Path, folder: Path, written: dict[str, Any], started: float) -> dict[str, Any]:
    shards = sorted(folder.glob("*.safetensors"))
    return {
        "to": to,
        "source": str(source),
        **circumstances(),
        **written,
        "bytes": sum(path.stat().st_size for path in shards),
        "sha256": {path.name: file_sha256(path) for path in shards},
        "seconds": round(time.perf_counter() - started, 2),
    }
