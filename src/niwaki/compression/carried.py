"""Parts of a source that a run takes over unchanged: records of packed and dense matrices, and of the runs before.

A run that is asked for some blocks copies the others byte for byte, codes as codes. A source that niwaki made has a
line for each of their matrices, which stays as it is. For any other matrix the line says what the file holds.

    carried = Carried.of(decoder)
    lines = carried.lines(block)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.compression.run_record import (
    LINES,
    RECORD,
    MatrixRecord,
    ModuleRecord,
    RecoveryRecord,
    RunRecord,
    read_lines,
    read_record,
)
from niwaki.config.events import Event, Report
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder

AS_IT_WAS = "as it was"  # target of a matrix that a run does not compress
DENSE = "dense"  # kind of a matrix that no run compressed


@dataclass(frozen=True)
class Carried:
    """Records of the source model of a run: lines by block and matrix, and modules outside the blocks by name."""

    decoder: Decoder
    known: Mapping[tuple[int, str], MatrixRecord]
    modules: Mapping[str, ModuleRecord]

    @classmethod
    def of(cls, decoder: Decoder) -> "Carried":
        """Read the records of the source, as far as it has any."""
        folder = decoder.checkpoint.folder
        runs = [run for run in earlier_runs(folder) if isinstance(run, RunRecord)]
        modules = {line.module: line for line in (runs[-1].result.embeddings if runs else ())}
        has_lines = isinstance(read_record(folder), RunRecord) and (folder / RECORD / LINES).is_file()
        # A method that removes blocks numbers its lines as they were before.
        if not has_lines or runs[-1].allocation.shape is not None:
            return cls(decoder, {}, modules)
        return cls(decoder, {(line.block, line.matrix): line for line in read_lines(folder)}, modules)

    def lines(self, block: Block) -> list[MatrixRecord]:
        """Return a record of every matrix of a block that is copied."""
        packed, checkpoint = self.decoder.packed_matrices(block.index), self.decoder.checkpoint
        lines = []
        for name, linear in block.linears.items():
            about = checkpoint.packed.get(packed.get(name, ""))
            line, shape = self.known.get((block.index, name)), [linear.rows, linear.columns]
            if line is None or line.shape != shape or line.stored != about:
                fields = _found(block, name, shape, None if about is None else (about, checkpoint, packed[name]))
                line = MatrixRecord.model_validate(fields)
            lines.append(line)
        return lines

    def outer_lines(self, names: Iterable[str]) -> list[ModuleRecord]:
        """Return a record of each of the tensors `names` outside the blocks that the source holds as codes."""
        checkpoint = self.decoder.checkpoint
        lines = []
        for module in (name.removesuffix(WEIGHT) for name in names):
            if module in checkpoint.packed:
                about, nbytes = checkpoint.packed[module], checkpoint.tensors[module + WEIGHT].nbytes
                shape = list(checkpoint.tensors[module + WEIGHT].shape)
                known = self.modules.get(module)
                fields = {
                    "module": module,
                    "shape": shape,
                    "bytes": nbytes,
                    "bits": 8 * nbytes / math.prod(shape),
                    "error": None if known is None else known.error,
                    "stored": dict(about),
                }
                lines.append(ModuleRecord.model_validate(fields))
        return lines


def earlier_runs(folder: Path) -> list[RunRecord | RecoveryRecord]:
    """Return the records of the runs that made a model, the first one first; none if niwaki did not make it."""
    record = read_record(folder)
    if isinstance(record, RunRecord):
        return _with_earlier(record)
    if not isinstance(record, RecoveryRecord):
        return []
    before = record.compressed_from
    runs = [] if before is None else _with_earlier(RunRecord.model_validate(before))
    return [*runs, record.model_copy(update={"compressed_from": None})]


def open_origin(decoder: Decoder, report: Report) -> Decoder | None:
    """Return the dense model before the first of all runs that made the model of `decoder`, with the same settings.

    Return None if no run made it. If the dense model cannot be read as it was, return None with a warning. The source,
    in which some blocks are compressed, then stands for it.
    """
    runs = earlier_runs(decoder.checkpoint.folder)
    if not runs:
        return None
    problem = _unlike_the_first(runs)
    if not problem:
        checkpoint = Checkpoint.open(runs[0].model.source)
        return Decoder(checkpoint, decoder.device, decoder.dtype, logit_bytes=decoder.logit_bytes)
    message = (
        f"{runs[0].model.source}, the dense model before the first run, {problem}: blocks that earlier runs compressed "
        "count as dense for what this run learns from the dense model"
    )
    report(Event.WARNING, message=message)
    return None


def _unlike_the_first(runs: Sequence[RunRecord | RecoveryRecord]) -> str:
    """Return why the model before the first run cannot stand for what the runs made of it; empty if it can."""
    model = runs[0].model
    if model.adapter is not None or model.rotated is not None:
        return "was merged with an adapter or changed its basis"
    if any(isinstance(run, RunRecord) and run.shaping is not None for run in runs):
        return "had another shape"
    if not Path(model.source).exists():
        return "does not exist any more"
    if model.files and Checkpoint.open(model.source).file_hashes() != model.files:
        return "has changed since then"
    return ""


def _with_earlier(record: RunRecord) -> list[RunRecord | RecoveryRecord]:
    return [*record.earlier, record.model_copy(update={"earlier": []})]


def _found(
    block: Block, name: str, shape: list[int], packed: tuple[Mapping[str, Any], Checkpoint, str] | None
) -> dict[str, Any]:
    """Return the fields of the record of a matrix, from its weights and its stored form alone."""
    weight_OI = block.weight(name)
    count, zeros = math.prod(shape), int((weight_OI == 0).sum())
    nbytes, kind = count * block.storage_dtype(name).itemsize, DENSE
    if packed is not None:
        about, checkpoint, module = packed
        nbytes, kind = checkpoint.tensors[module + WEIGHT].nbytes, "codes" if "parts" in about else "masked"
    fields = {
        "block": block.index,
        "matrix": name,
        "shape": shape,
        "target": AS_IT_WAS,
        "kind": kind,
        "zeros": zeros,
        "zeros_frac": zeros / max(count, 1),
        "bytes": nbytes,
        "bits": 8 * nbytes / max(count, 1),
        "error_before_update": None,
        "error": None,
    }
    return fields if packed is None else fields | {"stored": dict(packed[0])}
