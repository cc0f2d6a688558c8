"""The job of a structured method: the shape first, by trial, then the walk, then smaller tensors and their config.

Blocks are walked at full size with zeros in what is gone; what is stored is cut. At the end the result is read back
through its own config, and has to compute what the walk computed.
"""

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.compression.job import CompressionJob, block_part
from niwaki.compression.run import Run
from niwaki.compression.walk import Plan, collect, compress_blocks, forward
from niwaki.compression.width_search import spread
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import InputError, NumericalError, TargetError
from niwaki.model.checkpoint import Checkpoint, quantization
from niwaki.model.decoder import Block, Decoder
from niwaki.model.files import write_text
from niwaki.model.prunable import BlockInfo, PrunedShape, ShapeSearch, ShapeSpace, new_name, unit_axes

HELD_WINDOWS = 16  # that shapes on trial are judged by
BIAS_FIELDS = ("attention_bias", "mlp_bias")
# Relative squared error between the walk at full size and the stored result: other kernels, other orders of sums.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


class ShapingJob(CompressionJob):
    """A compression whose blocks become smaller."""

    shape = PrunedShape((1,), (1,))  # until it is found
    cut = False  # whether what goes leaves the file

    def _allocate(self, run: Run, report: Report) -> None:
        """Looks at the dense model, then lets the method search: what it wants to try is measured."""
        assert isinstance(self.target, Sparsity)
        config = json.loads((self.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        self.sizes = ShapeSpace(self.decoder.anatomy, self.decoder.model, config, self.columns_multiple)
        looks = [BlockInfo(*found) for found in self._scan(run, "looks", self._look, report, moves=True)]
        step, losses = self.steps[0], dict[PrunedShape, float]()
        search = step.shape_method.search(self.sizes, self.target.zeros_frac, looks, step.config)
        if self.recipe.allocation == "searched":
            search = self._then_spread(search)
        try:
            shapes = next(search)
            while True:
                for shape in shapes:
                    if shape not in losses:
                        losses[shape] = self._trial(run, len(losses), shape, report)
                shapes = search.send([losses[shape] for shape in shapes])
        except StopIteration as stop:
            found: PrunedShape | None = stop.value
        if found is None:
            raise TargetError(
                f"target {self.target}: {self.recipe.method} finds no shape that removes so much and leaves a block, a "
                "head and a neuron: lower the target, or let more blocks and heads go"
            )
        self.shape = found
        self.cut = found.even or (found.whole and self.recipe.pack != "none")
        self.targets = self.sizes.targets(found, self.cut)
        self.allocated = {
            "shape": _described(found),
            "removed_frac": self.sizes.removed_frac(found),
            "cut": self.cut,
            "influence": [look.influence for look in looks],
            "trials": [_described(shape) | {"loss": loss} for shape, loss in losses.items()],
        }
        self.shard_names = self._shard_names()
        report(Event.ALLOCATION, **self.allocated)

    def _then_spread(self, search: ShapeSearch) -> ShapeSearch:
        """Widths of their own for every block, from the even shape that the method found."""
        assert isinstance(self.target, Sparsity)
        found = yield from search
        if found is None or not found.even:
            return found
        multiple = self.steps[0].shape_method.multiple(self.steps[0].config)
        return (yield from spread(self.sizes, found, self.target.zeros_frac, multiple))

    def _look(self, block: Block, stream: Stream) -> tuple[float, Any]:
        """The influence of a dense block, and what the method wants to know of it."""
        step = self.steps[0]
        needs = step.shape_method.info_needs(step.config)
        seen, _ = collect(block, stream, needs)
        found = step.shape_method.info(block, seen, self.sizes.units, step.config)
        return _influence(block, stream), found

    def _shard_names(self) -> list[str]:
        """A block that is gone has no file, and its name is not counted."""
        names = super()._shard_names()
        gone = self.shape.dropped if self.cut else ()
        count, number, found = len(names) - len(gone), 0, []
        for index in range(len(names)):
            number += index not in gone
            found.append(f"model-{number:05d}-of-{count:05d}.safetensors")
        return found

    def _trial(self, run: Run, number: int, shape: PrunedShape, report: Report) -> float:
        """Loss on the held windows of a model of this shape, made with all others; kept in the journal.

        Fewer windows would not do: least squares gains with every one, and shapes that lean on it would look worse.
        """
        part = f"trial-{number:05d}"
        if part not in run.finished:
            assert self.windows_ST is not None, "structured methods ask for windows"
            held = max(1, min(HELD_WINDOWS, len(self.windows_ST) // 4))
            seen_ST = self.windows_ST[:-held] if len(self.windows_ST) > held else self.windows_ST
            stream, judge = self._stream(run, "trial", seen_ST), self._stream(run, "held", self.windows_ST[-held:])
            dense = self._stream(run, "trial-dense", seen_ST) if self.dense_stream else None
            assert judge is not None
            plan = Plan(self.steps, self.sizes.targets(shape, False), self.recipe.seed, trial=True)
            compress_blocks(
                self.decoder, plan, stream, dense, riders=[judge], finished=lambda index: None,
                save=lambda block, lines: None, report=silent,
            )  # fmt: skip
            run.finish_part(part, {"loss": _loss(self.decoder, judge)})
            report(Event.TRIAL, shape=_described(shape), **run.finished[part])
        loss: float = run.finished[part]["loss"]
        return loss

    def _tensors(self, block: Block, lines: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The block without what is gone, under its new name; nothing of a block that is gone itself."""
        tensors = super()._tensors(block, lines)
        if block.added:
            tensors |= self._biases(block, tensors)
        if not self.cut:
            return tensors
        if block.index in self.shape.dropped:
            return {}
        cut = self._lines(block.index, lines)
        found = {}
        for name, tensor in tensors.items():
            along, places, _ = cut.get(self.decoder.parameter(name, block.index), (0, None, 0))
            smaller = tensor if places is None else tensor.index_select(along, places).contiguous()
            found[new_name(name, self.decoder.path, block.index, self.shape.dropped)] = smaller
        return found

    def _biases(self, block: Block, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Biases of all matrices of a block whose checkpoint has none: those that were added, zeros for the rest."""
        if any(field not in self.sizes.config for field in BIAS_FIELDS):
            raise InputError(
                f"a config of type {self.sizes.config.get('model_type')} has no {' and '.join(BIAS_FIELDS)}, and "
                f"{self.recipe.method} adds biases: use --set compensate=false"
            )
        names = {self.decoder.parameter(name, block.index): name for name in tensors}
        found = {}
        for linear in block.linears.values():
            bias = f"{linear.name}.bias"
            if bias not in names:
                like = tensors[names[linear.parameter]]
                given = block.module.get_parameter(bias).detach().to("cpu", like.dtype) if bias in block.added else None
                found[names[linear.parameter].removesuffix("weight") + "bias"] = (
                    like.new_zeros(linear.rows) if given is None else given
                )
        return found

    def _lines(self, index: int, lines: list[dict[str, Any]]) -> dict[str, tuple[int, Tensor, int]]:
        kept = {line["matrix"]: line["kept_groups"] for line in lines if "kept_groups" in line}
        anatomy = self.decoder.anatomy.blocks[index]
        found: dict[str, tuple[int, Tensor, int]] = {}
        for unit in self.sizes.units.values():
            found |= unit_axes(unit, anatomy, kept[unit.consumer])
        return found

    def _stored_block(self, run: Run, index: int) -> dict[str, Tensor]:
        """A finished block at full size: what was cut is zero."""
        if not self.cut:
            return super()._stored_block(run, index)
        entry = run.finished[block_part(index)]
        found = self.checkpoint.read(self.decoder.disk_names(index))
        stored = load_file(run.folder / entry["shard"]) if "shard" in entry else {}
        cut, writes = self._lines(index, entry["lines"]), {unit.consumer for unit in self.sizes.units.values()}
        for name, dense in list(found.items()):
            parameter = self.decoder.parameter(name, index)
            along, places, _ = cut.get(parameter, (0, None, 0))
            kept = stored.get(new_name(name, self.decoder.path, index, self.shape.dropped))
            if kept is None:  # of a block that is gone nothing writes to the stream
                found[name] = torch.zeros_like(dense) if parameter.rpartition(".")[0] in writes else dense
            elif places is None:
                found[name] = kept
            else:
                found[name] = torch.zeros_like(dense).index_copy_(along, places, kept)
            bias = new_name(f"{name.removesuffix('weight')}bias", self.decoder.path, index, self.shape.dropped)
            if parameter.rpartition(".")[0] in writes and bias in stored:
                found[f"{name.removesuffix('weight')}bias"] = stored[bias]
        return found

    def _settle_config(self, run: Run) -> None:
        config = dict(self.sizes.config)
        if self.shape.even:
            config = self.sizes.config_for(self.shape)
        elif self.cut:
            full = self.sizes.config_for(self.sizes.shape(self.sizes.neurons, self.sizes.heads, self.shape.dropped))
            config = full | {"quantization_config": quantization({}, self.sizes.matrix_shapes(self.shape))}
        stored = [name for entry in run.finished.values() for name in entry.get("tensors", ())]
        if not self.sizes.config.get("mlp_bias") and any(name.endswith("down_proj.bias") for name in stored):
            config |= dict.fromkeys(BIAS_FIELDS, True)
        write_text(run.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _check(self, run: Run, stream: Stream | None) -> None:
        """Reads the result as any reader would, and compares what it computes for the first window."""
        assert stream is not None and self.windows_ST is not None
        decoder = Decoder(Checkpoint.open(str(run.folder)), self.device, self.decoder.dtype)
        ids_ST = self.windows_ST[:1]
        again = Stream(decoder, ids_ST, name="check")
        forward(decoder, [again])
        wanted_TD, found_TD = stream.hidden.read(slice(0, 1)).float(), again.hidden.read(slice(0, 1)).float()
        error = float((found_TD - wanted_TD).square().sum() / wanted_TD.square().sum())
        if not error <= TOLERANCE[self.decoder.dtype]:
            raise NumericalError(
                f"the smaller model computes something else than the blocks it was cut from (relative squared error "
                f"{error:.1e}): this architecture ties its parts in a way that niwaki does not see; nothing was written"
            )


def _influence(block: Block, stream: Stream) -> float:
    """1 − mean cos(h_in, h_out) over all tokens (ShortGPT, Men et al. 2024), on the way past the block."""
    total, tokens = 0.0, 0
    for rows in stream.slices():
        x_BTD = stream.hidden.read(rows)
        before_BTD = x_BTD.float().clone()
        out_BTD = block.run(stream.call(len(x_BTD), block.index), x_BTD)
        stream.hidden.write(rows, out_BTD)
        total += float(torch.cosine_similarity(before_BTD, out_BTD.float(), dim=-1).double().sum())
        tokens += before_BTD.shape[0] * before_BTD.shape[1]
    return 1 - total / tokens


def _loss(decoder: Decoder, stream: Stream) -> float:
    """Mean negative log-likelihood of a predicted token."""
    total = 0.0
    for row, ids_T in enumerate(stream.ids_ST):
        logits_TV = decoder.logits(stream.ids_ST[row : row + 1], stream.hidden.read(slice(row, row + 1)))[
            0, :-1
        ].float()
        wanted_T1 = ids_T[1:, None].to(logits_TV.device)
        total -= float(logits_TV.log_softmax(-1).gather(1, wanted_T1).double().mean())
    return total / len(stream.ids_ST)


def _described(shape: PrunedShape) -> dict[str, Any]:
    if not shape.even:
        return {"neurons": list(shape.neurons), "heads": list(shape.heads)}
    return {"neurons": max(shape.neurons), "heads": max(shape.heads), "dropped": list(shape.dropped)}
