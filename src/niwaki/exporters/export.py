"""Export of a checkpoint to the format of another engine.

The new folder is built beside its final place and renamed at the end, so it is complete or absent. It keeps the
record of the compression: `niwaki/run.json` gains a field `export`, and `niwaki/blocks.jsonl` is copied. A model that
niwaki did not make gets a run.json with this field and its source alone.

    niwaki.export("OUT", "DEST", to="gguf", type="q8_0")
"""

import importlib
import time
from pathlib import Path
from typing import Any, Protocol, cast

from niwaki.compression.model_card import export_card
from niwaki.compression.places import alone_at, check_apart, check_free, check_space, place_of, sweep
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import (
    LINES,
    RECORD,
    ExportRecord,
    Record,
    provenance,
    read_record,
    write_record,
)
from niwaki.compression.source_records import ModelRecord
from niwaki.compression.verify import hashed_files
from niwaki.config.events import Report
from niwaki.errors import InputError, OutputError, unknown
from niwaki.exporters.formats import FORMATS, ExportFormat
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.files import copy_file, file_sha256, write_text


class ExportPlan(Protocol):
    """Plan of one export. `nbytes` is about its size on the disk."""

    @property
    def nbytes(self) -> int: ...


class Exporter(Protocol):
    """Interface of the module of a format."""

    def check(self, checkpoint: Checkpoint, record: Record | None, type: str | None) -> ExportPlan:
        """Plan the export of this checkpoint. `record` is its run.json, or None if niwaki did not make it.

        Raises InputError for a checkpoint, or a `type` of weights, that the format cannot hold.
        """

    def write(self, checkpoint: Checkpoint, plan: Any, folder: Path, report: Report) -> dict[str, Any]:
        """Write the files of the export to `folder`. `plan` comes from `check`. Return the fields of its record."""


@alone_at("dest")
def export(
    out: str | Path,
    dest: str | Path,
    *,
    to: str,
    type: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Write the model `out` to the new folder `dest` in the format `to` (see FORMATS), its matrices as `type`.

    Return the content of DEST/niwaki/run.json. `report(event, **fields)` is called during the work.

    Raises InputError for an unknown format, a missing library or a model that the format cannot hold. Raises
    OutputError for a `dest` that cannot be written. An error leaves no file.
    """
    started = time.perf_counter()
    if to not in FORMATS:
        raise InputError(unknown("export format", to, FORMATS))
    exporter = _exporter(to)
    dest = place_of(dest)
    check_free(dest, resume=False, overwrite=overwrite, resumes=False)
    checkpoint = Checkpoint.open(out)
    before = read_record(checkpoint.folder)
    plan = exporter.check(checkpoint, before, type)
    check_apart(checkpoint.folder, dest)
    check_space(dest, plan.nbytes)
    with ResultFolder(dest, {"export": to}, resume=False, overwrite=overwrite) as folder:

        def tell(event: str, **fields: Any) -> None:
            folder.event(event, **fields)
            if report is not None:
                report(event, **fields)

        try:
            written = exporter.write(checkpoint, plan, folder.path, tell)
            plain = ModelRecord.model_validate({**checkpoint.source, "bytes": checkpoint.nbytes})
            record = before if before is not None and before.model is not None else Record(model=plain)
            record = record.with_export(_export_record(to, checkpoint.folder, folder.path, written, started))
            lines = checkpoint.folder / RECORD / LINES
            if lines.is_file():
                copy_file(lines, folder.path / RECORD / LINES)
            write_text(
                folder.path / "README.md", export_card(record, library=FORMATS[to].library, storage=FORMATS[to].storage)
            )
            settled: dict[str, Any] = {"pending": {}} if record.pending else {}  # of the result that is exported
            record = record.model_copy(update={"files": hashed_files(folder.path), **settled})
            write_record(folder.path, record)
            checkpoint.log.check()
        except BaseException:
            folder.discard()
            raise
        folder.complete()
    sweep(dest)
    return record.dump()


def _exporter(to: str) -> Exporter:
    try:
        return cast(Exporter, importlib.import_module(FORMATS[to].module))
    except ImportError as error:
        name = f"{error.name}: pip install {error.name} (or the extra `export`)"
        raise InputError(f"exporting to {to} needs the package {name}") from error


def _export_record(to: str, source: Path, folder: Path, written: dict[str, Any], started: float) -> ExportRecord:
    files = weight_files(folder, FORMATS[to])
    fields = {
        "to": to,
        "source": str(source),
        **provenance(),
        **written,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {path.name: file_sha256(path) for path in files},
        "seconds": round(time.perf_counter() - started, 2),
    }
    return ExportRecord.model_validate(fields)


def weight_files(folder: Path, format: ExportFormat) -> list[Path]:
    """Return the weight files of an export, sorted by name. Raises OutputError if there is none."""
    files = sorted(path for path in folder.iterdir() if path.suffix in format.suffixes)
    if not files:
        raise OutputError(f"{format.module} wrote no file that ends with {' or '.join(format.suffixes)}")
    return files
