"""Linear layers that replace those of a block while a part of its units runs.

`CompactLinear` multiplies a copy of some rows or columns. `PickedRows` and `PickedColumns` multiply the full matrix and
take the heads of each sequence. `KeptRows`, `KeptColumns` and `KeptGate` read the kept rows or columns in the full
matrix (`kernels.rows`). They serve a few tokens on a GPU, where a gather costs no extra time.

Legend: B sequences, T tokens, O outputs, I inputs, D hidden size, G units, K those that stay, W width of a unit.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.kernels.rows import columns_dot_op, rows_dot_op, rows_gate, rows_gate_op
from niwaki.kernels.types import ACTIVATIONS


class CompactLinear(nn.Module):
    """Product y = x Wᵀ + b with some rows or columns of W; `extra_BD` is added to every token of each sequence."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, extra_BD: Tensor | None = None) -> None:
        super().__init__()
        self.weight_OI, self.bias_O, self.extra_BD = weight_OI, bias_O, extra_BD

    @property
    def address(self) -> tuple[int, ...]:
        """Return address and shape of what a mask filled in: a recorded graph reads this address."""
        return self.weight_OI.data_ptr(), *self.weight_OI.shape

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [B, T, I] → [B, T, O], or [B·T, I] → [B·T, O]."""
        y = linear(x, self.weight_OI, self.bias_O)
        if self.extra_BD is None:
            return y
        y_BTD = y.view(len(self.extra_BD), -1, y.shape[-1]) + self.extra_BD[:, None]
        return y_BTD.view(y.shape)


class PickedRows(nn.Module):
    """Product of all `count` heads, of which each sequence of the batch gets its own, `groups_BK`."""

    def __init__(self, full: nn.Linear, groups_BK: Tensor, count: int) -> None:
        super().__init__()
        self.weight_OI, self.bias_O, self.groups_BK, self.count = full.weight, full.bias, groups_BK, count

    @property
    def address(self) -> tuple[int, ...]:
        """Return address and length, as `CompactLinear` does."""
        return self.groups_BK.data_ptr(), *self.groups_BK.shape

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Multiply: [B, T, I] → [B, T, K·W]."""
        y_BTGW = linear(x_BTI, self.weight_OI, self.bias_O).unflatten(-1, (self.count, -1))
        index = self.groups_BK[:, None, :, None].expand(-1, y_BTGW.shape[1], -1, y_BTGW.shape[3])
        own_BTKW: Tensor = y_BTGW.gather(2, index)
        return own_BTKW.flatten(2)


class PickedColumns(PickedRows):
    """Product with the outputs of the heads of a batch: zeros where a head does not belong to the sequence."""

    def forward(self, x_BTR: Tensor) -> Tensor:
        """Multiply: [B, T, K·W] → [B, T, O]."""
        x_BTKW = x_BTR.unflatten(-1, (self.groups_BK.shape[1], -1))
        index = self.groups_BK[:, None, :, None].expand_as(x_BTKW)
        zeros_BTGW = x_BTR.new_zeros(*x_BTR.shape[:2], self.count, x_BTKW.shape[3])
        return linear(zeros_BTGW.scatter(2, index, x_BTKW).flatten(2), self.weight_OI, self.bias_O)


class KeptRows(nn.Module):
    """Product with the rows of kept units, read in the full matrix. One token per sequence."""

    def __init__(self, full: nn.Linear, units_K: Tensor, width: int) -> None:
        super().__init__()
        self.weight_OI, self.bias_O, self.units_K, self.width = full.weight, full.bias, units_K, width

    @property
    def address(self) -> tuple[int, ...]:
        """Return address and length, as `CompactLinear` does."""
        return self.units_K.data_ptr(), len(self.units_K)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Multiply: [B, 1, I] → [B, 1, K·W], or [B, I] → [B, K·W]."""
        y_BR: Tensor = rows_dot_op(_tokens(x_BTI), self.weight_OI, self.units_K, self.bias_O, self.width)
        return y_BR.view(*x_BTI.shape[:-1], -1)


class KeptColumns(KeptRows):
    """Product with the columns of kept units, read in the full matrix. One token per sequence."""

    def forward(self, x_BTR: Tensor) -> Tensor:
        """Multiply: [B, 1, K·W] → [B, 1, O], or [B, K·W] → [B, O]."""
        y_BO: Tensor = columns_dot_op(_tokens(x_BTR), self.weight_OI, self.units_K, self.bias_O, self.width)
        return y_BO.view(*x_BTR.shape[:-1], -1)


class KeptGate(KeptRows):
    """Gated layer with kept neurons: act(gate x) · up x in one product, then `down`."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, units_K: Tensor, width: int, act: str, down: nn.Module) -> None:
        super().__init__(gate, units_K, width)
        self.up_OI, self.act, self.down = up.weight, act, down

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Multiply: [B, 1, D] → [B, 1, D]."""
        h_BR = rows_gate_op(_tokens(x_BTD), self.weight_OI, self.up_OI, self.units_K, self.act, self.width)
        y_BTD: Tensor = self.down(h_BR.view(*x_BTD.shape[:-1], -1))
        return y_BTD


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def find_gate(layer: nn.Module, producers: Sequence[nn.Linear], consumer: nn.Linear) -> tuple[int, str] | None:
    """Find which producer is the gate of a layer, and its activation. Return None if the layer is not a gated one.

    No attribute names them, so every combination is tried on random inputs.
    """
    if len(producers) != 2 or any(part.bias is not None for part in producers):
        return None
    like = consumer.weight
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(4, producers[0].in_features, generator=generator).to(like)
    try:
        layer_BD = layer(x_BD).float()
    except (RuntimeError, TypeError, ValueError):
        return None  # the layer takes more than one input
    every_K = torch.arange(producers[0].out_features, device=like.device)
    errors = {}
    for index, act in product((0, 1), ACTIVATIONS):
        gate, up = producers[index], producers[1 - index]
        gated_BD = consumer(rows_gate(x_BD, gate.weight, up.weight, every_K, act)).float()
        errors[index, act] = float((gated_BD - layer_BD).norm() / layer_BD.norm())
    best = min(errors, key=errors.__getitem__)  # the two forms of gelu differ by less than bfloat16 shows
    return best if errors[best] < 1e-2 else None
