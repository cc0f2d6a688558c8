"""Recovery after the cut: a compressed model learns from its dense model, on text without labels.

The loss is the divergence of its next-token distribution from that of the dense model (`recovery.teacher`). Zeros stay
zero, so 2:4 stays 2:4. Codes stay legal codes: latent numbers are learned in their place, with scales, offsets and
zero points (`recovery.codes`). The result has the form of the compressed model and loads wherever it does.

An eighth of the windows is held out, 64 at most. The state with the lowest loss there is kept, and a recovery that does
not lower it writes nothing. How everything fits in memory is planned before (`recovery.memory`).

    niwaki recover OUT RECOVERED --calibration mine.jsonl --mix self:0.5 --tokens 10M
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from niwaki.compression.bos_loss import warn_without_bos
from niwaki.compression.places import (
    alone_at,
    check_apart,
    check_free,
    drop_unfinished,
    is_result,
    partial_of,
    place_of,
    resumable,
    sweep,
)
from niwaki.compression.recovery.codes import MODES, Mode
from niwaki.compression.recovery.memory import Learning, MemoryPlan, Size, budget, choose
from niwaki.compression.recovery.teacher import Resident, Student, Teacher, Text, cached
from niwaki.compression.recovery.trained import Trained, prepare
from niwaki.compression.recovery.training import HELD_OUT, Schedule, Trainer, Windows, batch_windows, default_rate
from niwaki.compression.recovery.written import packed_bits, stored_dtypes, write_result
from niwaki.compression.result_folder import OTHER_INPUTS, ResultFolder, require_same
from niwaki.compression.run_record import (
    FORMAT,
    Record,
    RecoveryRecord,
    RecoveryResult,
    RunRecord,
    provenance,
    read_lines,
    read_record,
    write_record,
)
from niwaki.compression.verify import hashed_files
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import BosPolicy, Calibration, as_files
from niwaki.config.sources import parse_mix
from niwaki.data.text_amount import fit_seq_len
from niwaki.data.texts import CalibrationWindows, digest, windows_for
from niwaki.errors import InputError, NumericalError, unknown
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import peak_rss_bytes, pick_device
from niwaki.model.logits import vocabulary_of
from niwaki.runtime.contextual.predictor_files import has_shadow
from niwaki.runtime.load import load_checkpoint

SEQ_LEN = 512
TOKENS = 1_000_000
RANK = 16
CPU_MICRO_TOKENS = 512
WIDE_LOGIT_BYTES, WIDE_DEVICE_BYTES = 2**30, 2**36  # of one slice on a device with this free memory
NO_TEACHER = "none"


@dataclass(frozen=True)
class _Inputs:
    """Checked inputs of a recovery: the compressed model, its dense model, and the text."""

    skeleton: Decoder
    dense: Decoder | None
    device: torch.device
    text: CalibrationWindows
    windows: Windows
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Return the hashes of what decides the bytes of the result."""
        dense = {} if self.dense is None else self.dense.checkpoint.fingerprint()
        versions = provenance("torch", "transformers")
        inputs = {f"model ({name})": value for name, value in self.skeleton.checkpoint.fingerprint().items()}
        inputs |= {f"teacher ({name})": value for name, value in dense.items()}
        inputs |= {f"config ({name})": json.dumps(value) for name, value in self.settings.items()}
        inputs["data (tokens)"] = digest(self.windows.ids_ST)
        inputs["versions"] = json.dumps([versions["niwaki"], versions["versions"]])
        inputs["device"] = self.device.type
        inputs["threads"] = str(torch.get_num_threads()) if self.device.type == "cpu" else ""
        return {name: hashlib.sha256(value.encode()).hexdigest() for name, value in inputs.items()}


