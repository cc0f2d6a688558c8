"""Pruning by rank within a row, and what every cut of a row would change: torch references, and the choice of kernels.

Legend: O rows, I columns, D cuts.
"""

import torch
from torch import Tensor

FUSED_COLUMNS = 16384  # a row lies in the memory of one multiprocessor, in float32


def fused(values_OI: Tensor) -> bool:
    """Whether kernels of a GPU take matrices like this one."""
    return values_OI.is_cuda and values_OI.shape[1] <= FUSED_COLUMNS


def drop_lowest(values_OI: Tensor, rank_OI: Tensor, zeros_O: Tensor) -> Tensor:
    """`values_OI` with zeros where the rank within the row is below `zeros_O`."""
    if fused(values_OI):
        from niwaki.kernels.triton.ranks import drop_lowest_triton

        return drop_lowest_triton(values_OI, rank_OI, zeros_O)
    return values_OI * (rank_OI >= zeros_O[:, None])


def sums_below(gradient_OI: Tensor, values_OI: Tensor, order_OI: Tensor, cuts_D: Tensor) -> Tensor:
    """Σ gradient · value over the cut lowest-ranked weights of every row, [O, D] float32 (or wider) for every cut.

    `order_OI` holds the columns of a row from the lowest rank to the highest.
    """
    if fused(values_OI):
        from niwaki.kernels.triton.ranks import sums_below_triton

        return sums_below_triton(gradient_OI, values_OI, order_OI, cuts_D)
    return sums_below_reference(gradient_OI * values_OI, order_OI, cuts_D)


def sums_below_reference(product_OI: Tensor, order_OI: Tensor, cuts_D: Tensor) -> Tensor:
    """The same of products, in plain torch: in rank order, times a 0/1 matrix of what each cut takes.

    Products of half precision are summed in float32 on CUDA without a copy in float32.
    """
    sorted_OI = product_OI.gather(1, order_OI)
    taken_ID = torch.arange(sorted_OI.shape[1], device=cuts_D.device)[:, None] < cuts_D
    if sorted_OI.is_cuda and sorted_OI.dtype.itemsize == 2:
        return torch.mm(sorted_OI, taken_ID.to(sorted_OI.dtype), out_dtype=torch.float32)
    return sorted_OI.to(cuts_D.dtype) @ taken_ID.to(cuts_D.dtype)
