"""Records of a result: run.json, the lines of blocks.jsonl, and the entries of the journal.

All are frozen models, with one reader and one writer each. Nothing here needs torch. A field that a result does not
have is None and is not written. Results of version 0.1 have no `format` and some old names; they are read as well.

    OUT/niwaki/run.json       a `RunRecord`: recipe, versions, hashes, result; or another `Record`
    OUT/niwaki/blocks.jsonl   a `MatrixRecord` per line

    record = read_run(Path("OUT"))
    worst = max(read_lines(Path("OUT")), key=lambda line: line.error or 0)
"""

import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, ValidationError, field_serializer, model_validator

from niwaki.compression.source_records import CalibrationRecord, Frozen, KeptRecord, ModelRecord, UnreadRecord
from niwaki.config.recipe import Recipe, current_fields
from niwaki.config.targets import Bits, parse_target
from niwaki.errors import CheckpointError, InputError, format_problem
from niwaki.model.files import write_text
from niwaki.version import __version__

FORMAT = 1
RECORD = "niwaki"  # folder of the records inside a result
RUN, LINES = "run.json", "blocks.jsonl"


class MatrixRecord(Frozen):
    """Line of blocks.jsonl: one matrix, how it is stored, and its errors.

    Errors are relative squared errors of outputs. `error_before_update` is the error if weights are only removed,
    `error` that of the final matrix; both are None without calibration text. `stored` is the description of a packed
    matrix. Some methods add fields, for example `kept_groups`, the heads or neurons that a sliced matrix keeps.
    """

    block: int
    matrix: str
    shape: list[int]
    target: str
    kind: str
    zeros: int = 0
    zeros_frac: float
    bytes: int
    bits: float
    tokens: int = 0
    error_before_update: float | None
    error: float | None
    note: str = ""
    stored: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    block_error: float | None = None
    drift: float | None = None
    method_bits: float | None = None
    method_bytes: int | None = None
    kept_groups: list[int] | None = None
    row_zeros: list[int] | None = None

    @property
    def weights(self) -> int:
        """Return the number of weights that the file has a place for."""
        return math.prod(self.shape)

    @property
    def detail(self) -> dict[str, Any]:
        """Return the fields that the method added."""
        own = {name: getattr(self, name) for name in ("method_bits", "method_bytes", "kept_groups", "row_zeros")}
        return {name: value for name, value in own.items() if value is not None} | (self.model_extra or {})


class ModuleRecord(Frozen):
    """Embeddings or head that became codes. `error`: relative squared error of the weights, None if it is unknown."""

    module: str
    shape: list[int]
    bytes: int
    bits: float
    error: float | None
    stored: dict[str, Any] | None = None

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)


class JournalEntry(Frozen):
    """Finished part of a run: a shard with its records, or the numbers of a scan or a candidate that a resume needs.

    A block that was removed has lines and no shard. `loss` is that of a candidate, `found` what a predictor learned.
    The values of a scan are a field with its name.
    """

    shard: str | None = None
    sha256: str = ""
    bytes: int = 0
    tensors: list[str] = []
    tensor_bytes: int = 0
    lines: Sequence[MatrixRecord | ModuleRecord] | None = None
    loss: float | None = None
    found: dict[str, Any] | None = None

    @property
    def matrices(self) -> list[MatrixRecord]:
        """Return the records of the matrices of a block."""
        return [line for line in self.lines or () if isinstance(line, MatrixRecord)]

    @property
    def modules(self) -> list[ModuleRecord]:
        """Return the records of embeddings and head."""
        return [line for line in self.lines or () if isinstance(line, ModuleRecord)]

    def scanned(self, name: str) -> list[Any]:
        """Return the values of the scan `name`, one per block."""
        values: list[Any] = (self.model_extra or {})[name]
        return values


class ShapeRecord(Frozen):
    """Shape of a pruned model: neurons and heads per block (a list if blocks differ), and the removed blocks."""

    neurons: int | list[int]
    heads: int | list[int]
    dropped: list[int] = []


class CandidateRecord(ShapeRecord):
    """Shape that was tried, and its loss."""

    loss: float


