"""Damage of every unit alone: the rise of the loss if the dense model loses groups in this unit only.

One walk over the dense blocks measures all. At each block, the method prunes one unit after another on the fitted
windows. The held-out windows pass the block with this unit pruned, and go on through the dense blocks as a rider of
their own. The loss of the rider at the end is the damage of the unit.

Widths follow from the damages as in `width_search`: with r the share that was gone, the damage is read as a·r². Shapes
on the way to the minimum of Σ a·r² are evaluated as a whole, and the one with the lowest loss is kept. A search by
`searched` evaluates a whole shape per unit instead: it also sees what units do together, and takes far longer.

Cost: a walk, and half a forward of the held-out windows per unit. Memory: the held-out hidden states once per unit.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from niwaki.compression.backward import mean_loss
from niwaki.compression.job import Job
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RECORD, JournalEntry
from niwaki.compression.walk import collect, loaded_blocks
from niwaki.compression.width_search import STEP_FRAC, STRIDES, Place, balanced, gone_share, toward
from niwaki.config.events import Event, Report
from niwaki.config.targets import KeepUnits
from niwaki.data.stream import CalibrationData, Stream
from niwaki.model.decoder import Block
from niwaki.model.prunable import PrunedShape, ShapeSearch, ShapeSpace


def probes(sizes: ShapeSpace, start: PrunedShape) -> dict[Place, int]:
    """Return the groups that each unit keeps while it is measured: those of `start`, or a step fewer than all."""
    found: dict[Place, int] = {}
    for index in range(len(sizes)):
        for kind in sizes.movable_kinds:
            full, kept = sizes.units[kind].count, start.kept(kind)[index]
            kept = kept if kept < full else full - max(1, round(STEP_FRAC * full))
            if kept > 0:
                found[index, kind] = kept
    return found


def damages(
    job: Job,
    folder: ResultFolder,
    sizes: ShapeSpace,
    kept: Mapping[Place, int],
    windows: tuple[Tensor, Tensor],
    report: Report,
) -> dict[Place, float]:
    """Return the rise of the held-out loss by unit; the journal keeps it. `windows`: the fitted, the held-out ones."""
    parts = {place: f"damage-{place[0]:05d}-{place[1]}" for place in kept}
    dense_part = "damage-none"
    if not all(part in folder.finished for part in (*parts.values(), dense_part)):
        losses, dense_loss = _measure(job, folder, sizes, kept, windows, report)
        for place, loss in losses.items():
            folder.finish_part(parts[place], JournalEntry(loss=loss))
        folder.finish_part(dense_part, JournalEntry(loss=dense_loss))
    found = {name: folder.finished[name].loss for name in (*parts.values(), dense_part)}
    least = found[dense_part]
    assert least is not None
    return {place: (found[part] or 0.0) - least for place, part in parts.items()}


def _measure(
    job: Job,
    folder: ResultFolder,
    sizes: ShapeSpace,
    kept: Mapping[Place, int],
    windows: tuple[Tensor, Tensor],
    report: Report,
) -> tuple[dict[Place, float], float]:
    """Return the held-out losses with each unit pruned alone, and that of the dense model."""
    fitted_ST, held_ST = windows
    total = fitted_ST.numel() + (1 + len(kept)) * held_ST.numel()

    def stream_of(name: str, ids_ST: Tensor) -> Stream:
        return Stream(
            job.decoder, ids_ST, batch_tokens=job.recipe.batch_tokens, activation_bytes=job.recipe.activation_bytes,
            folder=folder.path / RECORD / "journal", name=name, total_tokens=total,
        )  # fmt: skip

    step = job.stage.steps[0]
    needs = replace(step.needs, learn_batches=frozenset())  # nothing learns here
    stream, judge = stream_of("damage", fitted_ST), stream_of("damage-held", held_ST)
    dense = stream_of("damage-dense", fitted_ST) if needs.full else None
    riders: dict[Place, Stream] = {}
    for block in loaded_blocks(job.decoder):
        statistics, _ = collect(block, stream, needs, dense)
        calib = CalibrationData(statistics)
        begun = {}
        for kind, unit in sizes.units.items():
            if (place := (block.index, kind)) not in kept:
                continue
            begun[place] = rider = stream_of(f"damage-{block.index:05d}-{kind}", held_ST)
            for rows in judge.slices():
                rider.hidden.write(rows, judge.hidden.read(rows))
            keep = KeepUnits(unit, kept[place], False)
            with torch.no_grad():
                _advance_pruned(block, rider, keep, calib, job)
        for passing in (stream, judge, *riders.values()):
            passing.advance(block)
        riders |= begun
        block.release()
        report(Event.SCAN, index=block.index, of=len(job.decoder))
    return {place: mean_loss(job.decoder, rider) for place, rider in riders.items()}, mean_loss(job.decoder, judge)


def _advance_pruned(block: Block, rider: Stream, keep: KeepUnits, calib: CalibrationData, job: Job) -> None:
    """Move the rider past the block with one unit pruned; after that the block is dense again."""
    names = (*keep.unit.producers, keep.unit.consumer)
    dense = {name: block.weight(name).clone() for name in names}
    generator = torch.Generator().manual_seed(job.recipe.seed)
    for name, record in job.stage.steps[0].compress(block, calib, dict.fromkeys(names, keep), generator).items():
        block.assign(name, record.decode(block.storage_dtype(name)))
    rider.advance(block)
    for name, weight_OI in dense.items():
        block.assign(name, weight_OI)


def spread_by_damage(
    sizes: ShapeSpace, start: PrunedShape, found: Mapping[Place, float], removed_frac: float, multiple: int
) -> ShapeSearch:
    """Yield `start` and shapes that the damages ask for; return the one with the lowest loss."""
    kept = probes(sizes, start)
    stiff = {place: rise / gone_share(sizes, kept[place], place) ** 2 for place, rise in found.items()}
    wanted = balanced(sizes, start, stiff, removed_frac)
    near = [toward(sizes, start, wanted, stride, removed_frac, multiple) for stride in STRIDES]
    shapes = [start, *(shape for shape in near if sizes.removed_frac(shape) >= removed_frac - 1e-9)]
    losses = yield shapes
    return shapes[losses.index(min(losses))]
