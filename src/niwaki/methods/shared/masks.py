"""Which weights stay, given a score for each (higher is kept), with exactly the number of zeros asked for.

Ties fall to the lower index, so that a result depends on nothing but the scores. What was chosen for a target is noted
for the reader of blocks.jsonl (`niwaki.methods.mask_scores`).

Legend: O rows, I columns, P columns of one panel, G groups, M group size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from niwaki.config.recipe import NM, Sparsity, Target
from niwaki.kernels.select import above, keep_highest, keep_in_panel
from niwaki.kernels.types import PanelParts
from niwaki.methods.mask_scores import note

# (scores [O, P], first column) → keep mask [O, P]
InPanel = Callable[[Tensor, int], Tensor]


def keep_by_row(scores_OI: Tensor, target: Target) -> Tensor:
    """Boolean [O, I]: every row loses its lowest scores; the rows' counts differ by at most one."""
    if isinstance(target, NM):
        return keep_by_group(scores_OI, target)
    rows, columns = scores_OI.shape
    zeros = target.zeros_in(rows, columns)
    edges = torch.arange(rows + 1, device=scores_OI.device, dtype=torch.int64) * zeros // rows
    keep_OI, bound_O1 = _drop_lowest(scores_OI, edges.diff())
    note(target, scores_OI, keep_OI, bound_O1)
    return keep_OI


def keep_by_matrix(scores_OI: Tensor, target: Target) -> Tensor:
    """Boolean [O, I]: one threshold for the whole matrix (N:M targets are chosen group by group anyway)."""
    if isinstance(target, NM):
        return keep_by_group(scores_OI, target)
    keep_OI, bound_1 = keep_highest(scores_OI, target.zeros_in(*scores_OI.shape))
    note(target, scores_OI, keep_OI, bound_1)
    return keep_OI


def by_panel(targets: Sequence[Sparsity], rows: Sequence[int], columns: int, device: torch.device) -> InPanel:
    """Chooses masks [O, P] from scores and the first column, for matrices of `columns`, one below the other.

    Every matrix loses its own lowest scores, its zeros spread evenly over panels.
    """
    zeros = [target.zeros_in(count, columns) for target, count in zip(targets, rows, strict=True)]
    parts = PanelParts.of(rows, zeros, device)

    def keep(scores_OP: Tensor, start: int) -> Tensor:
        keep_OP, bound_M = keep_in_panel(scores_OP, parts, columns, start)
        each = zip(targets, scores_OP.split(parts.rows), keep_OP.split(parts.rows), bound_M, strict=True)
        for target, own_scores_OP, own_keep_OP, bound in each:
            note(target, own_scores_OP, own_keep_OP, bound, columns, start)
        return keep_OP

    return keep


def _drop_lowest(scores_OI: Tensor, zeros_O: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean [O, I] without the `zeros_O` lowest of each row, counts that differ by at most one.

    With it the highest score that each row loses [O, 1], −∞ where none goes. Selecting the boundary value and settling
    its ties is several times faster than sorting the rows.
    """
    most = int(zeros_O.max())
    if most == 0:
        none_O1 = torch.full_like(scores_OI[:, :1], -torch.inf)
        return torch.ones_like(scores_OI, dtype=torch.bool), none_O1
    lowest = scores_OI.topk(most, dim=1, largest=False, sorted=False).values
    last = lowest.topk(min(2, most), dim=1).values  # the boundary of rows with `most` zeros, and with one less
    none = torch.full_like(last[:, :1], -torch.inf)
    bounds = torch.cat([last, none], dim=1)
    bound_O1 = bounds.gather(1, (most - zeros_O)[:, None])
    return above(scores_OI, bound_O1, zeros_O[:, None]), bound_O1


def keep_by_group(scores_OI: Tensor, target: NM) -> Tensor:
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
    keep_OI = (rank_OGM >= target.group - target.keep).view(rows, columns)
    note(target, scores_OI, keep_OI, None)
    return keep_OI
