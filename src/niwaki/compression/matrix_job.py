"""The job of a method that replaces matrices: allocate their targets, then walk over the blocks.

What the calibration text decides is measured on the dense blocks first: outliers, sensitivities, blocks that stay.

    record = run(prepare(decoder, stage, request), matrix_job)
"""

from collections.abc import Callable
from typing import Any

from niwaki.compression.allocation import OWL_NEEDS, outlier_share, owl
from niwaki.compression.bit_allocation import (
    choose_kept,
    kept_targets,
    rest_bits,
    sensitivities,
    sensitivity,
    spread_bits,
)
from niwaki.compression.job import Allocation, FullBlocks, Job, Value, scan, walk_model
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RunRecord
from niwaki.compression.walk import collect
from niwaki.config.events import Event, Report
from niwaki.config.targets import Bits
from niwaki.data.stream import Stream
from niwaki.model.decoder import Block


def matrix_job(job: Job, folder: ResultFolder, report: Report) -> RunRecord:
    """Compress every matrix of every block to its target; return the record of the run."""
    return walk_model(job, folder, report, _allocate)


def _allocate(job: Job, folder: ResultFolder, report: Report) -> Allocation:
    """Return the targets of all matrices; those that the calibration text decides are measured first."""
    anatomy, stage, kept = job.stage.anatomy, job.stage, job.recipe.keep_blocks
    target, targets, min_bits = stage.target, stage.targets, stage.steps[-1].min_bits
    numbers: dict[str, Any] = {} if job.recipe.target_bytes is None else {"target_bits": _bits(job).bits}
    if job.recipe.allocation == "owl":

        def outliers(block: Block, stream: Stream) -> float:
            return outlier_share(block, collect(block, stream, OWL_NEEDS)[0], stage.owl)

        measure = _of_named(job, outliers, 0.0)
        shares = numbers["outlier_shares"] = scan(job, folder, "outlier_shares", measure, report)
        targets = owl(anatomy, target, shares, stage.owl)
    if job.recipe.allocation == "sensitivity":
        numbers["sensitivities"] = scan(job, folder, "sensitivities", _of_named(job, sensitivities, {}), report)
        targets = spread_bits(anatomy, target, numbers["sensitivities"], min_bits)
    if kept:
        if kept == "auto":
            numbers["sensitivities"] = scan(job, folder, "sensitivities", _of_named(job, sensitivity, 0.0), report)
            kept = tuple(choose_kept(anatomy, _bits(job), numbers["sensitivities"], min_bits))
        targets = kept_targets(anatomy, target, kept)
        numbers |= {"kept_blocks": list(kept), "rest_bits": rest_bits(anatomy, _bits(job), kept)}
    if numbers:
        report(Event.ALLOCATION, **numbers)
    return Allocation(targets, numbers, FullBlocks(job))


def _of_named(job: Job, measure: Callable[[Block, Stream], Value], other: Value) -> Callable[[Block, Stream], Value]:
    """Return a `measure` of the blocks that the recipe names, which gives `other` for all others."""
    return lambda block, stream: other if job.leaves(block.index) else measure(block, stream)


def _bits(job: Job) -> Bits:
    assert isinstance(job.stage.target, Bits), "methods with fractional bits meet bits"
    return job.stage.target
