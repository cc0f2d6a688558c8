"""Prediction of the seconds, bytes and speeds of a compression, and whether it can run at all.

Only headers and configs are read, so a plan for 70B takes seconds. Bytes of the result are counted. Seconds and memory
are estimated from counted work (see `estimate`) on a machine that is measured or looked up (see `machines`).
`benchmarks/speed/plan.py` compares the estimates with real runs.

    plan("MODEL", method="gptq", target="4bit", gpu="h100", price_per_hour=2.5, tokens_per_day=50_000_000)
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from niwaki.compression.allocation import SCAN_FORWARDS
from niwaki.compression.bit_allocation import KEEP_SCAN_FORWARDS, SCAN_TOKENS
from niwaki.compression.places import check_space, partial_of
from niwaki.compression.plan.decoding import decoding
from niwaki.compression.plan.estimate import Memory, Workload, memory, seconds
from niwaki.compression.plan.machines import Machine, machine_named
from niwaki.compression.plan.sizes import (
    ModelSizes,
    StoredSizes,
    beside_bytes,
    shaped_sizes,
    sizes_of,
    stored_sizes,
    towers_record,
)
from niwaki.compression.resolve import ResolvedPlan, ResolvedStage, resolve
from niwaki.compression.width_search import EXPECTED_ROUNDS, STRIDES
from niwaki.config.events import Event, Report
from niwaki.config.presets import BITS_OPTION
from niwaki.config.recipe import Recipe, make_recipe
from niwaki.config.targets import Bits, Sparsity, parse_target
from niwaki.data.stream import default_batch_tokens
from niwaki.errors import InputError, OutputError
from niwaki.methods.method import MethodKind
from niwaki.model.decoder import Decoder, open_decoder
from niwaki.model.device import pick_dtype
from niwaki.runtime.adapter import base_folder, open_adapter

# What is refused must be impossible: of all measured peaks none was below 0.87 of its estimate.
CERTAIN = 0.7
CERTAIN_BYTES = 0.97  # of a predicted file
NAMED_ROOM = 0.02  # bits: a target this far above the bits that an option names leaves room that is told


@dataclass(frozen=True)
class PlannedStage:
    """One stage with the model it begins with, the work it does, and the files it leaves.

    `left`: the model that the next stage begins with. `linked`: the weights are those of the model, in another folder.
    """

    stage: ResolvedStage
    model: ModelSizes
    left: ModelSizes
    work: Workload
    stored: StoredSizes
    linked: bool = False

    @property
    def written_bytes(self) -> int:
        """Return the bytes of weight files that are written."""
        return 0 if self.linked else self.stored.file_bytes


def plan(
    model: str | Path,
    *,
    gpu: str | None = None,
    out: str | Path | None = None,
    price_per_hour: float | None = None,
    tokens_per_day: float | None = None,
    dense_stream: bool = False,
    merge_adapter: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Predict seconds, bytes and speeds of `niwaki.compress(model, out, **recipe)`; sizes in bytes, times in seconds.

    `gpu` is h100, h200, a100, 4090, or cpu for this machine; the default is the best device of this machine. Traffic is
    one stream of tokens at a time (see `decoding`). `merge_adapter`: the model is the base of the adapter in `model`.

    Raises what `compress` would raise for the recipe, and InputError or OutputError for too little memory or disk.
    """
    for name, value in ("price_per_hour", price_per_hour), ("tokens_per_day", tokens_per_day):
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name} must be 0 or more, got {value}")
    out = Path("niwaki-plan" if out is None else out).absolute()
    given = make_recipe(recipe), gpu, out, dense_stream, price_per_hour, tokens_per_day
    if not merge_adapter:
        return _planned(model, *given)
    adapter = open_adapter(model)
    with base_folder(adapter) as base:
        return _with_merge(_planned(base, *given, linked_to=adapter.base))


