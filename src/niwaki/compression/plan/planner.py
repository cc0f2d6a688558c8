"""What a compression will take and give, before anything runs; and whether it can run at all.

Only headers and configs are read, so a plan for 70B takes seconds. Bytes of the result are counted; seconds and memory
are estimated from counted work (see `estimate`) on a machine that is measured or looked up (see `machines`).
`benchmarks/plan.py` compares with real runs.

    plan("MODEL", method="gptq", target="4bit", gpu="h100", price_per_hour=2.5, tokens_per_day=50_000_000)
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from niwaki.compression.allocation import ALLOCATIONS, uniform
from niwaki.compression.bit_allocation import KEPT_BITS, bits_within
from niwaki.compression.chain import columns_multiple, split_options, stages_of
from niwaki.compression.plan.decoding import decoding
from niwaki.compression.plan.estimate import Job, Memory, memory, seconds
from niwaki.compression.plan.machines import Machine, machine_named
from niwaki.compression.plan.sizes import ModelSizes, Stored, beside_bytes, shape_of, shaped, sizes_of, stored
from niwaki.compression.resolve import resolve_allocation
from niwaki.compression.run import check_space, partial_of
from niwaki.config.events import Event, Report
from niwaki.config.recipe import Bits, Recipe, Sparsity, Target, make_recipe, parse_target
from niwaki.errors import InputError, OutputError, TargetError, unknown
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import Step, merged_needs
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_dtype

# What is refused must be impossible: of all measured peaks none was below 0.87 of its estimate.
CERTAIN = 0.7
SURE_BYTES = 0.97  # of a predicted file
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # as `stream.default_batch_tokens`
SCANS = {"owl": 2.0, "sensitivity": 1.0}  # forwards of all blocks that an allocation takes
SCAN_TOKENS = 4096  # tokens that every matrix alone is judged by, as in `budget`
SEARCH_ROUNDS = 2  # of `widths.spread`, which takes up to three


@dataclass(frozen=True)
class Stage:
    """One walk of a recipe: what it begins with and leaves, and what it takes."""

    recipe: Recipe
    steps: list[Step]
    target: Target
    model: ModelSizes
    job: Job
    stored: Stored
    linked: bool  # the weights are those of the model, in another folder


def plan(
    model: str | Path,
    *,
    gpu: str | None = None,
    out: str | Path | None = None,
    price_per_hour: float | None = None,
    tokens_per_day: float | None = None,
    dense_stream: bool = False,
    **recipe: Any,
) -> dict[str, Any]:
    """Predicted seconds, bytes and speeds of `niwaki.compress(model, out, **recipe)`; sizes in bytes, times in seconds.

    `gpu`: h100, h200, a100, 4090, or cpu for this machine; without it whatever this machine has. Traffic is that of one
    stream of tokens at a time (see `decoding`).

    Raises what `compress` would raise for the recipe, and InputError or OutputError for what cannot work: memory, disk.
    """
    for name, value in ("price_per_hour", price_per_hour), ("tokens_per_day", tokens_per_day):
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name} must be 0 or more, got {value}")
    begin = time.perf_counter()
    out = Path("niwaki-plan" if out is None else out).absolute()
    decoder = open_decoder(model, recipe)
    opened = time.perf_counter() - begin
    machine = machine_named(gpu, out.parent)
    stages = make_stages(decoder, make_recipe(recipe), machine.device, dense_stream)
    taken = [_estimate(stage, machine) for stage in stages]
    last = stages[-1]
    phases = {name: sum(found[0].get(name, 0.0) for found in taken) for name in taken[0][0] | taken[-1][0]}
    phases["opening"] = opened * len(stages)
    output = last.stored.file_bytes
    disk = sum(0 if stage.linked else stage.stored.file_bytes for stage in stages) + max(
        m.scratch_bytes for _, m in taken
    )
    peak = max((found for _, found in taken), key=lambda found: found.device_bytes or found.rss_bytes)
    here = gpu is None or machine.device == "cpu"
    warnings = _check(peak, machine.device, machine.memory_bytes, machine.name)
    if here:
        warnings += _check_disk(out, SURE_BYTES * _written(stages), disk)
    total = sum(phases.values())
    return {
        "model": _about(decoder, stages[0].model),
        "recipe": make_recipe(recipe).model_dump(mode="json"),
        "machine": vars(machine),
        "seconds": round(total, 2),
        "seconds_by_phase": {name: round(value, 3) for name, value in phases.items() if value},
        "peak_rss_bytes": peak.rss_bytes,
        "peak_device_bytes": peak.device_bytes,
        "output_bytes": output,
        "output_bits": round(_bits(last), 4),
        "matrix_bits": round(last.stored.matrix_bits, 4),
        "disk_bytes": disk,
        "decode": decoding(stages[0].model, stages, machine),
        "money": _money(decoding(stages[0].model, stages, machine), total, price_per_hour, tokens_per_day),
        "warnings": warnings,
    }


def open_decoder(model: str | Path, recipe: dict[str, Any]) -> Decoder:
    """Headers and config of `model`, on the device that needs nothing."""
    made = make_recipe(recipe)
    checkpoint = Checkpoint.open(model)
    checkpoint.require_plain()
    return Decoder(checkpoint, torch.device("cpu"), pick_dtype(made.dtype))


def make_stages(decoder: Decoder, recipe: Recipe, device: str, dense_stream: bool) -> list[Stage]:
    """What a recipe asks for, walk by walk. Raises as `compress` would."""
    parts = stages_of(recipe)
    if len(parts) == 1:
        return [_stage(decoder, sizes_of(decoder), parts[0], device, dense_stream, 1)]
    later = parse_target(parts[1].target or "")
    multiple = columns_multiple(split_options(parts[1], later)[1], later)
    first = _stage(decoder, sizes_of(decoder), parts[0], device, dense_stream, multiple)
    return [first, _stage(decoder, _left(decoder, first, multiple), parts[1], device, dense_stream, 1)]


def check_possible(
    decoder: Decoder, recipe: Recipe, steps: list[Step], target: Target, out: Path, report: Report
) -> None:
    """What `compress` checks before its first file: memory and disk, as far as headers tell.

    Raises InputError or OutputError for what is certain not to work; reports a warning for what may not.
    """
    device, model = decoder.device, sizes_of(decoder)
    job = _job(model, recipe, steps, device.type, decoder.dtype.itemsize, False, 0)
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    base = psutil.Process().memory_info().rss
    peak = memory(model, job, device.type, total, recipe.activation_bytes, base)
    if steps[0].kind is MethodKind.CONTEXTUAL:
        written = 0.0
    elif steps[0].kind is MethodKind.SHAPE:
        assert isinstance(target, Sparsity)
        written = (1 - min(1.0, 1.3 * target.zeros_frac)) * (model.file_bytes - model.ends_bytes) + model.ends_bytes
    else:
        written = stored(decoder, model, steps, target, recipe).file_bytes
    warnings = _check(peak, device.type, total, str(device))
    there = sum(path.stat().st_size for path in partial_of(out).rglob("*") if path.is_file())  # taken up, or dropped
    certain, needed = max(SURE_BYTES * written - there, 0), max(written + peak.scratch_bytes - there, 0)
    for text in warnings + _check_disk(out, certain, round(needed)):
        report(Event.WARNING, message=text)


def _stage(
    decoder: Decoder, model: ModelSizes, recipe: Recipe, device: str, dense_stream: bool, multiple: int
) -> Stage:
    target: Target = Bits(KEPT_BITS) if recipe.target is None else parse_target(recipe.target)
    if recipe.allocation not in ALLOCATIONS:
        raise InputError(unknown("allocation", recipe.allocation, ALLOCATIONS))
    recipe = resolve_allocation(recipe)
    _, steps = split_options(recipe, target)
    if recipe.target_bytes is not None:
        target = bits_within(recipe.target_bytes, decoder)
    itemsize = 4 if device == "cpu" and recipe.dtype == "auto" else _itemsize(decoder, recipe)
    if steps[0].kind is MethodKind.CONTEXTUAL:
        job = _job(model, recipe, steps, device, itemsize, dense_stream, 0)
        nbytes = model.file_bytes + beside_bytes(decoder, steps[0], job.windows)
        read = sum(block.dense_bytes * block.reach for block in model.blocks) + model.head_bytes
        assert isinstance(target, Sparsity)
        skipped = target.zeros_frac * sum(m.dense_bytes for block in model.blocks for m in block.matrices)
        own = Stored(nbytes, model.matrix_bits, read - skipped, 0)
        return Stage(recipe, steps, target, model, job, own, linked=True)
    if steps[0].kind is MethodKind.SHAPE:
        sizes, shape, tried = shape_of(decoder, steps[0], target, multiple, _config(decoder))
        trials = float(tried)
        if recipe.allocation == "searched":
            trials += SEARCH_ROUNDS * (2 * len(sizes) + 3)
        left = shaped(model, sizes, shape)
        job = _job(model, recipe, steps, device, itemsize, dense_stream, trials)
        read = sum(block.dense_bytes for block in left.blocks) + left.head_bytes
        nbytes = left.file_bytes if recipe.pack != "none" or shape.even else model.file_bytes
        return Stage(recipe, steps, target, model, job, Stored(nbytes, left.matrix_bits, read, 0), linked=False)
    uniform(decoder.anatomy, target)
    found = stored(decoder, model, steps, target, recipe)
    job = _job(model, recipe, steps, device, itemsize, dense_stream, 0)
    return Stage(recipe, steps, target, model, job, found, linked=False)


def _left(decoder: Decoder, first: Stage, multiple: int) -> ModelSizes:
    """What the second stage of a chain begins with."""
    sizes, shape, _ = shape_of(decoder, first.steps[0], first.target, multiple, _config(decoder))
    return shaped(first.model, sizes, shape)


def _job(
    model: ModelSizes, recipe: Recipe, steps: list[Step], device: str, itemsize: int, dense_stream: bool, trials: float
) -> Job:
    """How often what happens to every block."""
    needs, given = merged_needs(steps), recipe.calibration
    own = steps[0].kind is not MethodKind.WALK
    scanned = recipe.allocation != "uniform" or recipe.keep_blocks == "auto" or own
    dense = dense_stream or needs.dense
    wanted = needs.anything or scanned or dense or bool(given.files)
    windows, tokens = (given.samples, given.seq_len) if wanted else (0, 0)
    works = {}
    for index, block in enumerate(model.blocks):
        scope = block.scope(windows, tokens)
        first, *rest = [step.cost(scope) for step in steps]
        works[index] = sum(rest, first)
    matrices = len(model.blocks[0].matrices) + 1
    scans = 3.0 if recipe.keep_blocks == "auto" else SCANS.get(recipe.allocation, 2.0 if own else 0.0)
    return Job(
        windows=windows,
        tokens=tokens,
        batch=max(1, (recipe.batch_tokens or BATCH_TOKENS[device]) // max(tokens, 1)),
        itemsize=itemsize,
        needs=needs,
        dense=dense,
        own=works,
        scans=scans,
        scan_tokens=min(SCAN_TOKENS, windows * tokens) * matrices if recipe.allocation == "sensitivity" else 0,
        trials=trials,
        squares=needs.gradient and steps[0].kind is not MethodKind.CONTEXTUAL,
        writes_text=wanted and not given.files,
    )


def _estimate(stage: Stage, machine: Machine) -> tuple[dict[str, float], Memory]:
    base = psutil.Process().memory_info().rss
    written = 0 if stage.linked else stage.stored.file_bytes
    found = seconds(stage.model, stage.job, machine, written)
    return found, memory(
        stage.model, stage.job, machine.device, machine.memory_bytes, stage.recipe.activation_bytes, base
    )


def _check(peak: Memory, device: str, memory_bytes: int, name: str) -> list[str]:
    """Refuses what no margin of error lets fit; says what may not."""
    warnings = []
    places = [
        ("the memory of this machine", psutil.virtual_memory().total + psutil.swap_memory().total, peak.rss_bytes)
    ]
    if device != "cpu":
        places = [(f"the memory of {name}", memory_bytes, peak.device_bytes)]
    for where, has, needed in places:
        least = "fewer --samples, a shorter --seq-len, smaller --batch-tokens, or a larger machine"
        if CERTAIN * peak.sure_bytes > has:
            raise InputError(f"{where} is {has / 1e9:.1f} GB, and about {needed / 1e9:.1f} GB are needed: use {least}")
        if needed > has:
            warnings.append(
                f"{where} is {has / 1e9:.1f} GB, and about {needed / 1e9:.1f} GB are needed: it may not fit"
            )
    return warnings


def _check_disk(out: Path, certain_bytes: float, needed_bytes: int) -> list[str]:
    """Refuses an OUT without room for the files of the result; says if what lives beside them may be too much."""
    check_space(out, round(certain_bytes))
    try:
        check_space(out, needed_bytes)
    except OutputError as error:
        return [f"{error} (with files that live only while it runs)"]
    return []


def _written(stages: list[Stage]) -> float:
    return max(0 if stage.linked else stage.stored.file_bytes for stage in stages)


def _bits(stage: Stage) -> float:
    """Bits a weight of the whole file, embeddings and all."""
    return 8 * stage.stored.file_bytes / max(stage.model.weights + stage.model.ends_weights, 1)


def _about(decoder: Decoder, model: ModelSizes) -> dict[str, Any]:
    return {
        "type": decoder.checkpoint.config.model_type,
        "blocks": len(model.blocks),
        "weights": model.weights + model.ends_weights,
        "bytes": model.file_bytes,
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _itemsize(decoder: Decoder, recipe: Recipe) -> int:
    dtype = pick_dtype(recipe.dtype) or decoder.checkpoint.dtype
    return dtype.itemsize


def _config(decoder: Decoder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((decoder.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    return found


def _money(
    decode: dict[str, Any], compress_seconds: float, price_per_hour: float | None, tokens_per_day: float | None
) -> dict[str, Any] | None:
    """What a day's tokens cost before and after, one stream of tokens at a time; None without a price.

    Only what compressing costs, if the model before or after does not fit the machine: then one price is not enough.
    """
    if price_per_hour is None:
        return None
    found: dict[str, Any] = {
        "price_per_hour": price_per_hour,
        "tokens_per_day": tokens_per_day,
        "compress": _short(compress_seconds / 3600 * price_per_hour),
    }
    if tokens_per_day is None or not (decode["before"]["fits"] and decode["after"]["fits"]):
        return found
    for name in ("ceiling", "reached"):
        speeds = [decode[when][f"{name}_tokens_per_s"] for when in ("before", "after")]
        if None in speeds:
            continue
        before, after = (tokens_per_day / speed / 3600 * price_per_hour for speed in speeds)
        saved = before - after
        found[name] = {
            "before_per_day": _short(before),
            "after_per_day": _short(after),
            "saved_per_day": _short(saved),
            "days_to_earn_back": _short(found["compress"] / saved) if saved > 0 else None,
        }
    return found


__all__ = ["TargetError", "check_possible", "make_stages", "open_decoder", "plan"]
