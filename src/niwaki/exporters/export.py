"""Export of a checkpoint to the format of another engine.

The new folder is built beside its final place and renamed at the end, so it is complete or absent. It keeps the
record of the compression: `niwaki/run.json` gains a field `export`, and `niwaki/blocks.jsonl` is copied. A model that
niwaki did not make gets a run.json with this field and its source alone.

    niwaki.export("OUT", "DEST", to="gguf", type="q8_0")
"""

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from niwaki.compression.model_card import export_card
from niwaki.compression.run import RECORD, Run, check_apart, check_free, check_space, partial_of, provenance
from niwaki.config.events import Report
from niwaki.errors import CheckpointError, InputError, unknown
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.files import copy_file, file_sha256, write_text

FORMATS = {
    "compressed-tensors": "niwaki.exporters.compressed_tensors",
    "gguf": "niwaki.exporters.gguf_file",
    "onnx": "niwaki.exporters.onnx_graph",
}
WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data")


class ExportPlan(Protocol):
    """Plan of one export. `nbytes` is about its size on the disk."""

    @property
    def nbytes(self) -> int: ...


class Exporter(Protocol):
    """Interface of the module of a format."""

    def check(self, checkpoint: Checkpoint, record: Mapping[str, Any] | None, type: str | None) -> ExportPlan:
        """Plan the export of this checkpoint. `record` is its run.json, or None if niwaki did not make it.

        Raises InputError for a checkpoint, or a `type` of weights, that the format cannot hold.
        """

    def write(self, checkpoint: Checkpoint, plan: Any, folder: Path, report: Report) -> dict[str, Any]:
        """Write the files of the export to `folder`. `plan` comes from `check`. Return the fields of its record."""


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
    exporter = _exporter(to)
    dest = Path(dest).absolute()
    check_free(dest, partial_of(dest), resume=False, overwrite=overwrite)
    checkpoint = Checkpoint.open(out)
    before = _record_of(checkpoint.folder)
    plan = exporter.check(checkpoint, before, type)
    check_apart(checkpoint.folder, dest)
    check_space(dest, plan.nbytes)
    with Run(dest, {"export": to}, resume=False, overwrite=overwrite) as run:

        def tell(event: str, **fields: Any) -> None:
            run.event(event, **fields)
            if report is not None:
                report(event, **fields)

        try:
            written = exporter.write(checkpoint, plan, run.folder, tell)
            record = before or {"model": {"source": str(checkpoint.folder), "bytes": checkpoint.nbytes}}
            record |= {"export": _export_record(to, checkpoint.folder, run.folder, written, started)}
            lines = checkpoint.folder / RECORD / "blocks.jsonl"
            if lines.is_file():
                copy_file(lines, run.folder / RECORD / "blocks.jsonl")
            write_text(run.folder / "README.md", export_card(record))
            write_text(run.folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except BaseException:
            run.discard()
            raise
        run.complete()
    return record


def _exporter(to: str) -> Exporter:
    if to not in FORMATS:
        raise InputError(unknown("export format", to, FORMATS))
    try:
        return cast(Exporter, importlib.import_module(FORMATS[to]))
    except ImportError as error:
        name = f"{error.name}: pip install {error.name} (or the extra `export`)"
        raise InputError(f"exporting to {to} needs the package {name}") from error


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Read the run.json of a result of niwaki, None for another folder. Raises CheckpointError if it is unreadable."""
    path = folder / RECORD / "run.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: expected what `niwaki compress` wrote") from error
    return record


def _export_record(to: str, source: Path, folder: Path, written: dict[str, Any], started: float) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    return {
        "to": to,
        "source": str(source),
        **provenance(),
        **written,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {path.name: file_sha256(path) for path in files},
        "seconds": round(time.perf_counter() - started, 2),
    }
