"""Latent weights V and the levels they stand for, forward and backward: one step of learned rounding per call.

Forward: weight = code · scale + offset with code = round((V − offset) / scale), clamped to the levels. Every weight
moves to its column in the matrix. Backward: the gradient g of the weight in the order of V. Scales and offsets get
Σ g · code and Σ g over a group. On a GPU each direction is one kernel that reads every weight once. The memory
bandwidth bounds both.

Legend: O rows, I columns (of V or of the matrix, each in its own order), G groups of neighbouring columns of V.
"""

import torch
from torch import Tensor

from niwaki.kernels.types import Levels


def weights_of(latent_OI: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """Return the matrix [O, I] in `dtype` for the float32 latent weights `latent_OI`."""
    if latent_OI.is_cuda:
        from niwaki.kernels.triton.latent import weights_of_triton

        return weights_of_triton(latent_OI, levels, dtype)
    return weights_of_reference(latent_OI, levels, dtype)


def gradients_of(latent_OI: Tensor, levels: Levels, gradient_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the straight-through gradient g of V [O, I], and Σ g · code and Σ g of every group [O, G], float32."""
    if latent_OI.is_cuda:
        from niwaki.kernels.triton.latent import gradients_of_triton

        return gradients_of_triton(latent_OI, levels, gradient_OI)
    return gradients_of_reference(latent_OI, levels, gradient_OI)


def codes_of(latent_OI: Tensor, levels: Levels) -> Tensor:
    """Return the codes [O, I] in float32, in the order of V."""
    code_OI = torch.empty_like(latent_OI)
    for columns, scale_O1, offset_O1, top in levels.by_group():
        exact_OC = code_OI[:, columns]
        torch.sub(latent_OI[:, columns], offset_O1, out=exact_OC)
        exact_OC.div_(scale_O1).clamp_(min=0).clamp_(max=top).round_()
    return code_OI


def weights_of_reference(latent_OI: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """Compute `weights_of` in torch, on any device."""
    value_OI = codes_of(latent_OI, levels)
    for columns, scale_O1, offset_O1, _ in levels.by_group():
        value_OI[:, columns].mul_(scale_O1).add_(offset_O1)
    weight_OI = torch.empty_like(value_OI, dtype=dtype)
    weight_OI[:, levels.groups.order_I] = value_OI.to(dtype)
    return weight_OI


def gradients_of_reference(latent_OI: Tensor, levels: Levels, gradient_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gradients_of` in torch, on any device."""
    g_OI = gradient_OI[:, levels.groups.order_I].float()
    code_OI = codes_of(latent_OI, levels)
    by_code_OG, by_one_OG = torch.empty_like(levels.scale_OG), torch.empty_like(levels.scale_OG)
    for number, (columns, *_) in enumerate(levels.by_group()):
        g_OC = g_OI[:, columns]
        by_one_OG[:, number] = g_OC.sum(1)
        by_code_OG[:, number] = torch.linalg.vecdot(g_OC, code_OI[:, columns])
    return g_OI, by_code_OG, by_one_OG
