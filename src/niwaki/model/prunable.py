"""What of a decoder can be made smaller so that any engine still loads it: whole blocks, heads, and neurons.

In every block a *unit* is a matrix that writes to the residual stream (its consumer) together with the matrices whose
outputs it reads (its producers): the neurons of a dense layer, or the groups of heads that share a key and a value. A
removed group takes columns of the consumer, rows and biases of the producers. In the full-size block the same is said
by zero columns of the consumer, so a block is walked at full size and cut when it is stored.

Units are discovered from the anatomy: a consumer is alone in reading its input; its producers are the matrices that
were met before it. Configs hold one number for all blocks, so only a shape with equal widths can be cut. Whether a
config can hold it is decided by building the model that it describes, not by a list of families.
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

from niwaki.config.recipe import KeepUnits, Kind, Target, Unit
from niwaki.errors import ArchitectureError, InputError
from niwaki.model.anatomy import Anatomy, BlockAnatomy, Linear
from niwaki.model.hf import build_skeleton

NEURON_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
WIDE_NEURONS = 8192  # from here on widths are rounded to 256 columns, which large matrices run fastest with


@dataclass(frozen=True)
class PrunedShape:
    """How many neurons and groups of heads every block keeps; a block that keeps none of either is gone."""

    neurons: tuple[int, ...]
    heads: tuple[int, ...]

    def kept(self, kind: Kind) -> tuple[int, ...]:
        """What every block keeps of one kind."""
        return self.neurons if kind == "neurons" else self.heads

    @property
    def dropped(self) -> tuple[int, ...]:
        """The blocks that are gone."""
        return tuple(i for i, pair in enumerate(zip(self.neurons, self.heads, strict=True)) if not any(pair))

    @property
    def even(self) -> bool:
        """Whether all other blocks are equal, so that a config can hold it."""
        left = {pair for pair in zip(self.neurons, self.heads, strict=True) if any(pair)}
        return len(left) == 1 and all(next(iter(left)))

    @property
    def whole(self) -> bool:
        """Whether all other blocks keep some of both."""
        return all(all(pair) for pair in zip(self.neurons, self.heads, strict=True) if any(pair))

    def __str__(self) -> str:
        if not self.even:
            return f"{self.neurons} neurons and {self.heads} groups of heads"
        gone = f" without blocks {', '.join(map(str, self.dropped))}" if self.dropped else ""
        return f"{max(self.neurons)} neurons and {max(self.heads)} groups of heads{gone}"


@dataclass(frozen=True)
class BlockInfo:
    """What is known of a dense block: 1 − mean cos(h_in, h_out), and what the method found."""

    influence: float
    found: Any = None


# Shapes to try, the loss of each sent back, the shape that is taken returned.
ShapeSearch = Generator[list[PrunedShape], list[float], PrunedShape | None]


def units_of(block: BlockAnatomy, heads: int) -> dict[Kind, Unit]:
    """The units of a block by kind; its keys and values come in `heads` groups.

    Raises ArchitectureError for a block that is not one attention and one dense layer of plain matrices.
    """
    found: dict[Kind, Unit] = {}
    for before, members in pairwise(block.groups.values()):
        consumer = members[0]
        writers = {unit.consumer for unit in found.values()}
        if len(members) > 1 or before[0].name in writers or not _feeds(before, consumer):
            continue
        kind: Kind = "heads" if len(before) == 3 else "neurons"
        if kind in found or any(linear.expert is not None for linear in (*before, consumer)):
            break
        count = heads if kind == "heads" else consumer.columns
        found[kind] = Unit(kind, consumer.name, tuple(linear.name for linear in before), count)
    if len(found) < 2 or sum(1 + len(unit.producers) for unit in found.values()) < len(block.linears):
        raise ArchitectureError(
            f"structured pruning needs blocks of one attention (q, k and v apart) and one dense layer, got "
            f"{', '.join(block.linears)}"
        )
    return found


def _feeds(producers: Sequence[Linear], consumer: Linear) -> bool:
    """Whether these can be what writes the consumer's input: q, k and v, or one or two matrices of its width."""
    rows = [linear.rows for linear in producers]
    if len(rows) == 3:
        return max(rows) == consumer.columns and all(consumer.columns % r == 0 for r in rows)
    return all(r == consumer.columns for r in rows) and producers[0].columns == consumer.rows


