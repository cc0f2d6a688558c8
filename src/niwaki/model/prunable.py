"""Prunable parts of a decoder that any engine still loads without: whole blocks, heads and neurons.

A *unit* of a block is a matrix that writes to the residual stream (its consumer) with the matrices whose outputs it
reads (its producers). Its groups are the neurons of a dense layer, or the heads that share a key and a value. A removed
group takes columns of the consumer, and rows and biases of the producers. In the full-size block, zero columns of the
consumer have the same effect. So a block is walked at full size and is cut when it is stored.

Units are discovered from the anatomy. A consumer is the only reader of its input, and its producers are the matrices
before it. A config holds one number for all blocks, so it expresses only a shape with equal widths. To decide if a
config can hold a shape, the model that it describes is built. No list of families is consulted.
"""

import copy
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Kind, PrunableUnit, Target
from niwaki.errors import ArchitectureError, InputError
from niwaki.model.anatomy import Anatomy, BlockAnatomy, Linear
from niwaki.model.hf import build_skeleton

NEURON_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
WIDE_NEURONS = 8192  # from this width on, widths are multiples of 256, with which large matrices run fastest


@dataclass(frozen=True)
class PrunedShape:
    """Numbers of neurons and groups of heads that each block keeps. A block that keeps none of both is dropped."""

    neurons: tuple[int, ...]
    heads: tuple[int, ...]

    def kept(self, kind: Kind) -> tuple[int, ...]:
        """Return the number of groups of one kind that each block keeps."""
        return self.neurons if kind == "neurons" else self.heads

    @property
    def dropped(self) -> tuple[int, ...]:
        """Return the dropped blocks."""
        return tuple(i for i, pair in enumerate(zip(self.neurons, self.heads, strict=True)) if not any(pair))

    @property
    def even(self) -> bool:
        """Return True if all other blocks are equal, so that a config can hold the shape."""
        left = {pair for pair in zip(self.neurons, self.heads, strict=True) if any(pair)}
        return len(left) == 1 and all(next(iter(left)))

    @property
    def whole(self) -> bool:
        """Return True if all other blocks keep some neurons and some heads."""
        return all(all(pair) for pair in zip(self.neurons, self.heads, strict=True) if any(pair))

    def __str__(self) -> str:
        if not self.even:
            return f"{self.neurons} neurons and {self.heads} groups of heads"
        gone = f" without blocks {', '.join(map(str, self.dropped))}" if self.dropped else ""
        return f"{max(self.neurons)} neurons and {max(self.heads)} groups of heads{gone}"


@dataclass(frozen=True)
class BlockInfo:
    """Facts on a dense block: its influence 1 − mean cos(h_in, h_out), and the result of the method's own scan."""

    influence: float
    found: Any = None


# Yields shapes to evaluate, is sent the loss of each, and returns the chosen shape.
ShapeSearch = Generator[list[PrunedShape], list[float], PrunedShape | None]


def units_of(block: BlockAnatomy, heads: int) -> dict[Kind, PrunableUnit]:
    """Find the units of a block by kind. Its keys and values have `heads` groups.

    Raises ArchitectureError for a block that is not one attention and one dense layer of plain matrices.
    """
    found: dict[Kind, PrunableUnit] = {}
    for before, members in pairwise(block.groups.values()):
        consumer = members[0]
        writers = {unit.consumer for unit in found.values()}
        if len(members) > 1 or before[0].name in writers or not _feeds(before, consumer):
            continue
        kind: Kind = "heads" if len(before) == 3 else "neurons"
        if kind in found or any(linear.expert is not None for linear in (*before, consumer)):
            break
        count = heads if kind == "heads" else consumer.columns
        found[kind] = PrunableUnit(kind, consumer.name, tuple(linear.name for linear in before), count)
    if len(found) < 2 or sum(1 + len(unit.producers) for unit in found.values()) < len(block.linears):
        raise ArchitectureError(
            f"structured pruning needs blocks of one attention (q, k and v apart) and one dense layer, got "
            f"{', '.join(block.linears)}"
        )
    return found


def _feeds(producers: Sequence[Linear], consumer: Linear) -> bool:
    """Return True if `producers` can write the input of the consumer.

    They are q, k and v, or one or two matrices of its width.
    """
    rows = [linear.rows for linear in producers]
    if len(rows) == 3:
        return max(rows) == consumer.columns and all(consumer.columns % r == 0 for r in rows)
    return all(r == consumer.columns for r in rows) and producers[0].columns == consumer.rows


