"""Latent weights and the levels they stand for, both ways: what learning codes does in every step to every weight.

Forward: weight = code · scale + offset with code = round((V − offset) / scale) clamped to its levels, written where its
column belongs. Backward: the gradient g of the weight in the order of V, and what scales and offsets need of it,
Σ g · code and Σ g over a group. On a GPU each is one kernel that reads every weight once: bound by the bandwidth.

Legend: O rows, I columns (of V in an order of its own, of the matrix in theirs), G groups of neighbouring columns of V.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Groups of columns that share a scale per row, and where the columns belong.

    `bounds` are the first columns of all groups and the end of the last one, also as a tensor (int32), `tops_G` their
    highest codes, `order_I` (int64) the place in the matrix of every column of V.
    """

    bounds: tuple[int, ...]
    bounds_G1: Tensor
    tops_G: Tensor
    order_I: Tensor


@dataclass(frozen=True)
class Levels:
    """The levels of every row and group: offset + scale · {0, …, top}."""

    shape: Shape
    scale_OG: Tensor
    offset_OG: Tensor

    def groups(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Columns, scales [O, 1], offsets [O, 1] and highest code of every group."""
        for number, (start, end) in enumerate(pairwise(self.shape.bounds)):
            scale_O1, offset_O1 = self.scale_OG[:, number, None], self.offset_OG[:, number, None]
            yield slice(start, end), scale_O1, offset_O1, self.shape.tops_G[number]


def weights_of(latent_OI: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in `dtype` that float32 `latent_OI` stands for."""
    if latent_OI.is_cuda:
        from niwaki.kernels.triton.latent import weights_of_triton

        return weights_of_triton(latent_OI, levels, dtype)
    return weights_of_reference(latent_OI, levels, dtype)


def gradients_of(latent_OI: Tensor, levels: Levels, gradient_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through, float32: the gradient g of V [O, I], and Σ g · code and Σ g over every group [O, G]."""
    if latent_OI.is_cuda:
        from niwaki.kernels.triton.latent import gradients_of_triton

        return gradients_of_triton(latent_OI, levels, gradient_OI)
    return gradients_of_reference(latent_OI, levels, gradient_OI)


def codes_of(latent_OI: Tensor, levels: Levels) -> Tensor:
    """The codes [O, I] in float32, in the order of V."""
    code_OI = torch.empty_like(latent_OI)
    for columns, scale_O1, offset_O1, top in levels.groups():
        exact_OC = code_OI[:, columns]
        torch.sub(latent_OI[:, columns], offset_O1, out=exact_OC)
        exact_OC.div_(scale_O1).clamp_(min=0).clamp_(max=top).round_()
    return code_OI


def weights_of_reference(latent_OI: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """The same in torch, on any device."""
    value_OI = codes_of(latent_OI, levels)
    for columns, scale_O1, offset_O1, _ in levels.groups():
        value_OI[:, columns].mul_(scale_O1).add_(offset_O1)
    weight_OI = torch.empty_like(value_OI, dtype=dtype)
    weight_OI[:, levels.shape.order_I] = value_OI.to(dtype)
    return weight_OI


def gradients_of_reference(latent_OI: Tensor, levels: Levels, gradient_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch, on any device."""
    g_OI = gradient_OI[:, levels.shape.order_I].float()
    code_OI = codes_of(latent_OI, levels)
    by_code_OG, by_one_OG = torch.empty_like(levels.scale_OG), torch.empty_like(levels.scale_OG)
    for number, (columns, *_) in enumerate(levels.groups()):
        g_OC = g_OI[:, columns]
        by_one_OG[:, number] = g_OC.sum(1)
        by_code_OG[:, number] = torch.linalg.vecdot(g_OC, code_OI[:, columns])
    return g_OI, by_code_OG, by_one_OG
