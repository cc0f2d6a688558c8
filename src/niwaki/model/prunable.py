"""Prunable parts of a decoder that any engine still loads without: whole blocks, heads and neurons.

A *unit* of a block is a matrix that writes to the residual stream (its consumer) with the matrices whose outputs it
reads (its producers). Its groups are the neurons of a dense layer, or the heads that share a key and a value. A removed
group takes columns of the consumer, and rows and biases of the producers. In the full-size block, zero columns of the
consumer have the same effect. So a block is walked at full size and is cut when it is stored.

Units are discovered from the anatomy. A consumer is the only reader of its input, and its producers are the matrices
before it. A config holds one number for all blocks, so it expresses only a shape with equal widths (`pruned_config`).
No list of families is consulted.
"""

import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from niwaki.config.targets import KeepUnits, Kind, PrunableUnit, Target
from niwaki.errors import ArchitectureError, InputError, TargetError
from niwaki.model.anatomy import Anatomy, BlockAnatomy, Linear
from niwaki.model.pruned_config import PrunedConfigs, axis_of, group_indices

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


def block_units(block: BlockAnatomy, config: Any) -> dict[Kind, PrunableUnit]:
    """Find the units of a block by kind; the number of its heads comes from the config of its text model.

    Raises ArchitectureError for a block that has no such units.
    """
    text = config.get_text_config()
    total = getattr(text, "num_attention_heads", None)
    units = units_of(block, 1)
    if not isinstance(total, int) or total < 1:
        raise ArchitectureError(
            f"a config of type {text.model_type} does not say how many heads it has: structured pruning needs one "
            "number for all blocks"
        )
    consumer = block.linears[units["heads"].consumer]
    narrowest = min(block.linears[name].rows for name in units["heads"].producers)
    if consumer.columns % total or narrowest % (consumer.columns // total):
        raise ArchitectureError(
            f"{consumer.name} reads {consumer.columns} channels, which {total} heads do not share evenly: "
            "structured pruning needs heads of one width"
        )
    return units_of(block, narrowest // (consumer.columns // total))


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

    All widths are multiples of `columns_multiple`. `cuts`: what blocks with widths of their own lose leaves the file,
    else zeros are stored in its place.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        skeleton: Any,
        config: Mapping[str, Any],
        columns_multiple: int = 1,
        *,
        cuts: bool = True,
    ) -> None:
        if len(set(map(id, anatomy.blocks))) > 1:
            raise ArchitectureError("the blocks of this decoder differ: structured pruning needs blocks of one shape")
        self.anatomy, self.config, self.columns_multiple, self.cuts = anatomy, config, columns_multiple, cuts
        self.units = block_units(anatomy.blocks[0], skeleton.config)
        self.configs = PrunedConfigs(anatomy, self.units, skeleton.config, config)
        self.dtype: torch.dtype = skeleton.dtype
        prefix = anatomy.prefix(0)
        self._shapes = {n.removeprefix(prefix): p.shape for n, p in skeleton.named_parameters() if n.startswith(prefix)}
        self.block_parameters: int = sum(shape.numel() for shape in self._shapes.values())

    @cached_property
    def group_parameters(self) -> dict[Kind, int]:
        """Return the parameters of one group of each kind: rows, columns, biases, and vectors with a value per head."""
        return {kind: self._of_group(kind) for kind in self.units}

    def _of_group(self, kind: Kind) -> int:
        unit = self.units[kind]
        matrices = [self.anatomy.blocks[0].linears[name] for name in (*unit.producers, unit.consumer)]
        lost: int = sum(m.rows * m.columns for m in matrices)
        biases = [f"{name}.bias" for name in unit.producers]
        lost += sum(int(self._shapes[name].numel()) for name in biases if name in self._shapes)
        beside = sum(int(self._shapes[name].numel()) for name in self.followers(kind))
        return (lost + beside) // unit.count

    def followers(self, kind: Kind) -> dict[str, tuple[int, int]]:
        """Return dimension of the groups and full size of parameters that are cut beside the matrices, by name."""
        known = {linear.parameter for linear in self.anatomy.blocks[0].linears.values()}
        known |= {f"{name}.bias" for name in self.anatomy.blocks[0].linears}
        if all(name in known or shape.numel() < self.units[kind].count for name, shape in self._shapes.items()):
            return {}
        self.even_problem(kind)
        return {n: (along, self._shapes[n][along]) for n, along in self.configs.followers.get(kind, {}).items()}

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
        exact = self.shape(self.neurons, heads, dropped)
        if self.removed_frac(exact) >= removed_frac - 1e-9:
            return exact
        if self.even_problem("neurons"):
            return None
        shapes = (self.shape(n, heads, dropped) for n in range(self.neurons // multiple * multiple, 0, -multiple))
        return next((s for s in shapes if self.removed_frac(s) >= removed_frac - 1e-9), None)

    def legal_heads(self) -> list[int]:
        """Return the numbers of groups of heads that a config can hold with legal widths. The full number is first."""
        fewer = range(self.heads - 1, 0, -1)
        legal = [n for n in fewer if n % self.heads_multiple == 0 and not self._problem(self.shape(self.neurons, n))]
        return [self.heads, *legal]

    def even_problem(self, kind: Kind) -> str:
        """Return why no config holds fewer groups of a kind in all blocks; empty if one does."""
        full = self.units[kind].count
        if kind == "heads":
            problems = [self._problem(self.shape(self.neurons, heads)) for heads in range(full - 1, 0, -1)]
            return problems[0] if problems and all(problems) else ""
        return "" if full == 1 else self._problem(self.shape(full - full // 2, self.heads))

    @cached_property
    def drop_problem(self) -> str:
        """Return why no config holds fewer blocks; empty if one does. The first goes, so that all others move."""
        return "there is one block" if len(self) == 1 else self._problem(self.shape(self.neurons, self.heads, (0,)))

    @cached_property
    def movable_kinds(self) -> tuple[Kind, ...]:
        """Return the kinds of which blocks can keep different numbers, as zeros or in niwaki's own form."""
        kinds: tuple[Kind, ...] = ("neurons", "heads")
        return tuple(kind for kind in kinds if not self.cuts or not self.configs.uneven_problem(kind))

    @property
    def problems(self) -> list[str]:
        """Return why heads, neurons or blocks stay, as far as a search has asked."""
        asked = self.units if self.cuts and "movable_kinds" in vars(self) else ()
        uneven = [self.configs.uneven_problem(kind) for kind in asked]
        return list(dict.fromkeys([*self.configs.problems, *filter(None, uneven)]))

    def check(self, shape: PrunedShape, cut: bool) -> None:
        """Raise InputError with the tensor at fault if what is left of a shape cannot be stored."""
        if not cut:
            return
        self.config_for(shape if shape.even else self.shape(self.neurons, self.heads, shape.dropped))
        if shape.even:
            return
        for kind, unit in self.units.items():
            problem = self.configs.uneven_problem(kind)
            if problem and any(count not in (0, unit.count) for count in shape.kept(kind)):
                raise InputError(
                    f"blocks with different numbers of {kind} cannot be cut ({problem}): use --pack none, which stores "
                    "zeros in their place, or a method with equal widths (comp, wanda_sp)"
                )

    def no_shape(self, target: Any, method: str) -> TargetError:
        """Return the error of a search that ended without a shape, with the reasons of what stays."""
        stays = "".join(f"; {problem}" for problem in self.problems)
        return TargetError(
            f"target {target}: {method} finds no shape that removes this share and leaves a block, a head and a "
            f"neuron: lower the target, or let more blocks and heads go{stays}"
        )

    def _problem(self, shape: PrunedShape) -> str:
        try:
            self.config_for(shape)
        except InputError as error:
            return str(error)
        return ""

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

    def config_for(self, shape: PrunedShape, also: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the content of config.json for an even shape, with further fields.

        Raises InputError for a shape that it cannot express.
        """
        counts: dict[Kind, int] = {"neurons": max(shape.neurons), "heads": max(shape.heads)}
        return self.configs.find(counts, shape.dropped, also)


def unit_axes(
    unit: PrunableUnit, block: BlockAnatomy, groups: Sequence[int], followers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, Tensor, int]]:
    """Return dimension, indices of the groups and full size of each parameter, biases of producers included.

    `followers`: dimension and full size of parameters beside them that are cut too.
    """
    found = {name: (along, group_indices(unit, groups, size), size) for name, (along, size) in followers.items()}
    for name in (*unit.producers, unit.consumer):
        linear = block.linears[name]
        along, size = axis_of(linear, unit)
        found[linear.parameter] = along, group_indices(unit, groups, size), size
        if name != unit.consumer:
            found[f"{name}.bias"] = 0, group_indices(unit, groups, size), size
    return found


def new_name(name: str, path: str, index: int, dropped: Sequence[int]) -> str:
    """Return the name on disk of a tensor of block `index` after the blocks `dropped` are gone."""
    list_name = re.escape(path.rpartition(".")[2])
    moved = index - sum(gone < index for gone in dropped)
    return re.sub(rf"(^|\.)({list_name})\.{index}\.", rf"\g<1>\g<2>.{moved}.", name, count=1)