class ShapeSpace:
    """Shapes that a decoder can take: their parameter counts, and the configs that can hold them.

    All widths are multiples of `columns_multiple`.
    """

    def __init__(self, anatomy: Anatomy, skeleton: Any, config: Mapping[str, Any], columns_multiple: int = 1) -> None:
        if len(set(map(id, anatomy.blocks))) > 1:
            raise ArchitectureError("the blocks of this decoder differ: structured pruning needs blocks of one shape")
        self.anatomy, self.config, self.columns_multiple = anatomy, config, columns_multiple
        text = skeleton.config.get_text_config()
        self.units = units_of(anatomy.blocks[0], getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        self.dtype: torch.dtype = skeleton.dtype
        prefix = anatomy.prefix(0)
        shapes = {n.removeprefix(prefix): p.shape for n, p in skeleton.named_parameters() if n.startswith(prefix)}
        self.block_parameters: int = sum(shape.numel() for shape in shapes.values())
        self.group_parameters = {kind: self._of_group(unit, shapes) for kind, unit in self.units.items()}

    def _of_group(self, unit: PrunableUnit, shapes: Mapping[str, torch.Size]) -> int:
        names = [f"{name}.bias" for name in unit.producers]
        matrices = [self.anatomy.blocks[0].linears[name] for name in (*unit.producers, unit.consumer)]
        lost = sum(m.rows * m.columns for m in matrices) + sum(shapes[n].numel() for n in names if n in shapes)
        return lost // unit.count

    def __len__(self) -> int:
        return len(self.anatomy.blocks)

    @property
    def neurons(self) -> int:
        """Return the number of neurons of a block."""
        return self.units["neurons"].count

    @property
    def heads(self) -> int:
        """Return the number of groups of heads of a block."""
        return self.units["heads"].count

    def multiple(self, requested: int) -> int:
        """Return the number that divides each number of neurons. `requested` 0 takes the default."""
        return math.lcm(requested or (256 if self.neurons >= WIDE_NEURONS else 8), self.columns_multiple)

    @property
    def heads_multiple(self) -> int:
        """Return the number that divides each number of groups of heads."""
        unit = self.units["heads"]
        width = self.anatomy.blocks[0].linears[unit.consumer].columns // unit.count
        return self.columns_multiple // math.gcd(self.columns_multiple, width)

    def shape(self, neurons: int, heads: int, dropped: Sequence[int] = ()) -> PrunedShape:
        """Return the shape with these widths in each block except the dropped ones."""
        kept = [index not in dropped for index in range(len(self))]
        return PrunedShape(tuple(neurons * k for k in kept), tuple(heads * k for k in kept))

    def removed(self, shape: PrunedShape) -> int:
        """Count the parameters of all blocks that a shape removes."""
        lost: int = len(shape.dropped) * self.block_parameters
        for index, (neurons, heads) in enumerate(zip(shape.neurons, shape.heads, strict=True)):
            if index not in shape.dropped:
                lost += (self.neurons - neurons) * self.group_parameters["neurons"]
                lost += (self.heads - heads) * self.group_parameters["heads"]
        return lost

    def removed_frac(self, shape: PrunedShape) -> float:
        """Return `removed` as a fraction of all parameters of the blocks."""
        return self.removed(shape) / (len(self) * self.block_parameters)

    def rounded(self, kind: Kind, kept: float, requested: int) -> int:
        """Round to the nearest legal number of neurons (`requested`: see `multiple`) or head groups, min one step."""
        step = self.multiple(requested) if kind == "neurons" else self.heads_multiple
        return max(step, min(round(kept / step) * step, self.units[kind].count))

    def fitting(self, removed_frac: float, heads: int, dropped: Sequence[int], multiple: int) -> PrunedShape | None:
        """Return the widest shape that removes at least `removed_frac`, or None.

        Its number of neurons is a multiple of `multiple`.
        """
        multiple = self.multiple(multiple)
        shapes = (self.shape(n, heads, dropped) for n in range(self.neurons // multiple * multiple, 0, -multiple))
        exact = [self.shape(self.neurons, heads, dropped)]
        return next((s for s in (*exact, *shapes) if self.removed_frac(s) >= removed_frac - 1e-9), None)

    def legal_heads(self) -> list[int]:
        """Return the numbers of groups of heads that a config can hold with legal widths. The full number is first."""
        found = [self.heads]
        for heads in range(self.heads - 1, 0, -1):
            if heads % self.heads_multiple:
                continue
            try:
                self.config_for(self.shape(self.neurons, heads))
            except InputError:
                continue
            found.append(heads)
        return found

    def targets(self, shape: PrunedShape, cut: bool) -> list[dict[str, Target]]:
        """Return the target of each matrix of each block. With `cut`, removed groups leave the file."""
        found: list[dict[str, Target]] = []
        for pair in zip(shape.neurons, shape.heads, strict=True):
            counts = dict(zip(("neurons", "heads"), pair, strict=True))
            keeps = [KeepUnits(unit, counts[kind], cut) for kind, unit in self.units.items()]
            found.append({name: keep for keep in keeps for name in (*keep.unit.producers, keep.unit.consumer)})
        return found

    def matrix_shapes(self, shape: PrunedShape) -> dict[str, list[int]]:
        """Return outputs and inputs of each matrix in the remaining blocks, by its module name in the result."""
        left = (pair for pair in zip(shape.neurons, shape.heads, strict=True) if any(pair))
        found = {}
        for index, pair in enumerate(left):
            counts = dict(zip(("neurons", "heads"), pair, strict=True))
            for kind, unit in self.units.items():
                for name in (*unit.producers, unit.consumer):
                    linear = self.anatomy.blocks[0].linears[name]
                    size = [linear.rows, linear.columns]
                    along = int(name == unit.consumer)
                    size[along] = size[along] // unit.count * counts[kind]
                    found[f"{self.anatomy.path}.{index}.{name}"] = size
        return found

    def config_for(self, shape: PrunedShape) -> dict[str, Any]:
        """Return the content of config.json for an even shape. Raises InputError for a shape that it cannot express.

        A Llama whose number of heads does not divide its width is written as a Mistral without a window, which is the
        same model.
        """
        text = self.config.get("text_config", self.config)
        changed = dict(text)
        if (neurons := max(shape.neurons)) != self.neurons:
            changed[_field(text, NEURON_FIELDS, self.neurons, "neurons")] = neurons
        if shape.dropped:
            changed[_field(text, DEPTH_FIELDS, len(self), "blocks")] = len(self) - len(shape.dropped)
            for name, value in text.items():
                if isinstance(value, list) and len(value) == len(self):
                    changed[name] = [item for index, item in enumerate(value) if index not in shape.dropped]
        if (heads := max(shape.heads)) != self.heads:
            changed |= {name: text[name] // self.heads * heads for name in HEAD_FIELDS if text.get(name)}
            changed["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        tried = [changed]
        if text.get("model_type") == "llama" and not text.get("attention_bias") and not text.get("mlp_bias"):
            twin = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
            tried.append(changed | twin)
        for candidate in tried:
            whole = {**self.config, "text_config": candidate} if "text_config" in self.config else candidate
            if not (problem := self._problem(whole, shape)):
                return whole
        fields = " and ".join(name for name in (*HEAD_FIELDS, *NEURON_FIELDS) if name in text)
        raise InputError(
            f"{fields} in a config of type {text.get('model_type')} cannot express {shape} ({problem}): widths that "
            "niwaki stores itself can (--allocation searched), and for Llama-like models their export --to gguf"
        )

    def _problem(self, config: Mapping[str, Any], shape: PrunedShape) -> str:
        """Return the reason why the model of `config` does not have this shape, empty if it has it."""
        from transformers import AutoConfig

        values = copy.deepcopy(dict(config))
        try:
            skeleton = build_skeleton(AutoConfig.for_model(values.pop("model_type"), **values), self.dtype)
        except Exception as error:  # configs are validated by several libraries
            return " ".join(str(error).split())[:200]
        parameters = dict(skeleton.named_parameters())
        counts = {"neurons": max(shape.neurons), "heads": max(shape.heads)}
        for kind, unit in self.units.items():
            for name in (*unit.producers, unit.consumer):
                linear = self.anatomy.blocks[0].linears[name]
                built = parameters[f"{self.anatomy.path}.0.{linear.parameter}"]
                along, size = _axis(linear, unit)
                if built.shape[along] != size // unit.count * counts[kind]:
                    return f"{name} would have {built.shape[along]} of {size} {kind} rows or columns"
        return ""


def _field(config: Mapping[str, Any], names: Sequence[str], value: int, what: str) -> str:
    for name in names:
        if config.get(name) == value:
            return name
    raise InputError(
        f"config.json says {value} {what} in none of {', '.join(names)}, so it cannot say another number: use a method "
        f"that leaves the {what} as they are"
    )


def _axis(linear: Linear, unit: PrunableUnit) -> tuple[int, int]:
    """Return the dimension of a stored matrix along which the groups of its unit lie, and its size."""
    consumes = linear.name == unit.consumer
    return int(consumes != linear.transposed), linear.columns if consumes else linear.rows


def group_indices(unit: PrunableUnit, groups: Sequence[int], size: int) -> Tensor:
    """Return the rows or columns of `groups` in a matrix that has `size` of them."""
    width = size // unit.count
    return (torch.tensor(groups, dtype=torch.int64)[:, None] * width + torch.arange(width)).view(-1)


def unit_axes(unit: PrunableUnit, block: BlockAnatomy, groups: Sequence[int]) -> dict[str, tuple[int, Tensor, int]]:
    """Return dimension, indices of the groups and full size of each parameter, biases of producers included."""
    found = {}
    for name in (*unit.producers, unit.consumer):
        linear = block.linears[name]
        along, size = _axis(linear, unit)
        found[linear.parameter] = along, group_indices(unit, groups, size), size
        if name != unit.consumer:
            found[f"{name}.bias"] = 0, group_indices(unit, groups, size), size
    return found


def new_name(name: str, path: str, index: int, dropped: Sequence[int]) -> str:
    """Return the name on disk of a tensor of block `index` after the blocks `dropped` are gone."""
    list_name = re.escape(path.rpartition(".")[2])
    moved = index - sum(gone < index for gone in dropped)
    return re.sub(rf"(^|\.)({list_name})\.{index}\.", rf"\g<1>\g<2>.{moved}.", name, count=1)
