"""Which weights stay, given a score for each (higher is kept), with exactly the number of zeros asked for.

Ties fall to the lower index, so that a result depends on nothing but the scores.

Legend: O rows, I columns, G groups, M group size.
"""

import torch
from torch import Tensor

from niwaki.config import Grouped, Sparsity, Target


def keep_by_row(scores_OI: Tensor, target: Target) -> Tensor:
    """Boolean [O, I]: every row loses its lowest scores; the rows' counts differ by at most one."""
    rows, columns = scores_OI.shape
    zeros = target.zeros_in(rows, columns)
    if isinstance(target, Grouped):
        return keep_by_group(scores_OI, target)
    edges = torch.arange(rows + 1, device=scores_OI.device, dtype=torch.int64) * zeros // rows
    zeros_O1 = edges.diff()[:, None]
    ranked_OI = scores_OI.argsort(dim=1, stable=True)
    cut_OI = torch.arange(columns, device=scores_OI.device)[None] < zeros_O1
    keep_OI = torch.empty_like(scores_OI, dtype=torch.bool)
    return keep_OI.scatter_(1, ranked_OI, ~cut_OI)


def keep_by_matrix(scores_OI: Tensor, target: Target) -> Tensor:
    """Boolean [O, I]: one threshold for the whole matrix (N:M targets are chosen group by group anyway)."""
    if isinstance(target, Grouped):
        return keep_by_group(scores_OI, target)
    return keep_highest(scores_OI, target.zeros_in(*scores_OI.shape))


def keep_highest(scores: Tensor, zeros: int) -> Tensor:
    """Boolean of the same shape: all but the `zeros` lowest scores."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:zeros]] = False
    return keep.view(scores.shape)


def keep_by_group(scores_OI: Tensor, target: Grouped) -> Tensor:
    """Boolean [O, I]: the `keep` highest of every `group` neighbours along the inputs."""
    rows, columns = scores_OI.shape
    target.zeros_in(rows, columns)
    scores_OGM = scores_OI.view(rows, columns // target.group, target.group)
    # The rank of a weight is the number it beats; M comparisons are far cheaper than sorting many short rows.
    rank_OGM = torch.zeros_like(scores_OGM, dtype=torch.int16)
    for other in range(target.group):
        theirs_OG1 = scores_OGM[..., other : other + 1]
        rank_OGM += scores_OGM > theirs_OG1
        rank_OGM[..., other + 1 :] += scores_OGM[..., other + 1 :] == theirs_OG1
    return (rank_OGM >= target.group - target.keep).view(rows, columns)


def zeros_up_to(target: Sparsity, rows: int, columns: int, column: int) -> int:
    """Zeros among the first `column` columns when they are spread evenly; exact at the last column."""
    return target.zeros_in(rows, columns) * column // columns
