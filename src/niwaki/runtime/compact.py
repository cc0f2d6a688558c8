"""Blocks without the heads and neurons that a sequence does not need: smaller matrices in the place of the full ones.

The matrices are copied once for a sequence, rows of those that make a unit and columns of the one that reads it, all
in the layout that the model has: torch multiplies bfloat16 on a CPU some hundred times slower in the other one. Nothing
of a model is written twice: attention modules take the number of heads from the shapes they meet, or from an attribute
that is scaled along. Keys and values in the cache lose the same heads. In a batch every sequence has heads of its own:
the matrices hold those that any sequence needs, and each takes its part of what they put out.

Between two forwards the model is always the full one: `applied` puts the small matrices in for the time of a call.

Legend: O outputs, I inputs, B sequences, T tokens, D hidden size, G units of a kind in one block, K those that stay, W
width of a unit, C channels of a head.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.config import Unit
from niwaki.contextual.units import Layout
from niwaki.errors import ArchitectureError

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16
HEAD_ATTRIBUTES = ("num_heads", "num_key_value_heads")


class CompactLinear(nn.Module):
    """y = x Wᵀ + b with some rows or columns of W; `extra_BD` is added to what the tokens of each sequence get."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, extra_BD: Tensor | None = None) -> None:
        super().__init__()
        self.weight_OI, self.bias_O, self.extra_BD = weight_OI, bias_O, extra_BD

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] → [B, T, O], or [B·T, I] → [B·T, O]."""
        y = linear(x, self.weight_OI, self.bias_O)
        if self.extra_BD is None:
            return y
        y_BTD = y.view(len(self.extra_BD), -1, y.shape[-1]) + self.extra_BD[:, None]
        return y_BTD.view(y.shape)


class PickedRows(CompactLinear):
    """Rows for the heads that any sequence of a batch keeps, of which each sequence gets its own, `groups_BK`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, groups_BK: Tensor, count: int) -> None:
        super().__init__(weight_OI, bias_O)
        self.groups_BK, self.count = groups_BK, count

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, I] → [B, T, K·width]."""
        y_BTGW = super().forward(x).unflatten(-1, (self.count, -1))
        places = self.groups_BK[:, None, :, None].expand(-1, y_BTGW.shape[1], -1, y_BTGW.shape[3])
        own_BTKW: Tensor = y_BTGW.gather(2, places)
        return own_BTKW.flatten(2)


class PickedColumns(CompactLinear):
    """Columns for the heads that any sequence of a batch keeps; a sequence brings zeros where a head is not its own."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, groups_BK: Tensor, count: int) -> None:
        super().__init__(weight_OI, bias_O)
        self.groups_BK, self.count = groups_BK, count

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, K·width] → [B, T, O]."""
        x_BTKW = x.unflatten(-1, (self.groups_BK.shape[1], -1))
        places = self.groups_BK[:, None, :, None].expand_as(x_BTKW)
        zeros_BTGW = x.new_zeros(*x.shape[:2], self.count, x_BTKW.shape[3])
        return super().forward(zeros_BTGW.scatter(2, places, x_BTKW).flatten(2))


class Buffers:
    """Memory for copies, by block and matrix. It lasts from one sequence to the next: to map fresh memory takes longer
    than to fill it, and what has its place for good can be part of a CUDA graph. A new mask overwrites the one before.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[int, str], Tensor] = {}

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
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Address and shape of every copy: equal where a recorded graph reads the right memory."""
        tensors = (swap.value.weight_OI for swap in self.swaps if isinstance(swap.value, CompactLinear))
        return tuple((weight_OI.data_ptr(), *weight_OI.shape) for weight_OI in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        modules = (swap.value for swap in self.swaps if isinstance(swap.value, CompactLinear))
        return sum(module.weight_OI.nbytes for module in modules)


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
    stand_ins: Mapping[int, Tensor] | None = None,
) -> Compact:
    """Copies the units that are true into `buffers`. All sequences must keep equally many heads of a block. The masks
    lie on the CPU: they are read here, and a GPU would have to be waited for each time.

    `stand_ins`: by block, activations [B, I] that take the place of those of skipped neurons.
    """
    swaps: list[Swap] = []
    for index, block in enumerate(blocks):
        kept_BG, kept_G = heads_BLG[:, index], neurons_LG[index]
        if not bool(kept_BG.all()):
            swaps += _heads(_Part(index, block, buffers, kept_BG.any(0)), layout.units["heads"], kept_BG)
        if not bool(kept_G.all()):
            mean_BI = None if stand_ins is None else stand_ins[index]
            swaps += _neurons(_Part(index, block, buffers, kept_G), layout.units["neurons"], mean_BI)
    return Compact(swaps)


@dataclass(frozen=True)
class _Part:
    """One block, and copies of the rows or columns of its matrices that belong to kept units of a kind."""

    index: int
    block: nn.Module
    buffers: Buffers
    kept_G: Tensor
    _places: dict[int, Tensor] = field(default_factory=dict)

    def places(self, size: int, device: torch.device) -> Tensor:
        """Where the kept units lie in a matrix that has `size` rows or columns of them."""
        if size not in self._places:
            found = self.kept_G.repeat_interleave(size // len(self.kept_G)).nonzero()[:, 0]
            self._places[size] = found.to(device, non_blocking=True)
        return self._places[size]

    def linear(self, name: str) -> nn.Linear:
        part = self.block.get_submodule(name)
        assert isinstance(part, nn.Linear)
        return part

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the rows of a producer."""
        part, key = self.linear(name), (self.index, name)
        rows = self.places(part.out_features, part.weight.device)
        bias = None if part.bias is None else part.bias.index_select(0, rows)
        bias = None if bias is None else self.buffers.hold((self.index, f"{name}.bias"), bias)
        return self.buffers.rows(key, part.weight.detach(), rows), bias

    def columns(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the columns of the consumer."""
        part = self.linear(name)
        columns = self.places(part.in_features, part.weight.device)
        return self.buffers.columns((self.index, name), part.weight.detach(), columns), part.bias

    def swap(self, name: str, module: nn.Module) -> Swap:
        owner, _, leaf = name.rpartition(".")
        return Swap(self.block.get_submodule(owner), leaf, module)


def _neurons(part: _Part, unit: Unit, mean_BI: Tensor | None) -> list[Swap]:
    swaps = [part.swap(name, CompactLinear(*part.rows(name))) for name in unit.producers]
    extra_BD = None
    if mean_BI is not None:
        full = part.linear(unit.consumer)
        skipped_BI = mean_BI.index_fill(1, part.places(full.in_features, mean_BI.device), 0.0)
        extra_BD = part.buffers.hold((part.index, f"{unit.consumer}.extra"), linear(skipped_BI, full.weight))
    return [*swaps, part.swap(unit.consumer, CompactLinear(*part.columns(unit.consumer), extra_BD))]


def _heads(part: _Part, unit: Unit, kept_BG: Tensor) -> list[Swap]:
    any_G, swaps = part.kept_G, []
    groups_BK = any_G.cumsum(0).sub(1).expand_as(kept_BG)[kept_BG].view(len(kept_BG), -1)  # places in the union
    if groups_BK.shape[1] == int(any_G.sum()):  # all sequences keep the same
        swaps += [part.swap(name, CompactLinear(*part.rows(name))) for name in unit.producers]
        swaps.append(part.swap(unit.consumer, CompactLinear(*part.columns(unit.consumer))))
    else:
        groups_BK = groups_BK.to(part.linear(unit.consumer).weight.device)
        picked = part.buffers.hold((part.index, "groups"), groups_BK), int(any_G.sum())
        swaps += [part.swap(name, PickedRows(*part.rows(name), *picked)) for name in unit.producers]
        swaps.append(part.swap(unit.consumer, PickedColumns(*part.columns(unit.consumer), *picked)))
    return swaps + _head_counts(part.block.get_submodule(unit.consumer.rpartition(".")[0]), kept_BG[0])


def cut_cache(cache: Any, heads_BLG: Tensor) -> None:
    """Drops the keys and values of heads that a sequence does not run; the tensors themselves are not changed."""
    for layer, kept_BG in zip(cache.layers, heads_BLG.unbind(1), strict=True):
        layer.keys, layer.values = cut_heads(layer.keys, kept_BG), cut_heads(layer.values, kept_BG)


def cut_heads(states_BGTC: Tensor, kept_BG: Tensor) -> Tensor:
    """Keys or values of the heads that each sequence keeps, [B, K, T, C]."""
    if bool(kept_BG.all()):
        return states_BGTC
    sequences, groups = (places.to(states_BGTC.device) for places in kept_BG.nonzero(as_tuple=True))
    kept_BKTC: Tensor = states_BGTC[sequences, groups].unflatten(0, (len(kept_BG), -1))
    return kept_BKTC


def _head_counts(attention: nn.Module, kept_G: Tensor) -> list[Swap]:
    """Attributes of an attention module that say how many heads there are, for those that stay."""
    known = {name: vars(attention)[name] for name in HEAD_ATTRIBUTES if name in vars(attention)}
    return [Swap(attention, name, count * int(kept_G.sum()) // len(kept_G)) for name, count in known.items()]