class AllocationRecord(Frozen):
    """Numbers that decided the target of each block."""

    target_bits: float | None = None
    outlier_shares: list[float] | None = None
    sensitivities: list[Any] | None = None
    kept_blocks: list[int] | None = None
    rest_bits: float | None = None
    shape: ShapeRecord | None = None
    removed_frac: float = 0
    cut: bool = False
    influence: list[float] | None = None
    trials: list[CandidateRecord] = []


class NamedBlocksRecord(Frozen):
    """Sums over the matrices of the blocks that a run was asked to compress (recipe field `blocks`)."""

    blocks: list[int]
    matrices: int
    weights: int
    zeros_frac: float
    bits: float
    method_bits: float | None = None
    packed: int = 0


class ResultRecord(Frozen):
    """Sums over the matrices of a result, and its files. `bits` and `bytes` count all scales and metadata.

    A run that was asked for some blocks still counts the matrices of all blocks, as they are stored. The sums over the
    blocks that it compressed are `named`.
    """

    weights: int
    zeros_frac: float
    bits: float
    method_bits: float | None = None
    packed: int = 0
    sparse: dict[str, int] = {}
    sparse_values: dict[str, int] = {}
    matrices: int
    embeddings_bits: float | None = Field(default=None, validation_alias=AliasChoices("embeddings_bits", "ends_bits"))
    embeddings: list[ModuleRecord] = Field(default=[], validation_alias=AliasChoices("embeddings", "ends"))
    notes: list[str] = []
    bytes: int
    sha256: dict[str, str] = {}
    predictor: dict[str, Any] | None = None
    named: NamedBlocksRecord | None = None


class ExportRecord(Frozen):
    """Files that an export wrote."""

    to: str
    niwaki: str = ""
    format: str = ""
    bits: float = 0
    bytes: int
    sha256: dict[str, str]
    type: str | None = None


class Record(Frozen):
    """run.json of any folder that niwaki wrote: versions, date and command, and the export if it is one.

    `files`: SHA-256 of the files beside the weights, None in results before version 0.2. `pending`: the hashes before
    a replacement that is in progress, "" for a new file (see `verify.replace_files`).
    """

    format: int = 0
    niwaki: str = ""
    versions: dict[str, str] = {}
    python: str = ""
    date: str = ""
    command: list[str] = []
    model: ModelRecord | None = None
    export: ExportRecord | None = None
    files: dict[str, str] | None = None
    pending: dict[str, str] = {}

    @property
    def file_hashes(self) -> Mapping[str, str] | None:
        """Return the SHA-256 of the weight files by name, None if the record has none."""
        return None if self.export is None else self.export.sha256

    def with_export(self, export: ExportRecord) -> Self:
        """Return the record of an export of this model."""
        return self.model_copy(update={"format": FORMAT, "export": export})


class RecoveryResult(Frozen):
    """Losses before and after a recovery, its steps, and the zeros of plain matrices. Packed ones add `packed_bits`."""

    heldout_loss_before: float
    heldout_loss: float
    matrices: int
    zeros: int
    zeros_frac: float
    steps: int = 0
    sha256: dict[str, str]


class RecoveryRecord(Record):
    """run.json of a recovery. `compressed_from` is the run.json of the model that it began with."""

    model: ModelRecord
    fingerprint: dict[str, str] = {}
    recover: dict[str, Any]
    compressed_from: dict[str, Any] | None = None
    result: RecoveryResult
    device: str = ""
    seconds: float = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0

    @property
    def file_hashes(self) -> Mapping[str, str]:
        """Return the SHA-256 of the weight files by name."""
        return super().file_hashes or self.result.sha256