class ShapeSpace:
    """How many parameters the blocks of a decoder keep at a shape, and which shapes its config can hold.

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

    def _of_group(self, unit: Unit, shapes: Mapping[str, torch.Size]) -> int:
        names = [f"{name}.bias" for name in unit.producers]
        matrices = [self.anatomy.blocks[0].linears[name] for name in (*unit.producers, unit.consumer)]
        lost = sum(m.rows * m.columns for m in matrices) + sum(shapes[n].numel() for n in names if n in shapes)
        return lost // unit.count

    def __len__(self) -> int:
        return len(self.anatomy.blocks)

    @property
    def neurons(self) -> int:
        """Neurons of a block."""
        return self.units["neurons"].count

    @property
    def heads(self) -> int:
        """Groups of heads of a block."""
        return self.units["heads"].count

    def multiple(self, asked: int) -> int:
        """What numbers of neurons are a multiple of; `asked` 0 is the default."""
        return math.lcm(asked or (256 if self.neurons >= WIDE_NEURONS else 8), self.columns_multiple)

    @property
    def heads_multiple(self) -> int:
        """What numbers of groups of heads are a multiple of."""
        unit = self.units["heads"]
        width = self.anatomy.blocks[0].linears[unit.consumer].columns // unit.count
        return self.columns_multiple // math.gcd(self.columns_multiple, width)

    def shape(self, neurons: int, heads: int, dropped: Sequence[int] = ()) -> PrunedShape:
        """The same for every block but the dropped ones."""
        kept = [index not in dropped for index in range(len(self))]
        return PrunedShape(tuple(neurons * k for k in kept), tuple(heads * k for k in kept))

    def removed(self, shape: PrunedShape) -> int:
        """How many parameters of all blocks a shape removes."""
        lost: int = len(shape.dropped) * self.block_parameters
        for index, (neurons, heads) in enumerate(zip(shape.neurons, shape.heads, strict=True)):
            if index not in shape.dropped:
                lost += (self.neurons - neurons) * self.group_parameters["neurons"]
                lost += (self.heads - heads) * self.group_parameters["heads"]
        return lost

    def removed_frac(self, shape: PrunedShape) -> float:
        """`removed` as a share of all parameters of the blocks."""
        return self.removed(shape) / (len(self) * self.block_parameters)

    def rounded(self, kind: Kind, kept: float, asked: int) -> int:
        """The nearest legal number of neurons (`asked`: see `multiple`) or groups of heads, not none, not too many."""
        step = self.multiple(asked) if kind == "neurons" else self.heads_multiple
        return max(step, min(round(kept / step) * step, self.units[kind].count))

    def fitting(self, removed_frac: float, heads: int, dropped: Sequence[int], multiple: int) -> PrunedShape | None:
        """The widest such shape, neurons a multiple, that removes at least so much; None if there is none."""
        multiple = self.multiple(multiple)
        shapes = (self.shape(n, heads, dropped) for n in range(self.neurons // multiple * multiple, 0, -multiple))
        exact = [self.shape(self.neurons, heads, dropped)]
        return next((s for s in (*exact, *shapes) if self.removed_frac(s) >= removed_frac - 1e-9), None)

    def legal_heads(self) -> list[int]:
        """Numbers of groups of heads that a config can hold and that make legal widths, all of them first."""
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
        """Block → matrix → what its unit keeps, as allocations give targets; `cut`: what goes leaves the file."""
        found: list[dict[str, Target]] = []
        for pair in zip(shape.neurons, shape.heads, strict=True):
            counts = dict(zip(("neurons", "heads"), pair, strict=True))
            keeps = [KeepUnits(unit, counts[kind], cut) for kind, unit in self.units.items()]
            found.append({name: keep for keep in keeps for name in (*keep.unit.producers, keep.unit.consumer)})
        return found

    def matrix_shapes(self, shape: PrunedShape) -> dict[str, list[int]]:
        """Module → outputs and inputs of every matrix of the blocks that are left, by its name in the result."""
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
        """The content of config.json for an even shape. Raises InputError naming what cannot be said in it.

        A Llama whose number of heads does not divide its width is written as a Mistral without a window, the same
        model.
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
        """Why the model that `config` describes does not have this shape; empty if it has."""
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


def _axis(linear: Linear, unit: Unit) -> tuple[int, int]:
    """The dimension of a stored matrix along which the groups of its unit lie, and its size."""
    consumes = linear.name == unit.consumer
    return int(consumes != linear.transposed), linear.columns if consumes else linear.rows


def places(unit: Unit, groups: Sequence[int], size: int) -> Tensor:
    """The rows or columns of `groups` in a matrix that has `size` of them."""
    width = size // unit.count
    return (torch.tensor(groups, dtype=torch.int64)[:, None] * width + torch.arange(width)).view(-1)


def lines_of(unit: Unit, block: BlockAnatomy, groups: Sequence[int]) -> dict[str, tuple[int, Tensor, int]]:
    """Parameter → dimension, places of the groups along it, and its full size; biases of producers included."""
    found = {}
    for name in (*unit.producers, unit.consumer):
        linear = block.linears[name]
        along, size = _axis(linear, unit)
        found[linear.parameter] = along, places(unit, groups, size), size
        if name != unit.consumer:
            found[f"{name}.bias"] = 0, places(unit, groups, size), size
    return found


def new_name(name: str, path: str, index: int, dropped: Sequence[int]) -> str:
    """What a tensor of block `index` is called on disk when the blocks `dropped` are gone."""
    place = re.escape(path.rpartition(".")[2])
    moved = index - sum(gone < index for gone in dropped)
    return re.sub(rf"(^|\.)({place})\.{index}\.", rf"\g<1>\g<2>.{moved}.", name, count=1)
