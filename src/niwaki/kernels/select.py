"""Removal of the lowest scores, of stacked matrices or by rank within a row, and sums below the cuts of a row.

Every function is a torch reference or the dispatch to a GPU kernel (`triton.select`, `triton.ranks`).

Legend: O rows (of all parts), I columns, P columns of a panel, M parts, N scores of a part, D cuts.
"""

import torch
from torch import Tensor

from niwaki.kernels.types import PanelParts

MAX_FUSED_COLUMNS = 16384  # a float32 row of this length fits in the memory of one multiprocessor


def keep_in_panel(scores_OP: Tensor, parts: PanelParts, columns: int, start: int) -> tuple[Tensor, Tensor]:
    """Return a mask [O, P] without the lowest scores of each part, and the highest removed score of each part [M].

    The panel begins at column `start` of matrices with `columns` columns. `PanelParts.zeros_within` gives the number of
    removed scores. Of equal scores the lower index (by rows) is removed first. The bound is −∞ if a part
    removes none. Scores are float32 without NaN. The host never waits for a GPU here.
    """
    if scores_OP.is_cuda:
        from niwaki.kernels.triton.select import keep_in_panel_triton

        return keep_in_panel_triton(scores_OP, parts, columns, start)
    zeros = parts.zeros_within(start, start + scores_OP.shape[1], columns)
    kept = [keep_highest(part_OP, count) for part_OP, count in zip(scores_OP.split(parts.rows), zeros, strict=True)]
    return torch.cat([keep_OP for keep_OP, _ in kept]), torch.cat([bound_11.view(1) for _, bound_11 in kept])


def keep_highest(scores: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Return a mask without the `zeros` lowest scores, and the highest of these [1, 1], on any device."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool), scores.new_full((1, 1), -torch.inf)
    scores_1N = scores.reshape(1, -1)
    bound_11 = scores_1N.topk(zeros, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    return above(scores_1N, bound_11, zeros).view(scores.shape), bound_11


def above(scores_OI: Tensor, bound_O1: Tensor, zeros_O1: Tensor | int) -> Tensor:
    """Return a mask [O, I] of the scores above the bound of their row, and of the equal scores that stay.

    Of the scores equal to the bound, the first ones are removed until `zeros_O1` scores of the row are gone.
    """
    tied_OI = scores_OI == bound_O1
    left_O1 = zeros_O1 - (scores_OI < bound_O1).sum(1, keepdim=True)
    return (scores_OI > bound_O1) | (tied_OI & (tied_OI.cumsum(1, dtype=torch.int32) > left_O1))


def fused(values_OI: Tensor) -> bool:
    """Return whether the GPU kernels take a matrix of this shape and device."""
    return values_OI.is_cuda and values_OI.shape[1] <= MAX_FUSED_COLUMNS


def drop_lowest(values_OI: Tensor, rank_OI: Tensor, zeros_O: Tensor) -> Tensor:
    """Return `values_OI` with zeros where the rank within the row is below `zeros_O`."""
    if fused(values_OI):
        from niwaki.kernels.triton.ranks import drop_lowest_triton

        return drop_lowest_triton(values_OI, rank_OI, zeros_O)
    return values_OI * (rank_OI >= zeros_O[:, None])


def sums_below(gradient_OI: Tensor, values_OI: Tensor, order_OI: Tensor, cuts_D: Tensor) -> Tensor:
    """Return Σ gradient · value over the weights of every row that each cut removes: [O, D], float32 or wider.

    A cut removes the weights of lowest rank. `order_OI` holds the columns of a row from the lowest rank to the highest.
    """
    if fused(values_OI):
        from niwaki.kernels.triton.ranks import sums_below_triton

        return sums_below_triton(gradient_OI, values_OI, order_OI, cuts_D)
    return sums_below_reference(gradient_OI * values_OI, order_OI, cuts_D)


def sums_below_reference(product_OI: Tensor, order_OI: Tensor, cuts_D: Tensor) -> Tensor:
    """Compute `sums_below` of products in plain torch: rank order times a 0/1 matrix of the weights that a cut takes.

    CUDA sums products of half precision in float32 without a float32 copy.
    """
    sorted_OI = product_OI.gather(1, order_OI)
    taken_ID = torch.arange(sorted_OI.shape[1], device=cuts_D.device)[:, None] < cuts_D
    if sorted_OI.is_cuda and sorted_OI.dtype.itemsize == 2:
        return torch.mm(sorted_OI, taken_ID.to(sorted_OI.dtype), out_dtype=torch.float32)
    return sorted_OI.to(cuts_D.dtype) @ taken_ID.to(cuts_D.dtype)
