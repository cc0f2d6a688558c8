"""The lowest scores of matrices that lie one below the other go: the torch reference, and the choice of the kernel.

Legend: O rows of all parts, P columns of a panel, M parts, N scores of a part.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """Rows and zeros of every matrix; `about_M3` holds its first row, rows and zeros (int64) where the scores are."""

    rows: list[int]
    zeros: list[int]
    about_M3: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], zeros: Sequence[int], device: torch.device) -> "Parts":
        """To be made once for all panels: a GPU waits for the copy."""
        about = [list(part) for part in zip(accumulate(rows, initial=0), rows, zeros, strict=False)]
        return cls(list(rows), list(zeros), torch.tensor(about, device=device))

    def zeros_within(self, start: int, end: int, columns: int) -> list[int]:
        """Zeros from column `start` to `end` of `columns`, spread evenly; exact over all of them."""
        return [zeros * end // columns - zeros * start // columns for zeros in self.zeros]


def keep_in_panel(scores_OP: Tensor, parts: Parts, columns: int, start: int) -> tuple[Tensor, Tensor]:
    """Boolean [O, P] for the columns from `start` on of matrices of `columns`: each part loses its lowest scores.

    How many follows from `Parts.zeros_within`; ties fall to the lower index, by rows. With it the highest score that
    each part loses [M], −∞ where none goes. Float32 without NaN. On a GPU nothing here waits for it.
    """
    if scores_OP.is_cuda:
        from niwaki.kernels.triton.select import keep_in_panel_triton

        return keep_in_panel_triton(scores_OP, parts, columns, start)
    zeros = parts.zeros_within(start, start + scores_OP.shape[1], columns)
    found = [keep_highest(part_OP, count) for part_OP, count in zip(scores_OP.split(parts.rows), zeros, strict=True)]
    return torch.cat([keep_OP for keep_OP, _ in found]), torch.cat([bound_11.view(1) for _, bound_11 in found])


def keep_highest(scores: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Boolean of the same shape without the `zeros` lowest scores, and the highest of these [1, 1], on any device."""
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
