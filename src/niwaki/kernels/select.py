"""The lowest scores of matrices that lie one below the other go: the torch reference, and the choice of the kernel.

Legend: O rows of all parts, P columns, M parts, N scores of a part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_highest(scores_OP: Tensor, rows: Sequence[int], zeros: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boolean [O, P]: each part, of so many rows, loses its so many lowest scores; ties to the lower index, by rows.

    With it the highest score that each part loses [M], −∞ where none goes. Float32 without NaN. On a GPU nothing here
    waits for it.
    """
    if scores_OP.is_cuda:
        from niwaki.kernels.triton_select import keep_highest_triton

        return keep_highest_triton(scores_OP, rows, zeros)
    parts = zip(scores_OP.split(list(rows)), zeros, strict=True)
    found = [keep_highest_reference(part_OP, count) for part_OP, count in parts]
    return torch.cat([keep_OP for keep_OP, _ in found]), torch.cat([bound_11.view(1) for _, bound_11 in found])


def keep_highest_reference(scores: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """The same for one part of any shape, on any device; the bound is [1, 1]."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool), scores.new_full((1, 1), -torch.inf)
    scores_1N = scores.reshape(1, -1)
    bound_11 = scores_1N.topk(zeros, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    return above(scores_1N, bound_11, zeros).view(scores.shape), bound_11


def above(scores_OI: Tensor, bound_O1: Tensor, zeros_O1: Tensor | int) -> Tensor:
    """Boolean [O, I]: what lies above the bound of its row, and of what ties with it all but as many as have to go."""
    tied_OI = scores_OI == bound_O1
    left_O1 = zeros_O1 - (scores_OI < bound_O1).sum(1, keepdim=True)
    return (scores_OI > bound_O1) | (tied_OI & (tied_OI.cumsum(1, dtype=torch.int32) > left_O1))