class RunRecord(Record):
    """run.json of a compression: everything that is needed to make it again, and its result.

    `recipe` is resolved. A recipe that begins with a structured method has the record of that stage in `stages`.
    `earlier`: the runs that made the source, if niwaki made it, the first one first. Their blocks may live on here.
    `dense_source`: the model before them, if the method learned from the dense model.
    """

    model: ModelRecord
    fingerprint: dict[str, str] = {}
    recipe: Recipe
    options: dict[str, dict[str, Any]] = {}
    dense_stream: bool = False
    dense_source: str | None = None
    allocation: AllocationRecord = AllocationRecord()
    calibration: CalibrationRecord = CalibrationRecord()
    result: ResultRecord
    kept_dense: KeptRecord | None = None
    unread: UnreadRecord | None = None
    towers: dict[str, int] = {}  # bytes by module of what text alone does not run, copied unchanged
    device: str = ""
    seconds: float = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    stages: list["RunRecord"] = []
    experts: dict[str, list[int]] = {}  # calibration tokens of every expert of a mixture, by block
    earlier: list["RunRecord | RecoveryRecord"] = []

    @model_validator(mode="before")
    @classmethod
    def _as_made(cls, value: Any) -> Any:
        """Give the recipe its present names. Earlier versions fed no beginning-of-text token, and did not say so."""
        if not isinstance(value, dict) or not isinstance(value.get("recipe"), dict):
            return value
        recipe, done = current_fields(value["recipe"]), value.get("calibration")
        if isinstance(given := recipe.get("calibration"), dict) and not (isinstance(done, dict) and "bos" in done):
            recipe["calibration"] = {**given, "bos": "off"}
        return {**value, "recipe": recipe}

    @field_serializer("recipe")
    def _whole(self, recipe: Recipe) -> dict[str, Any]:
        content = recipe.dump()
        if "bos" not in self.calibration.model_fields_set:
            content["calibration"].pop("bos", None)
        return content

    @property
    def file_hashes(self) -> Mapping[str, str]:
        """Return the SHA-256 of the weight files by name."""
        return super().file_hashes or self.result.sha256

    @property
    def origin(self) -> ModelRecord:
        """Return the model before the first of all runs."""
        return self.earlier[0].model if self.earlier else self.model

    @property
    def shaping(self) -> AllocationRecord | None:
        """Return the allocation of the stage that changed the shape, None if no stage did."""
        first = (self.stages or [self])[0].allocation
        return first if first.shape is not None else None

    @property
    def asks_for_bits(self) -> bool:
        """Return whether the last stage made codes and no zeros besides. A code that is 0 is not a pruned weight."""
        target = self.recipe.target
        if target is None:
            return True
        return isinstance(parse_target(target.partition("+")[2] if self.stages else target), Bits)


def provenance(*packages: str) -> dict[str, Any]:
    """Return the first fields of a run.json: date, command, and versions of niwaki, Python and `packages`."""
    return {
        "niwaki": __version__,
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def read_record(folder: Path) -> Record | None:
    """Return the run.json of a folder, None if there is none. Raises CheckpointError if it cannot be read."""
    path = folder / RECORD / RUN
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if problem := format_problem(content.get("format", 0), range(FORMAT + 1)):
            raise CheckpointError(f"{path} {problem}")
        kind = RecoveryRecord if "recover" in content else RunRecord if "recipe" in content else Record
        return kind.model_validate(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_problem(error)}): compress again") from error


def read_run(folder: Path) -> RunRecord:
    """Return the run.json of a compression.

    Raises InputError if there is none, or the folder holds something else; CheckpointError if it cannot be read.
    """
    record = read_record(folder)
    if record is None:
        path = folder / RECORD / RUN
        raise InputError(f"{folder} is not a result of niwaki: expected {path}; give the OUT of `niwaki compress`")
    if not isinstance(record, RunRecord):
        raise InputError(f"{folder} holds no compression: give the OUT of `niwaki compress`")
    return record


def write_record(folder: Path, record: Record) -> None:
    """Write run.json."""
    write_text(folder / RECORD / RUN, json.dumps(record.dump(), indent=2, ensure_ascii=False) + "\n")


def read_lines(folder: Path) -> list[MatrixRecord]:
    """Return the lines of blocks.jsonl; none for a result that changed no matrix.

    Raises CheckpointError if the file is missing or is not a record of niwaki.
    """
    path = folder / RECORD / LINES
    try:
        text = path.read_text(encoding="utf-8")
        return [MatrixRecord.model_validate_json(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a record of niwaki ({first_problem(error)}): compress again, or remove it"
        ) from error


def write_lines(folder: Path, lines: Iterable[MatrixRecord]) -> None:
    """Write blocks.jsonl."""
    write_text(folder / RECORD / LINES, "".join(json.dumps(line.dump()) + "\n" for line in lines))


def first_problem(error: Exception) -> str:
    """Return the first problem of a record in one line."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        return f"{place}: {problem['msg']}" if place else problem["msg"]
    return str(error)
