"""Uniform weight quantization with learnable clipping.

Each group of columns of a row is rounded to 2^b levels between σ(γ₀)·min and σ(γ₁)·max; γ is learned
(OmniQuant's learnable weight clipping, Shao et al. 2024, equation 2; BESA trains it together with its rates).
Rounding passes gradients straight through.

Legend: O rows, I columns, G groups, M columns of a group.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_GAMMA = 4.0  # σ(4) = 0.98: nearly no clipping to begin with


class Clipping:
    """γ of every matrix. `group` columns share a scale (0, or a width that does not divide: the whole row)."""

    def __init__(self, weights: Mapping[str, Tensor], bits: int, group: int) -> None:
        self.levels = 2**bits - 1
        self.gamma: dict[str, Tensor] = {}
        self.width: dict[str, int] = {}
        for name, weight_OI in weights.items():
            rows, columns = weight_OI.shape
            self.width[name] = group if group and columns % group == 0 else columns
            shape = (2, rows, columns // self.width[name], 1)
            self.gamma[name] = weight_OI.new_full(shape, FIRST_GAMMA).requires_grad_(True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is learned."""
        return list(self.gamma.values())

    def quantized(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices [O, I] after rounding to their levels, differentiable in γ."""
        return {name: self._quantize(weights[name], self.gamma[name], self.width[name]) for name in weights}

    def backward(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Accumulates ∂L/∂γ from ∂L/∂(quantized matrix) [O, I]."""
        torch.autograd.backward([values[name] for name in gradients], list(gradients.values()))

    def _quantize(self, weight_OI: Tensor, gamma: Tensor, width: int) -> Tensor:
        weight_OGM = weight_OI.view(len(weight_OI), -1, width)
        low_OG1 = weight_OGM.amin(-1, keepdim=True).clamp_max(0) * gamma[0].sigmoid()
        high_OG1 = weight_OGM.amax(-1, keepdim=True).clamp_min(0) * gamma[1].sigmoid()
        step_OG1 = ((high_OG1 - low_OG1) / self.levels).clamp_min(1e-12)
        zero_OG1 = _round(-low_OG1 / step_OG1)
        code_OGM = (_round(weight_OGM / step_OG1) + zero_OG1).clamp(0, self.levels)
        rounded_OGM: Tensor = (code_OGM - zero_OG1) * step_OG1
        return rounded_OGM.view_as(weight_OI)


def _round(x: Tensor) -> Tensor:
    """Nearest integer; the gradient is that of the identity."""
    return x + (x.round() - x).detach()
