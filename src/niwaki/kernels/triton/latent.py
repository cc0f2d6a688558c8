"""Latent weights and their levels on a GPU (see `kernels.latent`): a program owns one row of one group of columns.

Floor: forward reads four bytes per weight and writes two (bfloat16), backward reads six and writes four. One program
scatters and gathers the columns of a row, so that the caches combine them. The order of the sums never changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import Levels

BLOCK = 1024  # columns per step


def weights_of_triton(latent_OI: Tensor, levels: Levels, dtype: torch.dtype) -> Tensor:
    """Implement `kernels.latent.weights_of`."""
    rows, columns = latent_OI.shape
    weight_OI = torch.empty_like(latent_OI, dtype=dtype)
    groups = levels.scale_OG.shape[1]
    _weights[rows, groups](
        latent_OI, *_arguments(levels), weight_OI, columns=columns, groups=groups, block=BLOCK, num_warps=4
    )
    return weight_OI


def gradients_of_triton(latent_OI: Tensor, levels: Levels, gradient_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `kernels.latent.gradients_of`."""
    rows, columns = latent_OI.shape
    by_latent_OI = torch.empty_like(latent_OI)
    by_code_OG, by_one_OG = torch.empty_like(levels.scale_OG), torch.empty_like(levels.scale_OG)
    groups = levels.scale_OG.shape[1]
    _gradients[rows, groups](
        latent_OI, *_arguments(levels), gradient_OI.contiguous(), by_latent_OI, by_code_OG, by_one_OG,
        columns=columns, groups=groups, block=BLOCK, num_warps=4,
    )  # fmt: skip
    return by_latent_OI, by_code_OG, by_one_OG


def _arguments(levels: Levels) -> tuple[Tensor, ...]:
    """Return the arguments of both kernels for the levels."""
    groups = levels.groups
    return levels.scale_OG.contiguous(), levels.offset_OG.contiguous(), groups.tops_G, groups.bounds_G1, groups.order_I


@triton.jit
def _codes(latent, scale, offset, top, column, inside):
    """Return the codes of some columns of a row."""
    value = tl.load(latent + column, mask=inside, other=0.0)
    exact = tl.div_rn(value - offset, scale)
    exact = tl.minimum(tl.maximum(exact, 0.0), top)
    # Half to even, as torch rounds: adding 1.5·2²³ leaves no bits below one.
    return (exact + 12582912.0) - 12582912.0


@triton.jit
def _weights(
    latent,
    scale,
    offset,
    tops,
    bounds,
    order,
    weight,
    columns: tl.constexpr,
    groups: tl.constexpr,
    block: tl.constexpr,
):
    """Write the weights of one row and group."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    own_scale = tl.load(scale + row * groups + group)
    own_offset = tl.load(offset + row * groups + group)
    top = tl.load(tops + group)
    end = tl.load(bounds + group + 1)
    for first in range(tl.load(bounds + group), end, block):
        column = first + tl.arange(0, block)
        inside = column < end
        code = _codes(latent + row * columns, own_scale, own_offset, top, column, inside)
        place = tl.load(order + column, mask=inside, other=0)
        value = code * own_scale + own_offset
        tl.store(weight + row * columns + place, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    latent,
    scale,
    offset,
    tops,
    bounds,
    order,
    gradient,
    by_latent,
    by_code,
    by_one,
    columns: tl.constexpr,
    groups: tl.constexpr,
    block: tl.constexpr,
):
    """Write the gradients of one row and group."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    own_scale = tl.load(scale + row * groups + group)
    own_offset = tl.load(offset + row * groups + group)
    top = tl.load(tops + group)
    end = tl.load(bounds + group + 1)
    of_code = tl.zeros((block,), tl.float32)
    of_one = tl.zeros((block,), tl.float32)
    for first in range(tl.load(bounds + group), end, block):
        column = first + tl.arange(0, block)
        inside = column < end
        code = _codes(latent + row * columns, own_scale, own_offset, top, column, inside)
        place = tl.load(order + column, mask=inside, other=0)
        g = tl.load(gradient + row * columns + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(by_latent + row * columns + column, g, mask=inside)
        of_code += g * code
        of_one += g
    tl.store(by_code + row * groups + group, tl.sum(of_code, axis=0))
    tl.store(by_one + row * groups + group, tl.sum(of_one, axis=0))