def _planned(
    model: str | Path, made: Recipe, gpu: str | None, out: Path, dense_stream: bool, price_per_hour: float | None,
    tokens_per_day: float | None, linked_to: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    begin = time.perf_counter()
    decoder = open_decoder(model, torch.device("cpu"), pick_dtype(made.dtype), linked_to=linked_to, blocks=made.blocks)
    opened = time.perf_counter() - begin
    machine = machine_named(gpu, out.parent)
    stages = plan_stages(decoder, resolve(made, decoder, dense_stream=dense_stream), machine.device)
    taken = [_estimate(stage, machine) for stage in stages]
    first, last = stages[0], stages[-1]
    phases = {name: sum(times.get(name, 0.0) for times, _ in taken) for name in taken[0][0] | taken[-1][0]}
    phases["opening"] = opened * len(stages)
    total = sum(phases.values())
    disk = sum(stage.written_bytes for stage in stages) + max(peak.scratch_bytes for _, peak in taken)
    peak = max((peak for _, peak in taken), key=lambda peak: peak.device_bytes or peak.rss_bytes)
    warnings = decoder.warnings(drop_unused=made.drop_unused)
    warnings += [note for stage in stages for note in _notes(stage.stage)]
    warnings += _dense_warnings(last.stored, first.model)
    warnings += _check_memory(peak, machine.device, machine.memory_bytes, machine.name)
    if gpu is None or machine.device == "cpu":
        warnings += _check_disk(out, CERTAIN_BYTES * max(stage.written_bytes for stage in stages), disk)
    decode = decoding(first.model, last.stored, last.stage.target, machine)
    return {
        "model": _model_facts(decoder, first.model),
        "recipe": made.model_dump(mode="json") | {"target": made.target or last.stage.recipe.target},
        "machine": vars(machine),
        "seconds": round(total, 2),
        "seconds_by_phase": {name: round(value, 3) for name, value in phases.items() if value},
        "peak_rss_bytes": peak.rss_bytes,
        "peak_device_bytes": peak.device_bytes,
        "output_bytes": last.stored.file_bytes,
        "output_bits": round(_bits(last), 4),
        "matrix_bits": round(last.stored.matrix_bits, 4),
        "disk_bytes": disk,
        "decode": decode,
        "money": _money(decode, total, price_per_hour, tokens_per_day),
        "kept_dense": decoder.kept.record(),
        "unread": decoder.unread.record(kept=not made.drop_unused),
        "towers": towers_record(decoder),
        "dense": last.stored.dense.record(),
        "warnings": warnings,
    }


def _with_merge(planned: dict[str, Any]) -> dict[str, Any]:
    """Return a plan with the memory and the disk of a merge before it: the whole model in each."""
    nbytes = planned["model"]["bytes"]
    text = f"merging the adapter takes {nbytes / 1e9:.2f} GB of memory, and as much disk while it runs"
    peak, disk = max(planned["peak_rss_bytes"], nbytes), planned["disk_bytes"] + nbytes
    return planned | {"peak_rss_bytes": peak, "disk_bytes": disk, "warnings": [*planned["warnings"], text]}


def plan_stages(decoder: Decoder, resolved: ResolvedPlan, device: str) -> list[PlannedStage]:
    """Return the stages of a plan with their work and files; the second begins with what the first leaves."""
    model, planned = sizes_of(decoder), []
    for stage in resolved.stages:
        planned.append(_plan_stage(decoder, model, stage, device))
        model = planned[-1].left
    return planned


def check_possible(decoder: Decoder, stage: ResolvedStage, out: Path, report: Report) -> None:
    """Check memory and disk for `compress` before its first file, as far as headers tell.

    Raises InputError or OutputError for what is certain to fail, and reports a warning for what may fail.
    """
    device, model = decoder.device, sizes_of(decoder)
    work = _workload(stage, model, device.type, decoder.dtype.itemsize)
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    base = psutil.Process().memory_info().rss
    peak = memory(model, work, device.type, total, stage.recipe, base)
    dense: list[str] = []
    if stage.kind is MethodKind.CONTEXTUAL:
        written = 0.0
    elif stage.kind is MethodKind.SHAPE:
        assert isinstance(stage.target, Sparsity)
        outside = model.embeddings_bytes + model.tower_bytes
        kept = outside + (0 if stage.recipe.drop_unused else model.unread_bytes)
        blocks = model.file_bytes - outside - model.unread_bytes
        written = (1 - min(1.0, 1.3 * stage.target.zeros_frac)) * blocks + kept
    else:
        stored = stored_sizes(decoder, model, stage)
        written, dense = stored.file_bytes, _dense_warnings(stored, model)
    warnings = dense + _check_memory(peak, device.type, total, str(device))
    # An unfinished run is there already: it is resumed, or replaced.
    there = sum(path.stat().st_size for path in partial_of(out).rglob("*") if path.is_file())
    held = psutil.virtual_memory().total + psutil.swap_memory().total
    spilled = peak.scratch_bytes if peak.scratch_bytes > held else 0  # no memory can take the place of the disk
    certain, needed = max(CERTAIN_BYTES * written + spilled - there, 0), max(written + peak.scratch_bytes - there, 0)
    for text in [*_notes(stage), *warnings, *_check_disk(out, certain, round(needed))]:
        report(Event.WARNING, message=text)


def _plan_stage(decoder: Decoder, model: ModelSizes, stage: ResolvedStage, device: str) -> PlannedStage:
    itemsize = 4 if device == "cpu" and stage.recipe.dtype == "auto" else _itemsize(decoder, stage.recipe)
    if stage.kind is MethodKind.CONTEXTUAL:
        nbytes = model.file_bytes + beside_bytes(decoder, stage)
        read = sum(block.dense_bytes * block.reach for block in model.blocks) + model.head_bytes
        assert isinstance(stage.target, Sparsity)
        skipped = stage.target.zeros_frac * sum(m.dense_bytes for block in model.blocks for m in block.matrices)
        work = _workload(stage, model, device, itemsize)
        sizes = StoredSizes(nbytes, model.matrix_bits, read - skipped, 0)
        return PlannedStage(stage, model, model, work, sizes, linked=True)
    if stage.kind is MethodKind.SHAPE:
        assert stage.expected is not None, "of a structured stage"
        space, shape, candidates = stage.expected.space, stage.expected.shape, float(stage.expected.candidates)
        if stage.recipe.allocation == "searched":
            candidates += EXPECTED_ROUNDS * (2 * len(space) + len(STRIDES))
        elif stage.recipe.allocation == "damage":
            candidates += 2 + len(STRIDES)  # a walk and the forwards of the riders count as two
        left = shaped_sizes(model, space, shape)
        if stage.recipe.drop_unused:
            left = replace(left, file_bytes=left.file_bytes - left.unread_bytes, unread_bytes=0)
        read = sum(block.dense_bytes for block in left.blocks) + left.head_bytes
        nbytes = (left if stage.recipe.pack != "none" or shape.even else model).file_bytes
        work = _workload(stage, model, device, itemsize, candidates)
        return PlannedStage(stage, model, left, work, StoredSizes(nbytes, left.matrix_bits, read, 0))
    work = _workload(stage, model, device, itemsize)
    return PlannedStage(stage, model, model, work, stored_sizes(decoder, model, stage))


def _workload(stage: ResolvedStage, model: ModelSizes, device: str, itemsize: int, candidates: float = 0) -> Workload:
    """Count what happens to every block, and how often."""
    recipe, needs = stage.recipe, stage.needs
    works = {}
    for index, block in enumerate(model.blocks):
        if recipe.blocks is not None and index not in recipe.blocks:
            continue
        scope = block.scope(stage.windows, stage.tokens)
        first, *rest = [step.cost(scope) for step in stage.steps]
        works[index] = sum(rest, first)
    matrices = len(model.blocks[0].matrices) + 1
    own = 0.0 if stage.kind is MethodKind.WALK else 2.0
    scans = KEEP_SCAN_FORWARDS if recipe.keep_blocks == "auto" else SCAN_FORWARDS.get(recipe.allocation, own)
    every = stage.windows * stage.tokens
    batch_tokens = recipe.batch_tokens or default_batch_tokens(torch.device(device))
    return Workload(
        windows=stage.windows,
        tokens=stage.tokens,
        batch=max(1, batch_tokens // max(stage.tokens, 1)),
        itemsize=itemsize,
        needs=needs,
        dense=stage.dense_stream,
        own=works,
        scans=scans,
        scan_tokens=min(SCAN_TOKENS, every) * matrices if recipe.allocation == "sensitivity" else 0,
        candidates=candidates,
        squares=needs.gradient and stage.kind is not MethodKind.CONTEXTUAL,
        writes_text=stage.windows > 0 and recipe.calibration.writes_text,
        lends=recipe.expert_tokens > 0 and needs.anything,
        blocks=len(model.blocks),
        held=recipe.calibration.held_windows if needs.windows else 0,
    )


def _notes(stage: ResolvedStage) -> list[str]:
    """Return what a structured method leaves out for this model, or how far named bits stay below a target."""
    if stage.kind is MethodKind.WALK and isinstance(stage.target, Bits) and stage.recipe.target is not None:
        asked = parse_target(stage.recipe.target)
        if isinstance(asked, Bits) and stage.target.bits < asked.bits - NAMED_ROOM:
            return [
                f"{BITS_OPTION} takes {stage.target.bits:.3f} bits a weight of target {asked}: the rest is not used"
            ]
    return [] if stage.expected is None else list(stage.expected.notes)


def _estimate(planned: PlannedStage, machine: Machine) -> tuple[dict[str, float], Memory]:
    """Return the seconds by phase and the peak memory of a stage."""
    base = psutil.Process().memory_info().rss
    times = seconds(planned.model, planned.work, machine, planned.written_bytes)
    return times, memory(planned.model, planned.work, machine.device, machine.memory_bytes, planned.stage.recipe, base)


def _check_memory(peak: Memory, device: str, memory_bytes: int, name: str) -> list[str]:
    """Raise InputError if no margin of error lets the peak fit; return warnings if it may not."""
    where, has, needed = "the memory of this machine", 0, peak.rss_bytes
    if device == "cpu":
        has = psutil.virtual_memory().total + psutil.swap_memory().total
    else:
        where, has, needed = f"the memory of {name}", memory_bytes, peak.device_bytes
    text = f"{where} is {has / 1e9:.1f} GB, and about {needed / 1e9:.1f} GB are needed"
    if CERTAIN * peak.sure_bytes > has:
        smaller = "fewer --samples, a shorter --seq-len, smaller --batch-tokens, or a larger machine"
        raise InputError(f"{text}: use {smaller}")
    return [f"{text}: it may not fit"] if needed > has else []


def _check_disk(out: Path, certain_bytes: float, needed_bytes: int) -> list[str]:
    """Raise OutputError if OUT has no room for the result; return warnings if temporary files may not fit."""
    check_space(out, round(certain_bytes))
    try:
        check_space(out, needed_bytes)
    except OutputError as error:
        return [f"{error} (with files that live only while it runs)"]
    return []


def _dense_warnings(stored: StoredSizes, model: ModelSizes) -> list[str]:
    """Return what matrices without a packed form cost, if there are any that the recipe would pack."""
    matrices = sum(len(block.matrices) for block in model.blocks)
    return [stored.dense.message(matrices)] if stored.dense.reasons else []


def _bits(planned: PlannedStage) -> float:
    """Return the bits a weight of the file with the embeddings, without towers and tensors that no module reads."""
    copied = planned.model.tower_bytes + (0 if planned.stage.recipe.drop_unused else planned.model.unread_bytes)
    return 8 * (planned.stored.file_bytes - copied) / max(planned.model.weights + planned.model.embeddings_weights, 1)


def _model_facts(decoder: Decoder, model: ModelSizes) -> dict[str, Any]:
    return {
        "type": decoder.checkpoint.config.model_type,
        "blocks": len(model.blocks),
        "weights": model.weights + model.embeddings_weights,
        "bytes": model.file_bytes,
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _itemsize(decoder: Decoder, recipe: Recipe) -> int:
    dtype = pick_dtype(recipe.dtype) or decoder.checkpoint.dtype
    return dtype.itemsize


def _money(
    decode: dict[str, Any], compress_seconds: float, price_per_hour: float | None, tokens_per_day: float | None
) -> dict[str, Any] | None:
    """Return the cost of a day's tokens before and after, one stream of tokens at a time; None without a price.

    If the model before or after does not fit the machine, one price is not enough: only the compression is stated.
    """
    if price_per_hour is None:
        return None
    money: dict[str, Any] = {
        "price_per_hour": price_per_hour,
        "tokens_per_day": tokens_per_day,
        "compress": _short(compress_seconds / 3600 * price_per_hour),
    }
    if tokens_per_day is None or not (decode["before"]["fits"] and decode["after"]["fits"]):
        return money
    for name in ("ceiling", "reached"):
        speeds = [decode[when][f"{name}_tokens_per_s"] for when in ("before", "after")]
        if None in speeds:
            continue
        before, after = (tokens_per_day / speed / 3600 * price_per_hour for speed in speeds)
        saved = before - after
        money[name] = {
            "before_per_day": _short(before),
            "after_per_day": _short(after),
            "saved_per_day": _short(saved),
            "days_to_earn_back": _short(money["compress"] / saved) if saved > 0 else None,
        }
    return money