@alone_at("out")
def recover(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | list[str] | tuple[str, ...] = (),
    mix: Sequence[str] = (),
    teacher: str | Path | None = None,
    field: str = "text",
    tokens: int = TOKENS,
    train: Mode | Literal["auto"] = "auto",
    rank: int = RANK,
    rate: float | None = None,
    batch: int | None = None,
    steps: int | None = None,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    device: str = "auto",
    bos: BosPolicy = "auto",
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train the compressed `model` to compute what its dense model does, and write it to the new folder `out`.

    `tokens` are those that training reads, in steps of `batch` windows [seq_len]; `steps` may stand in their place.
    Text is `data` and `mix` (see `Calibration`), repeated if it is shorter. `teacher` is the dense model, by default
    the one that run.json names; "none" trains on the next token of the text. `train`: weights, low-rank (of `rank`),
    scales, or auto, which is weights if they fit in memory. `rate` is relative to the size of what a step changes;
    by default it follows from the number of steps.

    Returns the content of run.json. Raises InputError for wrong input, and if the held-out loss did not fall: then
    nothing is written. An interrupted run goes on with `resume`.
    """
    started, report = time.perf_counter(), report or silent
    _check_numbers(tokens, rank, rate, batch, steps, train)
    out = place_of(out)
    check_free(out, resume=resume, overwrite=overwrite)
    checkpoint = Checkpoint.open(model)
    check_apart(checkpoint.folder, out)
    settings = {"tokens": tokens, "train": train, "rank": rank, "rate": rate, "batch": batch, "steps": steps}
    calibration = {"files": as_files(data), "field": field, "mix": tuple(mix), "bos": bos, "seq_len": seq_len}
    inputs = _read(checkpoint, teacher, settings, calibration, seed, pick_device(device), report)
    if inputs.dense is not None:
        check_apart(inputs.dense.checkpoint.folder, out)
    record = _finished(out, inputs.fingerprint, resume=resume, overwrite=overwrite)
    if record is not None:
        report(Event.COMPLETE, out=str(out))
    else:
        record = _make(inputs, out, resume, overwrite, report, started)
    sweep(out)
    return record.dump()


def _make(
    inputs: _Inputs, out: Path, resume: bool, overwrite: bool, report: Report, started: float
) -> RecoveryRecord:  # fmt: skip
    """Train in the working folder, and move it to OUT."""
    checkpoint = inputs.skeleton.checkpoint
    if overwrite and not resume:
        drop_unfinished(out, keep_source=False)
    if not resume:
        reader = inputs.dense or Decoder(checkpoint, inputs.device)
        warn_without_bos(reader, inputs.text.ids_ST, inputs.text.bos, report)
    with ResultFolder(out, inputs.fingerprint, resume=resume, overwrite=overwrite) as folder:
        try:
            record = _run(inputs, folder, report, started)
            for source in (inputs.skeleton, inputs.dense):
                if source is not None:
                    source.checkpoint.log.check()
        except (InputError, NumericalError):
            folder.discard()  # no later attempt can use what is there
            raise
        report(Event.DONE, seconds=record.seconds, out=str(out))
        folder.complete()
    return record


def dense_model_of(folder: Path) -> str:
    """Return the dense model of a result, as run.json names it.

    Raises InputError if there is none any more, if it has changed, or if only a merge made it.
    """
    record, step = read_record(folder), "give the dense model: --teacher DENSE (or --teacher none to train on text)"
    while isinstance(record, RecoveryRecord):
        if source := (record.recover.get("teacher") or {}).get("source"):
            return str(source)
        record = None if record.compressed_from is None else RunRecord.model_validate(record.compressed_from)
    if not isinstance(record, RunRecord):
        raise InputError(f"{folder} does not say which dense model it was made from: {step}")
    model = record.origin
    if model.adapter is not None:
        raise InputError(f"{folder} was made from a model with an adapter merged into it: {step}")
    source, hub_id = model.source, model.hub_id
    if not Path(source).exists():
        if hub_id is None:
            raise InputError(f"{folder} was made from {source}, which does not exist any more: {step}")
        return f"{hub_id}@{model.revision}" if model.revision else hub_id
    if model.files and Checkpoint.open(source).file_hashes() != model.files:
        raise InputError(f"{folder} was made from {source}, which has changed since then: {step}")
    return source


def _check_numbers(
    tokens: int, rank: int, rate: float | None, batch: int | None, steps: int | None, train: str
) -> None:  # fmt: skip
    if train not in ("auto", *MODES):
        raise InputError(unknown("--train", train, ("auto", *MODES)))
    for name, value in {"tokens": tokens, "rank": rank, "batch": batch, "steps": steps}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if rate is not None and not 0 < rate < 1:
        raise InputError(f"rate must lie in (0, 1), got {rate}")


def _read(
    checkpoint: Checkpoint, teacher: str | Path | None, settings: dict[str, Any], calibration: dict[str, Any],
    seed: int, device: torch.device, report: Report,
) -> _Inputs:  # fmt: skip
    """Open both models and read the text. Raises InputError for what cannot be recovered."""
    _check_kind(checkpoint)
    if not (calibration["files"] or calibration["mix"]):
        raise InputError("no text to train on: give --calibration FILE, or --mix self:1 for text of the model itself")
    parse_mix(calibration["mix"], calibration["files"])
    skeleton = Decoder(checkpoint, torch.device("cpu"))
    dense = None
    if teacher != NO_TEACHER:
        dense = Decoder(Checkpoint.open(teacher or dense_model_of(checkpoint.folder)), device)
        sizes = vocabulary_of(dense.model), vocabulary_of(skeleton.model)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the teacher {dense.checkpoint.folder} has {sizes[0]} tokens, the compressed model {sizes[1]}: "
                "give the dense model that it was made from"
            )
    writer = dense or Decoder(checkpoint, device)
    seq_len = fit_seq_len(calibration["seq_len"], SEQ_LEN, skeleton.positions, "the model", report)
    if settings["steps"] is None:
        batch = settings["batch"] or batch_windows(settings["tokens"], seq_len)
        needed = max(1, settings["tokens"] // (seq_len * batch)) * batch
    else:
        batch = settings["batch"] or batch_windows(settings["steps"] * 2048, seq_len)
        needed = settings["steps"] * batch
    given = Calibration(**{**calibration, "seq_len": seq_len, "samples": needed + HELD_OUT})
    text = windows_for(given, writer, seed=seed, report=report, at_most=True)
    shares = parse_mix(given.mix, given.files)
    parts = list(text.mix.values()) or [text]
    wanted = [max(1, round(share * needed)) for share in shares.values()]
    wanted = [*wanted, needed - sum(wanted)][: len(parts)] if len(parts) > 1 else [needed]
    windows = Windows.of([(one.ids_ST, count) for one, count in zip(parts, wanted, strict=True)], batch, None, seed)
    for one, count in zip(parts, wanted, strict=True):
        if len(one.ids_ST) < 8:
            raise InputError(f"{one.source} holds {len(one.ids_ST)} windows of {seq_len} tokens: expected 8 at least")
        if len(one.ids_ST) < count:
            message = f"{one.source} holds {len(one.ids_ST):,} windows, and training takes {count:,}: it repeats them"
            report(Event.WARNING, message=message)
    if settings["train"] == "low-rank" and Learning.of(checkpoint.packed, RANK).paths:
        message = "--train low-rank: codes of a trellis stay as they are, only scales and levels are learned"
        report(Event.WARNING, message=message)
    files = [str(file) for file in calibration["files"]]
    settings = {**settings, "batch": batch, "seed": seed, "data": files, "mix": list(given.mix), "seq_len": seq_len}
    return _Inputs(skeleton, dense, device, text, windows, settings)


def _check_kind(checkpoint: Checkpoint) -> None:
    """Raise InputError for a result whose weights training would make useless, or has nothing to learn from."""
    folder = checkpoint.folder
    if has_shadow(folder):
        raise InputError(f"{folder} skips parts of a dense model by input, so its weights lost nothing to recover")
    record = read_record(folder)
    if isinstance(record, RunRecord) and (folder / "niwaki/blocks.jsonl").is_file():
        for line in read_lines(folder):
            if line.stored is None and (line.kind == "codes" or line.method_bytes is not None):
                raise InputError(
                    f"{folder} stores the codes of {line.matrix} as plain weights, which training would move off the "
                    "codes: compress again with --pack codes, with a method that has a packed form"
                )


def _finished(out: Path, fingerprint: dict[str, str], *, resume: bool, overwrite: bool) -> RecoveryRecord | None:
    """Return the record of a finished OUT that a resume asks for, None if there is work. Raises ResumeError."""
    if not resume or resumable(partial_of(out)) or not is_result(out):
        return None
    record: Record | None = read_record(out)
    before = record.fingerprint if isinstance(record, RecoveryRecord) else {}
    if overwrite and before != fingerprint:
        return None
    require_same(before, fingerprint, OTHER_INPUTS.format(out))
    assert isinstance(record, RecoveryRecord)
    return record


def _plan(inputs: _Inputs) -> MemoryPlan:
    """Plan memory and the way of training."""
    device, settings = inputs.device, inputs.settings
    learning = Learning.of(inputs.skeleton.checkpoint.packed, settings["rank"])
    size = Size.of(inputs.skeleton, inputs.dense)
    cpu, window = device.type == "cpu", settings["seq_len"]
    tokens = max(window, CPU_MICRO_TOKENS // window * window) if cpu else settings["batch"] * window
    return choose(
        size, learning, budget(device), tokens=tokens, window=window, itemsize=4 if cpu else 2, best=cpu,
        modes=learning.modes(settings["train"], size), held_tokens=len(inputs.windows.held) * window,
    )  # fmt: skip


def _run(inputs: _Inputs, folder: ResultFolder, report: Report, started: float) -> RecoveryRecord:
    """Train, and write the result with its record."""
    device, skeleton, plan = inputs.device, inputs.skeleton, _plan(inputs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = _teacher(inputs, plan, dtype, folder, report)
    model = load_checkpoint(skeleton.checkpoint, device=str(device), dtype=dtype, hashed=True)
    eager_experts(model)
    trained = prepare(
        model, skeleton, mode=plan.mode, rank=inputs.settings["rank"], seed=inputs.settings["seed"],
        pruned=_is_pruned(skeleton.checkpoint.folder),
    )  # fmt: skip
    rate = inputs.settings["rate"] or default_rate(len(inputs.windows.steps))
    micro = max(1, plan.micro_tokens // inputs.settings["seq_len"])
    schedule = Schedule(rate, micro, plan.recompute, autocast=device.type == "cuda")
    wide = device.type == "cuda" and budget(device) > WIDE_DEVICE_BYTES
    student = Student(model, teacher, WIDE_LOGIT_BYTES if wide else None)
    trainer = Trainer(student, trained, inputs.windows, schedule)
    best = trainer.run(folder, report)
    trained.settle(dtypes := stored_dtypes(skeleton))
    loss = trainer.held_out()
    if not loss < best.start_error:
        raise InputError(
            f"recovery did not lower the held-out loss ({best.start_error:.4f} before): lower the rate, or give more "
            "text; nothing was written"
        )
    result = _write(inputs, trained, dtypes, folder, best.start_error, loss, trainer.step)
    record = _record(inputs, folder, result, plan, {"rate": rate, "train": plan.mode}, started)
    write_record(folder.path, record)
    return record


def _teacher(
    inputs: _Inputs, plan: MemoryPlan, dtype: torch.dtype, folder: ResultFolder, report: Report
) -> Teacher:  # fmt: skip
    if inputs.dense is None:
        return Text()
    if not plan.resident:
        return cached(folder, inputs.dense, inputs.windows.ids_ST, report)
    dense = load_checkpoint(inputs.dense.checkpoint, device=str(inputs.device), dtype=dtype, hashed=True)
    eager_experts(dense)
    return Resident(dense.requires_grad_(False))


def eager_experts(model: Any) -> None:
    """Run experts one by one: other ways take no weights in float32."""
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"


def _is_pruned(folder: Path) -> bool:
    """Return whether codes of zero are pruned weights: the recipe asked for zeros, or no record says."""
    record = read_record(folder)
    while isinstance(record, RecoveryRecord):
        record = None if record.compressed_from is None else RunRecord.model_validate(record.compressed_from)
    return not (isinstance(record, RunRecord) and record.asks_for_bits)


def _write(
    inputs: _Inputs, trained: Trained, dtypes: dict[str, torch.dtype], folder: ResultFolder, before: float,
    after: float, steps: int,
) -> RecoveryResult:  # fmt: skip
    """Write the files of the result, and return its losses, zeros, bits and hashes."""
    plain, packed = trained.plain(dtypes), trained.packed()
    matrices = {name: weight for name, weight in plain.items() if weight.dim() > 1}
    zeros = sum(int((weight == 0).sum()) for weight in matrices.values())
    weights = sum(weight.numel() for weight in matrices.values())
    hashes = write_result(inputs.skeleton, plain, packed, folder.path)
    bits = packed_bits(packed)
    fields = {
        "heldout_loss_before": before,
        "heldout_loss": after,
        "matrices": len(matrices) + len(packed),
        "zeros": zeros,
        "zeros_frac": zeros / weights if weights else 0.0,
        "steps": steps,
        "bytes": sum((folder.path / shard).stat().st_size for shard in hashes),
        "sha256": hashes,
        **({} if bits is None else {"packed_bits": bits}),
    }
    return RecoveryResult.model_validate(fields)


def _record(
    inputs: _Inputs, folder: ResultFolder, result: RecoveryResult, plan: MemoryPlan, chosen: dict[str, Any],
    started: float,
) -> RecoveryRecord:  # fmt: skip
    """Return the record of a recovery that began at `started`."""
    checkpoint, device, cuda = inputs.skeleton.checkpoint, inputs.device, inputs.device.type == "cuda"
    before, dense = read_record(checkpoint.folder), inputs.dense
    teacher = None if dense is None else {**dense.checkpoint.source, "files": dense.checkpoint.file_hashes()}
    text = {"windows": list(inputs.windows.ids_ST.shape), "sha256": digest(inputs.windows.ids_ST), **inputs.text.about}
    fields = {
        "format": FORMAT,
        **provenance("torch", "transformers", "safetensors"),
        "model": {**checkpoint.source, "files": checkpoint.file_hashes()},
        "recover": {**inputs.settings, **chosen, **text, "teacher": teacher, "memory": plan.record()},
        "fingerprint": folder.fingerprint,
        "compressed_from": None if before is None else before.dump(),
        "result": result,
        "files": hashed_files(folder.path),
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        **({"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if cuda else {}),
    }
    return RecoveryRecord.model_validate(fields)
