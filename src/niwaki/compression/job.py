"""The job of one stage: from a resolved stage to a finished result folder.

`prepare` checks everything that can be wrong with the input and returns a `Job`, before the first file is written.
`run` takes it to run.json, or resumes what an earlier run finished. What differs between the kinds of methods is given
to `walk_model`: how targets are allocated, and in which form blocks are stored.

    decoder = open_decoder("MODEL", torch.device("cuda"))
    (stage,) = resolve(recipe, decoder).stages
    record = run(prepare(decoder, stage, request), matrix_job)
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from niwaki.compression.allocation import Targets
from niwaki.compression.backward import squared_gradients
from niwaki.compression.bos_loss import warn_without_bos
from niwaki.compression.carried import Carried, earlier_runs, open_origin
from niwaki.compression.embeddings import TensorNames, embeddings_to_pack
from niwaki.compression.experts import experts_record
from niwaki.compression.model_card import model_card
from niwaki.compression.outer_files import OuterFiles
from niwaki.compression.places import check_apart, partial_of, resumable
from niwaki.compression.plan.planner import check_possible
from niwaki.compression.plan.sizes import towers_record
from niwaki.compression.resolve import ResolvedStage
from niwaki.compression.result_folder import ResultFolder, Writer, fingerprint, finished_record, stored_fingerprint
from niwaki.compression.run_record import (
    FORMAT,
    RECORD,
    JournalEntry,
    MatrixRecord,
    ResultRecord,
    RunRecord,
    provenance,
    write_lines,
    write_record,
)
from niwaki.compression.stages import FirstStage, merged_record
from niwaki.compression.totals import packed_modules, result_of, shard_index
from niwaki.compression.verify import hashed_files
from niwaki.compression.walk import WalkPlan, compress_blocks, forward
from niwaki.config.events import Event, Report
from niwaki.config.recipe import Recipe
from niwaki.data.stream import HeldOut, Stream, default_batch_tokens
from niwaki.data.texts import CalibrationWindows, calibration_record, windows_for
from niwaki.errors import InputError, NumericalError
from niwaki.formats.packed import decode_shard
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import STORED_DTYPES, Checkpoint, quantization, quantized_config
from niwaki.model.decoder import Block, Decoder
from niwaki.model.device import peak_rss_bytes
from niwaki.model.files import write_text
from niwaki.model.shards import INDEX
from niwaki.runtime.adapter import read_lineage

SCAN_PART = "allocation"  # name of the scan in the journal

Value = TypeVar("Value")


@dataclass(frozen=True)
class Request:
    """Arguments of a compression beside model and recipe. `began`: seconds of the clock that measures the job."""

    out: Path
    resume: bool
    overwrite: bool
    report: Report
    began: float


@dataclass(frozen=True)
class Job:
    """One stage that is ready to run: everything was checked, nothing is written.

    `recipe` names the device and the batch that are used. `calibration` is None if nothing needs windows.
    `packed_embeddings` are the modules outside the blocks that become codes. `first` is the stage before
    this one. `origin` is the dense model before earlier runs that made the source, if the method learns from it.
    """

    request: Request
    stage: ResolvedStage
    recipe: Recipe
    decoder: Decoder
    calibration: CalibrationWindows | None
    packed_embeddings: TensorNames
    first: FirstStage | None = None
    origin: Decoder | None = None

    @property
    def windows_ST(self) -> Tensor | None:
        """Return the calibration windows, None if nothing needs any."""
        return None if self.calibration is None else self.calibration.ids_ST

    @property
    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint of the source model."""
        return self.decoder.checkpoint

    @property
    def outer_files(self) -> OuterFiles:
        """Return the tensors outside the blocks, by file."""
        return OuterFiles.of(self.decoder, self.packed_embeddings, self.recipe)

    def leaves(self, index: int) -> bool:
        """Return whether the recipe leaves a block as it is."""
        return self.recipe.blocks is not None and index not in self.recipe.blocks


