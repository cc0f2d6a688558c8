"""Blocks without the heads and neurons that a sequence does not need: smaller matrices in the place of the full ones.

The matrices are copied once for a sequence, rows of those that make a unit and columns of the one that reads it, all
in the layout that the model has: torch multiplies bfloat16 on a CPU some hundred times slower in the other one. Nothing
of a model is written twice: attention modules take the number of heads from the shapes they meet, or from an attribute
that is scaled along. Keys and values in the cache lose the same heads. In a batch every sequence has heads of its own:
together they need nearly all, so the full matrices run and each takes its part of what they put out; keys, values and
attention are only its own.

Between two forwards the model is always the full one: `applied` puts the small matrices in for the time of a call.

Legend: O outputs, I inputs, B sequences, T tokens, D hidden size, G units of a kind in one block, K those that stay, W
width of a unit, C channels of a head.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.config.recipe import Unit
from niwaki.errors import ArchitectureError
from niwaki.kernels.types import MAX_TOKENS
from niwaki.runtime.contextual.small_linear import (
    CompactLinear,
    KeptColumns,
    KeptGate,
    KeptRows,
    PickedColumns,
    PickedRows,
    find_gate,
)
from niwaki.runtime.contextual.units import Layout

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16
HEAD_ATTRIBUTES = ("num_heads", "num_key_value_heads")


class Buffers:
    """Memory for copies, by block and matrix. It lasts from one sequence to the next: to map fresh memory takes longer
    than to fill it, and what has its place for good can be part of a CUDA graph. A new mask overwrites the one before.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[int, str], Tensor] = {}
        self.gates: dict[type, tuple[int, str] | None] = {}  # what `find_gate` found of a kind of layer

    def take(self, key: tuple[int, str], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for a tensor of this shape, of the dtype and on the device of another."""
        flat, size = self._flat.get(key), prod(shape)
        if flat is None or len(flat) < size or flat.dtype != like.dtype or flat.device != like.device:
            self._flat[key] = flat = like.new_empty(size)
        return flat[:size].view(shape)

    def hold(self, key: tuple[int, str], value: Tensor) -> Tensor:
        """A copy of `value` in its place."""
        return self.take(key, tuple(value.shape), value).copy_(value)

    def rows(self, key: tuple[int, str], W_OI: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a matrix."""
        return torch.index_select(W_OI, 0, rows, out=self.take(key, (len(rows), W_OI.shape[1]), W_OI))

    def columns(self, key: tuple[int, str], W_OI: Tensor, columns: Tensor) -> Tensor:
        """Some columns of a matrix; NumPy gathers them ten times as fast as torch does on a CPU."""
        small = self.take(key, (len(W_OI), len(columns)), W_OI)
        if W_OI.is_cuda:
            return torch.index_select(W_OI, 1, columns, out=small)
        bits = INTEGERS[W_OI.element_size()]
        np.take(W_OI.view(bits).numpy(), columns.numpy(), axis=1, out=small.view(bits).numpy(), mode="clip")
        return small


@dataclass(frozen=True)
class Swap:
    """A name in the children of a module and what stands there, or a number among its attributes."""

    owner: nn.Module
    name: str
    value: Any


class Compact:
    """The small matrices of all blocks for one mask."""

    def __init__(self, swaps: list[Swap]) -> None:
        self.swaps = swaps

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with them inside."""
        before = self.enter()
        try:
            yield
        finally:
            leave(before)

    def enter(self) -> list[Swap]:
        """Puts them in; returns what `leave` puts back."""
        return _exchange(self.swaps)

    @property
    def modules(self) -> list[nn.Module]:
        """All that multiplies."""
        return [part for swap in self.swaps if isinstance(swap.value, nn.Module) for part in swap.value.modules()]

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Address and shape of what the mask filled in: equal where a recorded graph reads the right memory."""
        return tuple(
            module.place for module in self.modules if isinstance(module, CompactLinear | KeptRows | PickedRows)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(module.weight_OI.nbytes for module in self.modules if isinstance(module, CompactLinear))


def leave(before: list[Swap]) -> None:
    """Puts back what `Compact.enter` returned."""
    _exchange(before)


def _exchange(swaps: list[Swap]) -> list[Swap]:
    """Straight into the tables of modules: setting attributes would cost a millisecond a token."""
    before = []
    for swap in swaps:
        table: dict[str, Any] = swap.owner._modules if isinstance(swap.value, nn.Module) else vars(swap.owner)
        before.append(Swap(swap.owner, swap.name, table[swap.name]))
        table[swap.name] = swap.value
    return before


def check_linears(blocks: nn.ModuleList, layout: Layout) -> None:
    """Raises ArchitectureError for matrices that are no nn.Linear."""
    for block in blocks:
        for unit in layout.units.values():
            for name in (*unit.producers, unit.consumer):
                part = block.get_submodule(name)
                if not isinstance(part, nn.Linear):
                    raise ArchitectureError(f"{name} is a {type(part).__name__}: only plain linear layers are cut")


@torch.no_grad()
def compact(
    blocks: nn.ModuleList,
    layout: Layout,
    heads_BLG: Tensor,
    neurons_LG: Tensor,
    buffers: Buffers,
    mean_fills: Mapping[int, Tensor] | None = None,
    *,
    in_place: bool = False,
) -> Compact:
    """Copies the units that are true into `buffers`. All sequences must keep equally many heads of a block. The masks
    lie on the CPU: they are read here, and a GPU would have to be waited for each time.

    `mean_fills`: by block, activations [B, I] that take the place of those of skipped neurons. `in_place`: rows and the
    columns of heads are not copied but read where they are, for batches that the kernels take; only columns of single
    neurons, which lie two bytes apart, are copied.
    """
    swaps: list[Swap] = []
    device = next(blocks.parameters()).device
    heads, neurons = Places(heads_BLG[0], device), Places(neurons_LG, device)
    groups, same_L = own_groups(heads_BLG, device), (heads_BLG == heads_BLG[:1]).all(2).all(0).tolist()
    in_place = in_place and len(heads_BLG) <= MAX_TOKENS
    for index, block in enumerate(blocks):
        if not bool(heads.kept_LG[index].all()):
            own_BK = None if same_L[index] else groups[index]
            swaps += _heads(_Part(index, block, buffers, heads, in_place), layout.units["heads"], own_BK)
        if not bool(neurons.kept_LG[index].all()):
            mean_BI = None if mean_fills is None else mean_fills[index]
            swaps += _neurons(_Part(index, block, buffers, neurons, in_place), layout.units["neurons"], mean_BI)
    return Compact(swaps)


class Places:
    """Where the kept units of a kind lie in the matrices of every block; found for all blocks at once."""

    def __init__(self, kept_LG: Tensor, device: torch.device) -> None:
        self.kept_LG, self.device = kept_LG, device
        self._found: dict[int, tuple[Tensor, ...]] = {}

    def of(self, index: int, size: int) -> Tensor:
        """In the matrices of block `index` that have `size` rows or columns of these units."""
        if size not in self._found:
            wide_LS = self.kept_LG.repeat_interleave(size // self.kept_LG.shape[1], dim=1)
            self._found[size] = wide_LS.nonzero()[:, 1].to(self.device).split(wide_LS.sum(1).tolist())
        return self._found[size][index]


def own_groups(heads_BLG: Tensor, device: torch.device) -> list[Tensor]:
    """The heads that each sequence keeps, [B, K] for every block; all sequences keep equally many of a block."""
    heads_LBG, sequences = heads_BLG.transpose(0, 1), len(heads_BLG)
    groups = heads_LBG.nonzero()[:, 2].to(device)
    return [part.view(sequences, -1) for part in groups.split(heads_LBG.sum((1, 2)).tolist())]


@dataclass(frozen=True)
class _Part:
    """One block, and copies of the rows or columns of its matrices that belong to kept units of a kind."""

    index: int
    block: nn.Module
    buffers: Buffers
    places: Places
    in_place: bool

    def linear(self, name: str) -> nn.Linear:
        part = self.block.get_submodule(name)
        assert isinstance(part, nn.Linear)
        return part

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the rows of a producer."""
        part, key = self.linear(name), (self.index, name)
        rows = self.places.of(self.index, part.out_features)
        bias = None if part.bias is None else part.bias.index_select(0, rows)
        bias = None if bias is None else self.buffers.hold((self.index, f"{name}.bias"), bias)
        return self.buffers.rows(key, part.weight.detach(), rows), bias

    def columns(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the columns of the consumer."""
        part = self.linear(name)
        columns = self.places.of(self.index, part.in_features)
        return self.buffers.columns((self.index, name), part.weight.detach(), columns), part.bias

    def producer(self, name: str) -> nn.Module:
        """What makes the kept units."""
        return KeptRows(self.linear(name), *self.units(name)) if self.in_place else CompactLinear(*self.rows(name))

    def units(self, name: str) -> tuple[Tensor, int]:
        """The kept units, in their place, and how many rows of this producer make one."""
        groups = self.places.kept_LG.shape[1]
        units_K = self.buffers.hold((self.index, f"{name}.units"), self.places.of(self.index, groups))
        return units_K, self.linear(name).out_features // groups

    def swap(self, name: str, module: nn.Module) -> Swap:
        owner, _, leaf = name.rpartition(".")
        return Swap(self.block.get_submodule(owner), leaf, module)


def _neurons(part: _Part, unit: Unit, mean_BI: Tensor | None) -> list[Swap]:
    extra_BD = None
    if mean_BI is not None:
        full = part.linear(unit.consumer)
        skipped_BI = mean_BI.index_fill(1, part.places.of(part.index, full.in_features), 0.0)
        extra_BD = part.buffers.hold((part.index, f"{unit.consumer}.extra"), linear(skipped_BI, full.weight))
    consumer = CompactLinear(*part.columns(unit.consumer), extra_BD)
    if part.in_place and (gated := _gated(part, unit, consumer)):
        return [gated]
    swaps = [part.swap(name, part.producer(name)) for name in unit.producers]
    return [*swaps, part.swap(unit.consumer, consumer)]


def _gated(part: _Part, unit: Unit, consumer: CompactLinear) -> Swap | None:
    """The whole layer in one, where it is a gated one by itself."""
    owners = {name.rpartition(".")[0] for name in (*unit.producers, unit.consumer)}
    layer = owners.pop()
    if owners or not layer:
        return None
    key = type(part.block.get_submodule(layer))
    producers = [part.linear(name) for name in unit.producers]
    if key not in part.buffers.gates:
        full = part.linear(unit.consumer)
        part.buffers.gates[key] = find_gate(part.block.get_submodule(layer), producers, full)
    if (found := part.buffers.gates[key]) is None:
        return None
    gate, act = found
    module = KeptGate(producers[gate], producers[1 - gate], *part.units(unit.producers[gate]), act, consumer)
    return part.swap(layer, module)


def _heads(part: _Part, unit: Unit, own_BK: Tensor | None) -> list[Swap]:
    """`own_BK`: the heads of each sequence; None if all keep the same."""
    kept_G, full = part.places.kept_LG[part.index], part.linear(unit.consumer)
    if own_BK is None:
        swaps = [part.swap(name, part.producer(name)) for name in unit.producers]
        units_K, width = part.units(unit.producers[0])[0], full.in_features // len(kept_G)
        reader = KeptColumns(full, units_K, width) if part.in_place else CompactLinear(*part.columns(unit.consumer))
        swaps.append(part.swap(unit.consumer, reader))
    else:
        own_BK = part.buffers.hold((part.index, "groups"), own_BK)
        swaps = [part.swap(name, PickedRows(part.linear(name), own_BK, len(kept_G))) for name in unit.producers]
        swaps.append(part.swap(unit.consumer, PickedColumns(full, own_BK, len(kept_G))))
    attention = part.block.get_submodule(unit.consumer.rpartition(".")[0])
    return swaps + _head_counts(attention, int(kept_G.sum()), len(kept_G))


def kept_states(cache: Any, heads_BLG: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, K, T, C] of the heads that each sequence runs, of every block."""
    device = cache.layers[0].keys.device
    found = []
    for layer, groups_BK in zip(cache.layers, own_groups(heads_BLG, device), strict=True):
        keys, values = layer.keys, layer.values
        if groups_BK.shape[1] < heads_BLG.shape[2]:
            keys, values = _take_heads(keys, groups_BK), _take_heads(values, groups_BK)
        found.append((keys, values))
    return found


def cut_cache(cache: Any, heads_BLG: Tensor) -> None:
    """Leaves the cache what `kept_states` says; the tensors themselves are not changed."""
    for layer, (keys, values) in zip(cache.layers, kept_states(cache, heads_BLG), strict=True):
        layer.keys, layer.values = keys, values


def _take_heads(states_BGTC: Tensor, groups_BK: Tensor) -> Tensor:
    if len(groups_BK) == 1:
        return states_BGTC.index_select(1, groups_BK[0])
    return states_BGTC.gather(1, groups_BK[:, :, None, None].expand(-1, -1, *states_BGTC.shape[2:]))


def _head_counts(attention: nn.Module, kept: int, groups: int) -> list[Swap]:
    """Attributes of an attention module that say how many heads there are, for those that stay."""
    known = {name: vars(attention)[name] for name in HEAD_ATTRIBUTES if name in vars(attention)}
    return [Swap(attention, name, count * kept // groups) for name, count in known.items()]
