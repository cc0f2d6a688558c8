"""The job of a structured method: choose the shape first, then walk, then store smaller tensors and their config.

The search of the method proposes shapes, and each is evaluated on held-out windows. Blocks are walked at full size,
with zeros in what is gone; the stored tensors are cut. The finished result is read through its own config, and must
compute what the walk computed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.compression.allocation import OWN_WIDTHS
from niwaki.compression.backward import mean_loss
from niwaki.compression.job import Allocation, FullBlocks, Job, block_part, scan, walk_model, windows_stream
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import JournalEntry, MatrixRecord, RunRecord
from niwaki.compression.shapes import is_cut
from niwaki.compression.unit_damage import damages, probes, spread_by_damage
from niwaki.compression.walk import WalkPlan, collect, compress_blocks, forward
from niwaki.compression.width_search import Place, spread
from niwaki.config.events import Event, Report, silent
from niwaki.config.targets import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import NumericalError
from niwaki.model.checkpoint import Checkpoint, quantization, with_quantization
from niwaki.model.decoder import Block, Decoder
from niwaki.model.files import write_text
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSearch, ShapeSpace, new_name, unit_axes

HELD_WINDOWS = 16  # windows that shapes are evaluated on
# Relative squared error between the walk at full size and the stored result: other kernels, other orders of sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def shape_job(job: Job, folder: ResultFolder, report: Report) -> RunRecord:
    """Choose a shape, compress the model to it, and return the record of the run."""
    return walk_model(job, folder, report, _choose_shape)


def _choose_shape(job: Job, folder: ResultFolder, report: Report) -> Allocation:
    """Measure the dense blocks, then let the method search; every shape that it proposes is evaluated."""
    target, step = job.stage.target, job.stage.steps[0]
    assert isinstance(target, Sparsity)
    assert job.stage.expected is not None, "of a structured stage"
    space = job.stage.expected.space

    def measure(block: Block, stream: Stream) -> tuple[float, Any]:
        method = step.shape_method
        statistics, _ = collect(block, stream, method.info_needs(step.config))
        info = method.info(block, statistics, space.units, step.config)
        return _influence(block, stream), info

    infos = [BlockInfo(*values) for values in scan(job, folder, "looks", measure, report, advances=True)]
    search = step.shape_method.search(space, target.zeros_frac, infos, step.config)
    rises: dict[Place, float] = {}
    if job.recipe.allocation in OWN_WIDTHS:
        search = _then_spread(search, job, folder, report, space, rises)
    shape, losses = _search(search, job, folder, report, space)
    if shape is None:
        raise space.no_shape(target, job.recipe.method)
    cut = is_cut(shape, job.recipe)
    space.check(shape, cut)
    numbers = {
        "shape": _shape_record(shape),
        "removed_frac": space.removed_frac(shape),
        "cut": cut,
        "influence": [info.influence for info in infos],
        **({"stays": list(job.stage.expected.notes)} if job.stage.expected.notes else {}),
        **(
            {"damages": [{"block": i, "kind": kind, "rise": rise} for (i, kind), rise in rises.items()]}
            if rises
            else {}
        ),
        "trials": [_shape_record(tried) | {"loss": loss} for tried, loss in losses.items()],
    }
    report(Event.ALLOCATION, **numbers)
    return Allocation(space.targets(shape, cut), numbers, PrunedBlocks(job, space, shape, cut))


def _search(
    search: ShapeSearch, job: Job, folder: ResultFolder, report: Report, space: ShapeSpace
) -> tuple[PrunedShape | None, dict[PrunedShape, float]]:
    """Return the shape that a search ends with, and the losses of all that it proposed, each evaluated once."""
    losses: dict[PrunedShape, float] = {}
    try:
        shapes = next(search)
        while True:
            for shape in shapes:
                if shape not in losses:
                    losses[shape] = _evaluate(job, folder, len(losses), space, shape, report)
            shapes = search.send([losses[shape] for shape in shapes])
    except StopIteration as stop:
        return stop.value, losses


def _then_spread(
    search: ShapeSearch, job: Job, folder: ResultFolder, report: Report, space: ShapeSpace, rises: dict[Place, float]
) -> ShapeSearch:
    """Give every block widths of its own, from the even shape that the method found. `rises` receives the damages."""
    shape = yield from search
    if shape is None or not shape.even:
        return shape
    target, step = job.stage.target, job.stage.steps[0]
    assert isinstance(target, Sparsity)
    multiple = step.shape_method.multiple(step.config)
    if job.recipe.allocation == "searched":
        return (yield from spread(space, shape, target.zeros_frac, multiple))
    rises |= damages(job, folder, space, probes(space, shape), _judged_windows(job), report)
    return (yield from spread_by_damage(space, shape, rises, target.zeros_frac, multiple))


def _judged_windows(job: Job) -> tuple[Tensor, Tensor]:
    """Return the windows that candidates are made with, and those that they are evaluated on."""
    assert job.windows_ST is not None, "structured methods ask for windows"
    held = max(1, min(HELD_WINDOWS, len(job.windows_ST) // 4))
    fitted_ST = job.windows_ST[:-held] if len(job.windows_ST) > held else job.windows_ST
    return fitted_ST, job.windows_ST[-held:]


def _evaluate(
    job: Job, folder: ResultFolder, number: int, space: ShapeSpace, shape: PrunedShape, report: Report
) -> float:
    """Return the loss on held-out windows of a model of this shape, made with all others; it is kept in the journal.

    Fewer windows do not suffice: least squares gains with every one, and shapes that rely on it would look worse.
    """
    part = f"trial-{number:05d}"
    if part not in folder.finished:
        fitted_ST, held_ST = _judged_windows(job)
        stream = windows_stream(job, folder, "trial", fitted_ST)
        judge = windows_stream(job, folder, "held", held_ST)
        dense = windows_stream(job, folder, "trial-dense", fitted_ST) if job.stage.dense_stream else None
        assert judge is not None
        plan = WalkPlan(
            job.stage.steps, space.targets(shape, False), job.recipe.seed, records=False,
            expert_tokens=job.recipe.expert_tokens,
        )  # fmt: skip
        compress_blocks(job.decoder, plan, stream, dense, riders=[judge], save=lambda block, lines: None, report=silent)
        folder.finish_part(part, JournalEntry(loss=mean_loss(job.decoder, judge)))
        report(Event.CANDIDATE, shape=_shape_record(shape), loss=folder.finished[part].loss)
    loss = folder.finished[part].loss
    assert loss is not None, "the entry of a candidate"
    return loss


@dataclass(frozen=True)
class PrunedBlocks:
    """Storage of blocks without what a shape removes. If not `cut`, zeros stand in its place."""

    job: Job
    space: ShapeSpace
    shape: PrunedShape
    cut: bool

    @property
    def _biased(self) -> bool:
        step = self.job.stage.steps[0]
        return step.shape_method.biased(step.config)

    @property
    def shard_names(self) -> list[str]:
        """Return one file per block and those of the embeddings; the number of a removed block is not counted."""
        names = FullBlocks(self.job).shard_names
        gone = self.shape.dropped if self.cut else ()
        count, number, numbered = len(names) - len(gone), 0, []
        for index in range(len(names)):
            number += index not in gone
            numbered.append(f"model-{number:05d}-of-{count:05d}.safetensors")
        return numbered

    def copied(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the names after the removed blocks are gone, without those that belong to such a block."""
        return self.job.decoder.unread.renamed(names, self.shape.dropped if self.cut else ())

    def tensors(self, block: Block, lines: list[MatrixRecord]) -> dict[str, Tensor]:
        """Return the block without what is gone, under its new name; {} for a removed block."""
        decoder, tensors = self.job.decoder, FullBlocks(self.job).tensors(block, lines)
        if self._biased and block.index not in self.shape.dropped:
            tensors |= self._biases(block, tensors)
        if not self.cut:
            return tensors
        if block.index in self.shape.dropped:
            return {}
        axes = self._axes(block.index, lines)
        smaller = {}
        for name, tensor in tensors.items():
            along, places, _ = axes.get(decoder.parameter(name, block.index), (0, None, 0))
            kept = tensor if places is None else tensor.index_select(along, places).contiguous()
            smaller[self._new_name(name, block.index)] = kept
        return smaller

    def read(self, folder: ResultFolder, index: int) -> dict[str, Tensor]:
        """Return a finished block at full size: what was cut is zero."""
        if not self.cut:
            return FullBlocks(self.job).read(folder, index)
        entry, decoder = folder.finished[block_part(index)], self.job.decoder
        tensors = self.job.checkpoint.read(decoder.disk_names(index))
        stored = load_file(folder.path / entry.shard) if entry.shard else {}
        axes, consumers = self._axes(index, entry.matrices), {unit.consumer for unit in self.space.units.values()}
        for name, dense in list(tensors.items()):
            parameter = decoder.parameter(name, index)
            along, places, _ = axes.get(parameter, (0, None, 0))
            kept = stored.get(self._new_name(name, index))
            if kept is None:  # a removed block writes nothing to the residual stream
                tensors[name] = torch.zeros_like(dense) if parameter.rpartition(".")[0] in consumers else dense
            elif places is None:
                tensors[name] = kept
            else:
                tensors[name] = torch.zeros_like(dense).index_copy_(along, places, kept)
            bias = f"{name.removesuffix('weight')}bias"
            if parameter.rpartition(".")[0] in consumers and self._new_name(bias, index) in stored:
                tensors[bias] = stored[self._new_name(bias, index)]
        return tensors

    def write_config(self, folder: ResultFolder) -> None:
        """Write the config of the new shape, as far as it can express it."""
        space, shape = self.space, self.shape
        fields = space.configs.biases[0] if self._biased else {}
        full = space.config_for(space.shape(space.neurons, space.heads, shape.dropped if self.cut else ()), fields)
        config = space.config_for(shape, fields) if shape.even else full
        if not shape.even and self.cut:
            config = with_quantization(full, quantization({}, space.matrix_shapes(shape)))
        write_text(folder.path / "config.json", json.dumps(config, indent=2) + "\n")

    def check(self, folder: ResultFolder, stream: Stream | None) -> None:
        """Read the result as any reader would. Raises NumericalError if it computes something else than the walk."""
        windows_ST, walked = self.job.windows_ST, self.job.decoder
        assert stream is not None and windows_ST is not None
        decoder = Decoder(
            Checkpoint.open(str(folder.path)), walked.device, walked.dtype, logit_bytes=walked.logit_bytes
        )
        result = Stream(decoder, windows_ST[:1], name="check")
        forward(decoder, [result])
        wanted_TD = stream.hidden.read(slice(0, 1)).float()
        error_TD = result.hidden.read(slice(0, 1)).float() - wanted_TD
        error = float(error_TD.square().sum() / wanted_TD.square().sum())
        if not error <= TOLERANCE[walked.dtype]:
            raise NumericalError(
                f"the smaller model computes something else than the blocks it was cut from (relative squared error "
                f"{error:.1e}): this architecture ties its parts in a way that niwaki does not see; nothing was written"
            )

    def _biases(self, block: Block, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all biases that the config asks for now: those that were added, zeros for the others."""
        added = self.space.configs.biases[1]
        names = {self.job.decoder.parameter(name, block.index): name for name in tensors}
        biases = {}
        for linear in block.linears.values():
            bias = f"{linear.name}.bias"
            if bias in added:
                like = tensors[names[linear.parameter]]
                own = block.result
                given = own.parameters[bias].to("cpu", like.dtype) if bias in own.added else None
                biases[names[linear.parameter].removesuffix("weight") + "bias"] = (
                    like.new_zeros(linear.rows) if given is None else given
                )
        return biases

    def _axes(self, index: int, lines: list[MatrixRecord]) -> dict[str, tuple[int, Tensor, int]]:
        """Return dimension, kept indices and full size of every parameter of a block that is cut."""
        kept = {line.matrix: line.kept_groups for line in lines if line.kept_groups is not None}
        anatomy = self.job.decoder.anatomy.blocks[index]
        axes: dict[str, tuple[int, Tensor, int]] = {}
        for unit in self.space.units.values():
            axes |= unit_axes(unit, anatomy, kept[unit.consumer], self.space.followers(unit.kind))
        return axes

    def _new_name(self, name: str, index: int) -> str:
        return new_name(name, self.job.decoder.path, index, self.shape.dropped)


def _influence(block: Block, stream: Stream) -> float:
    """Move the stream past the block; return 1 − mean cos(h_in, h_out) over all tokens (ShortGPT, Men et al. 2024)."""
    total, tokens = 0.0, 0
    for rows in stream.slices():
        x_BTD = stream.hidden.read(rows)
        before_BTD = x_BTD.float().clone()
        out_BTD = stream.advance(block, rows)
        total += float(torch.cosine_similarity(before_BTD, out_BTD.float(), dim=-1).double().sum())
        tokens += before_BTD.shape[0] * before_BTD.shape[1]
    return 1 - total / tokens


def _shape_record(shape: PrunedShape) -> dict[str, Any]:
    """Return a shape as run.json has it: one number for all blocks, or one for each."""
    if not shape.even:
        return {"neurons": list(shape.neurons), "heads": list(shape.heads)}
    return {"neurons": max(shape.neurons), "heads": max(shape.heads), "dropped": list(shape.dropped)}
