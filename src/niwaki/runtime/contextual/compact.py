"""Blocks without the heads and neurons that a sequence does not need: smaller matrices in place of the full ones.

The matrices are copied once per sequence: rows of those that produce a unit, columns of the one that consumes it. The
copies keep the memory layout of the model, because torch multiplies bfloat16 on a CPU about a hundred times slower in
the other one. No module of a model is written again. Attention modules take the number of heads from the shapes of
their inputs, or from an attribute that is scaled too. Keys and values in the cache lose the same heads.

In a batch every sequence has heads of its own. Together they need nearly all heads, so the full matrices run and each
sequence takes its part of the output. Keys, values and attention are its own only.

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

from niwaki.config.targets import PrunableUnit
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
from niwaki.runtime.contextual.units import UnitLayout

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16
HEAD_ATTRIBUTES = ("num_heads", "num_key_value_heads")


class Buffers:
    """Memory for copies, by block and matrix. It lasts from one sequence to the next.

    To map fresh memory takes longer than to fill it, and a fixed address can be part of a CUDA graph. A new mask
    overwrites the one before.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[int, str], Tensor] = {}
        self.gates: dict[type, tuple[int, str] | None] = {}  # results of `find_gate` by type of layer

    def take(self, key: tuple[int, str], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory for a tensor of this shape, with the dtype and device of another tensor."""
        flat, size = self._flat.get(key), prod(shape)
        if flat is None or len(flat) < size or flat.dtype != like.dtype or flat.device != like.device:
            self._flat[key] = flat = like.new_empty(size)
        return flat[:size].view(shape)

    def hold(self, key: tuple[int, str], value: Tensor) -> Tensor:
        """Copy `value` to its memory and return the copy."""
        return self.take(key, tuple(value.shape), value).copy_(value)

    def rows(self, key: tuple[int, str], W_OI: Tensor, rows: Tensor) -> Tensor:
        """Copy some rows of a matrix."""
        return torch.index_select(W_OI, 0, rows, out=self.take(key, (len(rows), W_OI.shape[1]), W_OI))

    def columns(self, key: tuple[int, str], W_OI: Tensor, columns: Tensor) -> Tensor:
        """Copy some columns of a matrix; NumPy gathers them ten times as fast as torch does on a CPU."""
        small = self.take(key, (len(W_OI), len(columns)), W_OI)
        if W_OI.is_cuda:
            return torch.index_select(W_OI, 1, columns, out=small)
        bits = INTEGERS[W_OI.element_size()]
        np.take(W_OI.view(bits).numpy(), columns.numpy(), axis=1, out=small.view(bits).numpy(), mode="clip")
        return small


@dataclass(frozen=True)
class Swap:
    """Replacement of a child of a module, or of a number among its attributes."""

    owner: nn.Module
    name: str
    value: Any


class CompactBlocks:
    """Small matrices of all blocks for one mask."""

    def __init__(self, swaps: list[Swap]) -> None:
        self.swaps = swaps

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the small matrices in the forwards inside."""
        before = _exchange(self.swaps)
        try:
            yield
        finally:
            _exchange(before)

    def start_account(self) -> None:
        """Count from the next token on."""

    def account(self, record: Any) -> None:
        """Add what the last tokens did not read to the record of their sequence: nothing, the choice wrote it."""

    @property
    def modules(self) -> list[nn.Module]:
        """Return all modules that multiply."""
        return [part for swap in self.swaps if isinstance(swap.value, nn.Module) for part in swap.value.modules()]

    @property
    def addresses(self) -> tuple[tuple[int, ...], ...]:
        """Return address and shape of what the mask filled in: a recorded graph reads these addresses."""
        kinds = CompactLinear | KeptRows | PickedRows
        return tuple(module.address for module in self.modules if isinstance(module, kinds))

    @property
    def nbytes(self) -> int:
        """Return the bytes of the copies."""
        return sum(module.weight_OI.nbytes for module in self.modules if isinstance(module, CompactLinear))


def _exchange(swaps: list[Swap]) -> list[Swap]:
    """Put replacements in and return what they replace.

    It writes to the tables of modules: setting attributes would cost a millisecond per token.
    """
    before = []
    for swap in swaps:
        table: dict[str, Any] = swap.owner._modules if isinstance(swap.value, nn.Module) else vars(swap.owner)
        before.append(Swap(swap.owner, swap.name, table[swap.name]))
        table[swap.name] = swap.value
    return before


def check_linears(blocks: nn.ModuleList, layout: UnitLayout) -> None:
    """Raise ArchitectureError for matrices that are not an nn.Linear, or whose sides are not multiples of the units."""
    for block in blocks:
        for kind, unit in layout.units.items():
            parts = [_linear(block, name) for name in (*unit.producers, unit.consumer)]
            sides = [*(part.out_features for part in parts[:-1]), parts[-1].in_features]
            units = layout.count(kind)
            for name, side in zip((*unit.producers, unit.consumer), sides, strict=True):
                if side % units or (kind == "neurons" and side != sides[-1]):
                    raise ArchitectureError(
                        f"{name} has {side} rows or columns of {kind}: the predictor is of {units} per block"
                    )


def _linear(block: nn.Module, name: str) -> nn.Linear:
    try:
        part = block.get_submodule(name)
    except AttributeError as error:
        raise ArchitectureError(f"the predictor names {name}, which the blocks of this model lack") from error
    if not isinstance(part, nn.Linear):
        raise ArchitectureError(f"{name} is a {type(part).__name__}: only plain linear layers are cut")
    return part


@torch.no_grad()
def compact(
    blocks: nn.ModuleList,
    layout: UnitLayout,
    heads_BLG: Tensor,
    neurons_LG: Tensor,
    buffers: Buffers,
    mean_fills: Mapping[int, Tensor] | None = None,
    *,
    in_place: bool = False,
) -> CompactBlocks:
    """Copy the units that are true into `buffers`. All sequences must keep the same number of heads in a block.

    The masks are on the CPU, because this function reads them and would wait for a GPU each time.

    `mean_fills`: by block, activations [B, I] that replace those of skipped neurons. `in_place`: the kernels read rows,
    and columns of heads, in the full matrices, for batches of at most `MAX_TOKENS`. Only columns of single neurons are
    copied: they lie two bytes apart.
    """
    swaps: list[Swap] = []
    device = next(blocks.parameters()).device
    heads, neurons = KeptIndices(heads_BLG[0], device), KeptIndices(neurons_LG, device)
    groups, same_L = own_groups(heads_BLG, device), (heads_BLG == heads_BLG[:1]).all(2).all(0).tolist()
    in_place = in_place and len(heads_BLG) <= MAX_TOKENS
    for index, block in enumerate(blocks):
        if not bool(heads.kept_LG[index].all()):
            own_BK = None if same_L[index] else groups[index]
            swaps += _heads(_BlockCut(index, block, buffers, heads, in_place), layout.units["heads"], own_BK)
        if not bool(neurons.kept_LG[index].all()):
            mean_BI = None if mean_fills is None else mean_fills[index]
            swaps += _neurons(_BlockCut(index, block, buffers, neurons, in_place), layout.units["neurons"], mean_BI)
    return CompactBlocks(swaps)


class KeptIndices:
    """Rows or columns of the kept units of a kind, in the matrices of every block; computed for all blocks at once."""

    def __init__(self, kept_LG: Tensor, device: torch.device) -> None:
        self.kept_LG, self.device = kept_LG, device
        self._by_size: dict[int, tuple[Tensor, ...]] = {}

    def of(self, block: int, size: int) -> Tensor:
        """Return the indices in a matrix of one block that has `size` rows or columns of these units."""
        if size not in self._by_size:
            wide_LS = self.kept_LG.repeat_interleave(size // self.kept_LG.shape[1], dim=1)
            indices = wide_LS.nonzero()[:, 1].to(self.device)
            self._by_size[size] = indices.split(wide_LS.sum(1).tolist())
        return self._by_size[size][block]


def own_groups(heads_BLG: Tensor, device: torch.device) -> list[Tensor]:
    """Return the heads [B, K] that each sequence keeps, for every block; K is the same for all sequences."""
    heads_LBG, sequences = heads_BLG.transpose(0, 1), len(heads_BLG)
    groups = heads_LBG.nonzero()[:, 2].to(device)
    return [part.view(sequences, -1) for part in groups.split(heads_LBG.sum((1, 2)).tolist())]


@dataclass(frozen=True)
class _BlockCut:
    """One block, with copies of the rows or columns of its matrices that belong to the kept units of a kind."""

    index: int
    block: nn.Module
    buffers: Buffers
    kept: KeptIndices
    in_place: bool

    def linear(self, name: str) -> nn.Linear:
        full = self.block.get_submodule(name)
        assert isinstance(full, nn.Linear)
        return full

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the kept rows of a producer."""
        full, key = self.linear(name), (self.index, name)
        rows = self.kept.of(self.index, full.out_features)
        bias = None if full.bias is None else full.bias.index_select(0, rows)
        bias = None if bias is None else self.buffers.hold((self.index, f"{name}.bias"), bias)
        return self.buffers.rows(key, full.weight.detach(), rows), bias

    def columns(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the kept columns of the consumer."""
        full = self.linear(name)
        columns = self.kept.of(self.index, full.in_features)
        return self.buffers.columns((self.index, name), full.weight.detach(), columns), full.bias

    def producer(self, name: str) -> nn.Module:
        """Return the module that produces the kept units."""
        return KeptRows(self.linear(name), *self.units(name)) if self.in_place else CompactLinear(*self.rows(name))

    def units(self, name: str) -> tuple[Tensor, int]:
        """Return the kept units, at their fixed address, and the rows of this producer per unit."""
        groups = self.kept.kept_LG.shape[1]
        units_K = self.buffers.hold((self.index, f"{name}.units"), self.kept.of(self.index, groups))
        return units_K, self.linear(name).out_features // groups

    def swap(self, name: str, module: nn.Module) -> Swap:
        owner, _, leaf = name.rpartition(".")
        return Swap(self.block.get_submodule(owner), leaf, module)


def _neurons(cut: _BlockCut, unit: PrunableUnit, mean_BI: Tensor | None) -> list[Swap]:
    extra_BD = None
    if mean_BI is not None:
        full = cut.linear(unit.consumer)
        skipped_BI = mean_BI.index_fill(1, cut.kept.of(cut.index, full.in_features), 0.0)
        extra_BD = cut.buffers.hold((cut.index, f"{unit.consumer}.extra"), linear(skipped_BI, full.weight))
    consumer = CompactLinear(*cut.columns(unit.consumer), extra_BD)
    if cut.in_place and (gated := _gated(cut, unit, consumer)):
        return [gated]
    swaps = [cut.swap(name, cut.producer(name)) for name in unit.producers]
    return [*swaps, cut.swap(unit.consumer, consumer)]


def _gated(cut: _BlockCut, unit: PrunableUnit, consumer: CompactLinear) -> Swap | None:
    """Return one module for the whole layer, if it is a gated layer and nothing else."""
    owners = {name.rpartition(".")[0] for name in (*unit.producers, unit.consumer)}
    layer = owners.pop()
    if owners or not layer:
        return None
    key = type(cut.block.get_submodule(layer))
    producers = [cut.linear(name) for name in unit.producers]
    if key not in cut.buffers.gates:
        full = cut.linear(unit.consumer)
        cut.buffers.gates[key] = find_gate(cut.block.get_submodule(layer), producers, full)
    if (gate_and_act := cut.buffers.gates[key]) is None:
        return None
    gate, act = gate_and_act
    module = KeptGate(producers[gate], producers[1 - gate], *cut.units(unit.producers[gate]), act, consumer)
    return cut.swap(layer, module)


def _heads(cut: _BlockCut, unit: PrunableUnit, own_BK: Tensor | None) -> list[Swap]:
    """Return the replacements of an attention module. `own_BK`: heads of each sequence, None if all keep the same."""
    kept_G, full = cut.kept.kept_LG[cut.index], cut.linear(unit.consumer)
    if own_BK is None:
        swaps = [cut.swap(name, cut.producer(name)) for name in unit.producers]
        units_K, width = cut.units(unit.producers[0])[0], full.in_features // len(kept_G)
        consumer = KeptColumns(full, units_K, width) if cut.in_place else CompactLinear(*cut.columns(unit.consumer))
        swaps.append(cut.swap(unit.consumer, consumer))
    else:
        own_BK = cut.buffers.hold((cut.index, "groups"), own_BK)
        swaps = [cut.swap(name, PickedRows(cut.linear(name), own_BK, len(kept_G))) for name in unit.producers]
        swaps.append(cut.swap(unit.consumer, PickedColumns(full, own_BK, len(kept_G))))
    attention = cut.block.get_submodule(unit.consumer.rpartition(".")[0])
    return swaps + _head_counts(attention, int(kept_G.sum()), len(kept_G))


def kept_states(cache: Any, heads_BLG: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [B, K, T, C] of the heads that each sequence runs, for every block."""
    device = cache.layers[0].keys.device
    states = []
    for layer, groups_BK in zip(cache.layers, own_groups(heads_BLG, device), strict=True):
        keys, values = layer.keys, layer.values
        if groups_BK.shape[1] < heads_BLG.shape[2]:
            keys, values = _take_heads(keys, groups_BK), _take_heads(values, groups_BK)
        states.append((keys, values))
    return states


def cut_cache(cache: Any, heads_BLG: Tensor) -> None:
    """Replace the keys and values of each layer by `kept_states`. The tensors themselves do not change."""
    for layer, (keys, values) in zip(cache.layers, kept_states(cache, heads_BLG), strict=True):
        layer.keys, layer.values = keys, values


def _take_heads(states_BGTC: Tensor, groups_BK: Tensor) -> Tensor:
    if len(groups_BK) == 1:
        return states_BGTC.index_select(1, groups_BK[0])
    return states_BGTC.gather(1, groups_BK[:, :, None, None].expand(-1, -1, *states_BGTC.shape[2:]))


def _head_counts(attention: nn.Module, kept: int, groups: int) -> list[Swap]:
    """Return replacements for the attributes of an attention module that count heads."""
    known = {name: vars(attention)[name] for name in HEAD_ATTRIBUTES if name in vars(attention)}
    return [Swap(attention, name, count * kept // groups) for name, count in known.items()]