class BlockStorage(Protocol):
    """Form in which the blocks of a result are stored."""

    @property
    def shard_names(self) -> list[str]:
        """Return the file of every block, then those of the tensors outside the blocks, and of the copied ones."""

    def copied(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return new name → name of the copied tensors, as far as they are left."""

    def tensors(self, block: Block, lines: list[MatrixRecord]) -> dict[str, Tensor]:
        """Return the content of the file of a block by name; {} if it has no file."""

    def read(self, folder: ResultFolder, index: int) -> dict[str, Tensor]:
        """Return a finished block at full size as plain weights."""

    def write_config(self, folder: ResultFolder) -> None:
        """Write config.json if it differs from that of the source."""

    def check(self, folder: ResultFolder, stream: Stream | None) -> None:
        """Check the finished folder; `stream` holds the hidden states after the last block."""


@dataclass(frozen=True)
class Allocation:
    """Final targets of all matrices, the numbers that decided them, and the form in which blocks are stored.

    `ResolvedStage.targets` are provisional: the calibration text may decide others.
    """

    targets: Targets
    numbers: dict[str, Any]
    storage: BlockStorage


Allocate = Callable[[Job, ResultFolder, Report], Allocation]


def check_and_choose_embeddings(decoder: Decoder, stage: ResolvedStage, request: Request) -> TensorNames:
    """Raise an error for memory, disk or embeddings with which a stage cannot run; return the embeddings to pack."""
    check_apart(decoder.checkpoint.folder, request.out)
    check_possible(decoder, stage, request.out, request.report)
    return embeddings_to_pack(stage.recipe, stage.target, decoder)


def prepare(decoder: Decoder, stage: ResolvedStage, request: Request, first: FirstStage | None = None) -> Job:
    """Check a stage and return its job, with the calibration windows; those of the first stage serve the second."""
    packed_embeddings = check_and_choose_embeddings(decoder, stage, request)
    batch_tokens = stage.recipe.batch_tokens or default_batch_tokens(decoder.device)
    recipe = stage.recipe.model_copy(update={"device": str(decoder.device), "batch_tokens": batch_tokens})
    learns = stage.dense_stream or stage.needs.gradient or (stage.windows and recipe.calibration.writes_text)
    origin = open_origin(decoder, request.report) if recipe.blocks is not None and learns else None
    calibration = first.calibration if first else _windows(origin or decoder, stage, request.report)
    if calibration is not None and not first and not request.resume:
        warn_without_bos(decoder, calibration.ids_ST, calibration.bos, request.report)
    return Job(request, stage, recipe, decoder, calibration, packed_embeddings, first, origin)


def run(job: Job, execute: Callable[[Job, ResultFolder, Report], RunRecord]) -> RunRecord:
    """Run a job, or resume what an earlier run finished; return its record.

    `execute(job, folder, report)` does the work of its kind. Its events also go to events.jsonl.
    """
    request = job.request
    hashes = fingerprint_of(job, stored_fingerprint(request.out) if request.resume else {})
    fresh = request.resume and not resumable(partial_of(request.out))
    if fresh and (record := finished_record(request.out, hashes, overwrite=request.overwrite)):
        request.report(Event.COMPLETE, out=str(request.out))
        return record
    with ResultFolder(request.out, hashes, resume=request.resume, overwrite=request.overwrite) as folder:

        def report(event: str, **fields: Any) -> None:
            folder.event(event, **fields)
            request.report(event, **fields)

        try:
            report(Event.START, blocks=len(job.decoder), method=job.recipe.method, target=str(job.stage.target))
            if job.decoder.kept.weights and job.first is None:
                report(Event.WARNING, message=job.decoder.kept.message())
            for text in job.decoder.warnings(drop_unused=job.recipe.drop_unused):
                report(Event.WARNING, message=text)
            return execute(job, folder, report)
        except (InputError, NumericalError):
            folder.discard()  # no later attempt can use what is there
            raise


def walk_model(job: Job, folder: ResultFolder, report: Report, allocate: Allocate) -> RunRecord:
    """Allocate targets, compress block after block on the calibration windows, and finish the folder."""
    decoder, stage = job.decoder, job.stage
    if decoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(decoder.device)
    with Writer(folder, report, 2 if decoder.device.type == "cuda" else 1) as writer:
        allocation = allocate(job, folder, report)
        storage, shard_names = allocation.storage, allocation.storage.shard_names
        outer = job.outer_files
        outer.write(folder, writer, storage.shard_names[len(decoder) :], storage.copied)
        # A dense stream starts from the dense embeddings, so it is made before the stored ones replace them.
        dense = windows_stream(job, folder, "dense", decoder=job.origin) if stage.dense_stream else None
        judged_ST = _judging_windows(job)
        judge_dense = None
        if judged_ST is not None and stage.needs.dense:
            judge_dense = windows_stream(job, folder, "judge-dense", judged_ST, decoder=job.origin)
        if job.packed_embeddings:
            writer.flush()
            decoder.load_outer(outer.stored(folder))
        stream = windows_stream(job, folder, "compressed", learn_batches=stage.needs.learn_batches)
        held = None
        if judged_ST is not None:
            judge = windows_stream(job, folder, "judge", judged_ST, learn_batches=stage.needs.learn_batches)
            assert judge is not None
            held = HeldOut(judge, judge_dense)
        gradients = _gradients(job, folder, report)
        for model in filter(None, (decoder, job.origin)):
            model.release_outer()
        finished = {
            index: partial(storage.read, folder, index)
            for index in range(len(decoder))
            if block_part(index) in folder.finished
        }

        carried = None if job.recipe.blocks is None else Carried.of(decoder)

        def save(block: Block, lines: list[MatrixRecord]) -> None:
            if carried is not None and job.leaves(block.index):
                names = {name: name for name in decoder.disk_names(block.index)}
                part, shard = block_part(block.index), shard_names[block.index]
                writer.copy(part, shard, job.checkpoint, names, carried.lines(block))
            elif tensors := storage.tensors(block, lines):
                writer.write(block_part(block.index), shard_names[block.index], tensors, lines)
            else:
                folder.finish_part(block_part(block.index), JournalEntry(lines=lines))

        last = None if job.recipe.blocks is None else max(job.recipe.blocks)
        plan = WalkPlan(
            stage.steps, allocation.targets, job.recipe.seed, job.recipe.pack, gradients=gradients, last=last,
            expert_tokens=job.recipe.expert_tokens,
        )  # fmt: skip
        compress_blocks(
            decoder, plan, stream, dense, save=save, report=report, finished=finished, origin=job.origin, held=held
        )
    return _finish_walk(job, folder, report, allocation, stream)


def finish(
    job: Job, folder: ResultFolder, report: Report, record: RunRecord, check: Callable[[], None] | None = None
) -> None:
    """Write model card and run.json, check the folder and the source, and move the folder to its place."""
    write_text(folder.path / "README.md", model_card(record))
    write_record(folder.path, record)
    if check is not None:
        check()
    job.checkpoint.log.check()
    report(Event.DONE, seconds=record.seconds, out=str(job.request.out))
    folder.complete()


def record_of(job: Job, folder: ResultFolder, result: ResultRecord, allocation: dict[str, Any]) -> RunRecord:
    """Return the record of a run: everything that is needed to make the result again."""
    checkpoint, device = job.checkpoint, job.decoder.device
    checkpoint.log.check()
    merged = read_lineage(checkpoint.folder)
    cuda = device.type == "cuda"
    fields = {
        "format": FORMAT,
        **provenance("torch", "transformers", "safetensors"),
        "model": {
            **({"source": merged["source"], "adapter": merged} if merged else checkpoint.source),
            "type": checkpoint.config.model_type,
            "bytes": checkpoint.nbytes,
            "files": checkpoint.file_hashes(),
        },
        "fingerprint": folder.fingerprint,
        "recipe": job.recipe,
        "options": {step.name: vars(step.config) for step in job.stage.steps},
        "dense_stream": job.stage.dense_stream,
        "allocation": allocation,
        "calibration": calibration_record(job.calibration),
        "result": result,
        "files": hashed_files(folder.path),
        **({"kept_dense": job.decoder.kept.record()} if job.decoder.kept.weights else {}),
        **({"unread": unread.record(kept=not job.recipe.drop_unused)} if (unread := job.decoder.unread).names else {}),
        **({"towers": towers_record(job.decoder)} if job.decoder.anatomy.idle else {}),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "seconds": round(time.perf_counter() - job.request.began, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
        **({} if job.origin is None else {"dense_source": str(job.origin.checkpoint.folder)}),
        **({"earlier": before} if job.first is None and (before := earlier_runs(checkpoint.folder)) else {}),
    }
    record = RunRecord.model_validate(fields)
    return record if job.first is None else merged_record(record, job.first)


def windows_stream(
    job: Job,
    folder: ResultFolder,
    name: str,
    ids_ST: Tensor | None = None,
    *,
    learn_batches: frozenset[int] = frozenset(),
    decoder: Decoder | None = None,
) -> Stream | None:
    """Return the windows `ids_ST`, or all of the job, before the first block; None without calibration.

    `decoder` embeds them, by default that of the job.
    """
    ids_ST = job.windows_ST if ids_ST is None else ids_ST
    if ids_ST is None:
        return None
    return Stream(
        decoder or job.decoder,
        ids_ST,
        batch_tokens=job.recipe.batch_tokens,
        activation_bytes=job.recipe.activation_bytes,
        folder=folder.path / RECORD / "journal",
        name=name,
        learn_batches=learn_batches,
    )


def scan(
    job: Job,
    folder: ResultFolder,
    field: str,
    measure: Callable[[Block, Stream], Value],
    report: Report,
    *,
    advances: bool = False,
) -> list[Value]:
    """Return what `measure` gives for every dense block at its own inputs.

    The journal keeps the values as `field` of its one entry "allocation": a job has at most one scan. `advances`:
    `measure` moves the stream past the block itself.
    """
    if SCAN_PART not in folder.finished:
        stream = windows_stream(job, folder, "scan")
        assert stream is not None, "what scans asks for windows"
        measured: list[Value] = []

        def visit(block: Block) -> None:
            measured.append(measure(block, stream))
            report(Event.SCAN, index=block.index, of=len(job.decoder))

        forward(job.decoder, [] if advances else [stream], visit)
        folder.finish_part(SCAN_PART, JournalEntry.model_validate({field: measured}))
    return folder.finished[SCAN_PART].scanned(field)


def block_part(index: int) -> str:
    """Return the name of a block's part in the journal."""
    return f"block-{index:05d}"


@dataclass(frozen=True)
class FullBlocks:
    """Storage of blocks that keep their shape."""

    job: Job

    @property
    def shard_names(self) -> list[str]:
        """Return one file per block, then all other tensors in files of about 1 GiB, the copied ones last."""
        count = len(self.job.decoder) + len(self.job.outer_files)
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def copied(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the names as they are: all are left."""
        return {name: name for name in names}

    def tensors(self, block: Block, lines: list[MatrixRecord]) -> dict[str, Tensor]:
        """Return the content of the file of a block by name."""
        return self.job.decoder.disk_tensors(block)

    def read(self, folder: ResultFolder, index: int) -> dict[str, Tensor]:
        """Return a finished block as plain weights, in the dtype of the checkpoint."""
        entry, checkpoint = folder.finished[block_part(index)], self.job.checkpoint
        modules = packed_modules([entry], self.job.decoder.disk_module)
        dtypes = {STORED_DTYPES[checkpoint.tensors[module + WEIGHT].dtype] for module in modules}
        assert len(dtypes) <= 1, "the matrices of one block share a dtype"
        return decode_shard(folder.path / str(entry.shard), modules, dtypes.pop() if dtypes else checkpoint.dtype)

    def write_config(self, folder: ResultFolder) -> None:
        """Keep the config of the source."""

    def check(self, folder: ResultFolder, stream: Stream | None) -> None:
        """Accept the folder: its shapes are those of the source."""


def _judging_windows(job: Job) -> Tensor | None:
    """Return the windows that learning is judged by, None if they are some of the calibration, or no step learns."""
    held = None if job.calibration is None else job.calibration.held
    return held.ids_ST if held is not None and job.stage.needs.windows else None


def _windows(decoder: Decoder, stage: ResolvedStage, report: Report) -> CalibrationWindows | None:
    """Return the calibration windows of a stage; None if it needs none."""
    if not stage.windows:
        return None
    return windows_for(stage.recipe.calibration, decoder, seed=stage.recipe.seed, report=report)


def _gradients(job: Job, folder: ResultFolder, report: Report) -> Callable[[int], Mapping[str, Tensor]]:
    """Return a reader of the squared gradients of the dense model by block, if a method needs them."""
    if not job.stage.needs.gradient:
        return lambda index: {}
    assert job.windows_ST is not None, "gradients are needs of windows"
    return squared_gradients(folder, job.origin or job.decoder, job.windows_ST, job.recipe.activation_bytes, report)


def _finish_walk(
    job: Job, folder: ResultFolder, report: Report, allocation: Allocation, stream: Stream | None
) -> RunRecord:
    """Write everything beside the shards and put the folder in its place."""
    parts = [entry for name, entry in sorted(folder.finished.items()) if entry.lines is not None]
    job.checkpoint.copy_aux_files(folder.path)
    if modules := packed_modules(parts, job.decoder.disk_module):
        stored = quantization(modules, job.checkpoint.shapes)
        write_text(folder.path / "config.json", quantized_config(job.checkpoint.config_content(), stored))
    allocation.storage.write_config(folder)
    write_text(folder.path / INDEX, json.dumps(shard_index(parts), indent=2) + "\n")
    lines = [line for entry in parts for line in entry.matrices]
    write_lines(folder.path, lines)
    made = [line for line in lines if job.stage.needs.anything and not job.leaves(line.block)]
    experts = experts_record(job.decoder.anatomy, made, report)
    record = record_of(job, folder, result_of(parts, job.recipe.blocks), allocation.numbers).model_copy(update=experts)
    finish(job, folder, report, record, lambda: allocation.storage.check(folder, stream))
    return record


def fingerprint_of(job: Job, like: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of what decides the bytes of the result of a job, in the form of the fingerprint `like`."""
    hashes = fingerprint(
        job.checkpoint,
        "none" if job.calibration is None else job.calibration.sha256,
        job.recipe.dump(),
        dense_stream=job.stage.dense_stream,
        threads=torch.get_num_threads() if job.decoder.device.type == "cpu" else None,
        like=like,
    )
    if job.origin is not None:
        headers = json.dumps(job.origin.checkpoint.file_hashes(), sort_keys=True)
        hashes["dense model"] = hashlib.sha256(headers.encode()).hexdigest()
    return hashes
