"""Blocks without the heads and neurons that a sequence does not need: smaller matrices in the place of the full ones.

The matrices are copied once for a sequence, rows of those that make a unit and columns of the one that reads it, all
in the layout that the model has: torch multiplies bfloat16 on a CPU some hundred times slower in the other one. Nothing
of a model is written twice: attention modules take the number of heads from the shapes they meet, or from an attribute
that is scaled along. Keys and values in the cache lose the same heads.

Between two forwards the model is always the full one: `applied` puts the small matrices in for the time of a call.

Legend: O outputs, I inputs, B sequences, D hidden size, G units of a kind in one block, K those that stay.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.config import Kind
from niwaki.contextual.units import KINDS, Layout
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
    kept: Mapping[Kind, Tensor],
    stand_ins: Mapping[tuple[int, Kind], Tensor] | None = None,
) -> Compact:
    """Copies what `kept` says of every kind, [L, G] booleans.

    `stand_ins`: by block and kind, activations [B, I] that take the place of those of skipped units.
    """
    swaps: list[Swap] = []
    for index, block in enumerate(blocks):
        for kind in KINDS:
            unit, kept_G = layout.units[kind], kept[kind][index]
            if bool(kept_G.all()):
                continue
            for name in unit.producers:
                part = _linear(block, name)
                rows = places(kept_G, part.out_features)
                bias = None if part.bias is None else part.bias.index_select(0, rows)
                swaps.append(_swap(block, name, CompactLinear(part.weight.index_select(0, rows), bias)))
            part = _linear(block, unit.consumer)
            columns = places(kept_G, part.in_features)
            extra = None
            if stand_ins is not None and (index, kind) in stand_ins:
                mean_BI = stand_ins[index, kind].index_fill(1, columns, 0.0)
                extra = linear(mean_BI, part.weight)
            small = CompactLinear(take_columns(part.weight, columns), part.bias, extra)
            swaps.append(_swap(block, unit.consumer, small))
            if kind == "heads":
                swaps += _head_counts(block.get_submodule(unit.consumer.rpartition(".")[0]), kept_G)
    return Compact(swaps)


def cut_cache(cache: Any, heads_LG: Tensor) -> None:
    """Drops the keys and values of heads that do not run; the tensors themselves are not changed."""
    for layer, kept_G in zip(cache.layers, heads_LG, strict=True):
        if not bool(kept_G.all()):
            groups = kept_G.nonzero()[:, 0].to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(1, groups), layer.values.index_select(1, groups)


def places(kept_G: Tensor, size: int) -> Tensor:
    """The rows or columns of the units that stay in a matrix that has `size` of them."""
    return kept_G.repeat_interleave(size // len(kept_G)).nonzero()[:, 0]


def take_columns(W_OI: Tensor, columns: Tensor) -> Tensor:
    """Some columns of a matrix, as a copy. NumPy's gather is ten times as fast as torch's on a CPU."""
    if W_OI.is_cuda or W_OI.element_size() not in INTEGERS:
        return W_OI.index_select(1, columns)
    small = torch.empty(len(W_OI), len(columns), dtype=W_OI.dtype)
    bits = INTEGERS[W_OI.element_size()]
    np.take(W_OI.detach().view(bits).numpy(), columns.numpy(), axis=1, out=small.view(bits).numpy(), mode="clip")
    return small


def _head_counts(attention: nn.Module, kept_G: Tensor) -> list[Swap]:
    """Attributes of an attention module that say how many heads there are, for those that stay."""
    known = {name: vars(attention)[name] for name in HEAD_ATTRIBUTES if name in vars(attention)}
    return [Swap(attention, name, count * int(kept_G.sum()) // len(kept_G)) for name, count in known.items()]


def _linear(block: nn.Module, name: str) -> nn.Linear:
    part = block.get_submodule(name)
    assert isinstance(part, nn.Linear)
    return part


def _swap(block: nn.Module, name: str, module: nn.Module) -> Swap:
    owner, _, leaf = name.rpartition(".")
    return Swap(block.get_submodule(owner), leaf, module)
