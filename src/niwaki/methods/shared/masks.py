"""Masks from scores: the lowest scores go, with exactly the number of zeros that a target asks for.

A higher score is kept. Ties fall to the lower index, so that a result depends on the scores alone. Every choice of a
mask is recorded for blocks.jsonl (`niwaki.methods.mask_scores`).

Legend: O rows, I columns, P columns of one panel, G groups, M group size.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.statistics import UNREACHED, Statistics
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed
from niwaki.kernels.select import above, keep_highest, keep_in_panel
from niwaki.kernels.types import PanelParts
from niwaki.methods.mask_scores import record_choice
from niwaki.model.decoder import Block

# (name of the matrix, weights [O, I] float32) → scores [O, I]
Score = Callable[[str, Tensor], Tensor]
# (scores [O, I], target) → keep mask [O, I]
ChooseMask = Callable[[Tensor, Target], Tensor]
# (scores [O, P], first column) → keep mask [O, P]
ChooseInPanel = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def compress_by_score(
    block: Block,
    targets: Mapping[str, Target],
    score: Score,
    choose: ChooseMask,
    statistics: Mapping[str, Statistics] | None,
) -> dict[str, Packed]:
    """Return every matrix of `targets` without the weights that have the lowest scores.

    A matrix that no token reached, according to `statistics`, is ranked by |W| and noted. `statistics` is None for a
    score that needs no data.
    """
    packed = {}
    for name, target in targets.items():
        weight_OI = block.weight(name).float()
        reached = statistics is None or statistics[name].tokens > 0
        scores_OI = score(name, weight_OI) if reached else weight_OI.abs()
        packed[name] = Packed.masked(weight_OI, choose(scores_OI, target), "" if reached else UNREACHED)
    return packed


def wanda_scores(weight_OI: Tensor, statistics: Statistics) -> Tensor:
    """Return Wanda's score |W|·‖X‖ [O, I]; |W| if no token reached the matrix."""
    scores_OI = weight_OI.float().abs()
    return scores_OI * statistics.sqnorm_I.sqrt() if statistics.tokens else scores_OI


def keep_by_row(scores_OI: Tensor, target: Target) -> Tensor:
    """Return the keep mask [O, I] without the lowest scores of each row; the zeros of rows differ by at most one."""
    if isinstance(target, NM):
        return keep_by_group(scores_OI, target)
    rows, columns = scores_OI.shape
    zeros = require_unstructured(target).zeros_in(rows, columns)
    edges = torch.arange(rows + 1, device=scores_OI.device, dtype=torch.int64) * zeros // rows
    keep_OI, bound_O1 = _drop_lowest(scores_OI, edges.diff())
    record_choice(target, scores_OI, keep_OI, bound_O1)
    return keep_OI


def keep_by_matrix(scores_OI: Tensor, target: Target) -> Tensor:
    """Return the keep mask [O, I] of one threshold for the whole matrix; an N:M target is chosen group by group."""
    if isinstance(target, NM):
        return keep_by_group(scores_OI, target)
    keep_OI, bound_1 = keep_highest(scores_OI, require_unstructured(target).zeros_in(*scores_OI.shape))
    record_choice(target, scores_OI, keep_OI, bound_1)
    return keep_OI


def require_unstructured(target: Target) -> Sparsity:
    """Return the target, whose zeros may lie anywhere. Raises TargetError for any other kind."""
    if not isinstance(target, Sparsity):
        raise TargetError(f"no mask of scores meets target {target}: expected {Sparsity.words} or {NM.words}")
    return target


def choose_by_panel(
    targets: Sequence[Sparsity], rows: Sequence[int], columns: int, device: torch.device
) -> ChooseInPanel:
    """Return a function that chooses the mask of one panel, for matrices of `columns` columns stacked by rows.

    Every matrix loses its own lowest scores. Its zeros are spread evenly over the panels.
    """
    zeros = [target.zeros_in(count, columns) for target, count in zip(targets, rows, strict=True)]
    parts = PanelParts.of(rows, zeros, device)

    def keep(scores_OP: Tensor, start: int) -> Tensor:
        keep_OP, bound_M = keep_in_panel(scores_OP, parts, columns, start)
        each = zip(targets, scores_OP.split(parts.rows), keep_OP.split(parts.rows), bound_M, strict=True)
        for target, own_scores_OP, own_keep_OP, bound in each:
            record_choice(target, own_scores_OP, own_keep_OP, bound, columns, start)
        return keep_OP

    return keep


def _drop_lowest(scores_OI: Tensor, zeros_O: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keep mask [O, I] without the `zeros_O` lowest scores of each row; counts differ by at most one.

    Return also the highest score that each row loses [O, 1], −∞ where no weight goes. A selection of the boundary
    value, with its ties resolved, is several times faster than a sort of the rows.
    """
    max_zeros = int(zeros_O.max())
    if max_zeros == 0:
        none_O1 = torch.full_like(scores_OI[:, :1], -torch.inf)
        return torch.ones_like(scores_OI, dtype=torch.bool), none_O1
    lowest = scores_OI.topk(max_zeros, dim=1, largest=False, sorted=False).values
    last = lowest.topk(min(2, max_zeros), dim=1).values  # boundaries of rows with the max, and with one less
    none = torch.full_like(last[:, :1], -torch.inf)
    bounds = torch.cat([last, none], dim=1)
    bound_O1 = bounds.gather(1, (max_zeros - zeros_O)[:, None])
    return above(scores_OI, bound_O1, zeros_O[:, None]), bound_O1


def keep_by_group(scores_OI: Tensor, target: NM) -> Tensor:
    """Return the keep mask [O, I] of the `keep` highest in every `group` neighbors along the inputs.

    A target with a share of zeros leaves the groups of columns dense that would lose the highest scores.
    """
    rows, columns = scores_OI.shape
    target.zeros_in(rows, columns)
    scores_OGM = scores_OI.view(rows, columns // target.group, target.group)
    # The rank of a weight is the number of neighbors below it. M comparisons are far cheaper than sorts of short rows.
    rank_OGM = torch.zeros_like(scores_OGM, dtype=torch.int16)
    for other in range(target.group):
        theirs_OG1 = scores_OGM[..., other : other + 1]
        rank_OGM += scores_OGM > theirs_OG1
        rank_OGM[..., other + 1 :] += scores_OGM[..., other + 1 :] == theirs_OG1
    keep_OI = (rank_OGM >= target.group - target.keep).view(rows, columns)
    if target.zeros_frac is not None:
        keep_OI = keep_OI | ~pruned_columns(scores_OI, keep_OI, target)
    record_choice(target, scores_OI, keep_OI, None)
    return keep_OI


def pruned_columns(scores_OI: Tensor, keep_OI: Tensor, target: NM) -> Tensor:
    """Return the columns [I] of the groups that are N:M: those whose removed scores add up to the least.

    `keep_OI` is the mask of a matrix in which all groups are. Of equal sums the group with the lower index is N:M.
    """
    rows, columns = scores_OI.shape
    lost_G = (scores_OI * ~keep_OI).view(rows, -1, target.group).sum((0, 2), dtype=torch.float64)
    pruned_G = torch.zeros_like(lost_G, dtype=torch.bool)
    pruned_G[lost_G.argsort(stable=True)[: target.pruned_groups(columns)]] = True
    return pruned_G.repeat_interleave(target.group)
