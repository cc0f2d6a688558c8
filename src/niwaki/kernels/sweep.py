"""Column sweep of pruning, one panel: the torch reference, and the dispatch to the Triton kernel.

Legend: O rows, P columns of the panel, M group size.
"""

import torch
from torch import Tensor

from niwaki.kernels.types import NMTarget


def sweep_panel(
    panel_OP: Tensor, upper_PP: Tensor, keep_OP: Tensor | None, target: NMTarget | None
) -> tuple[Tensor, Tensor]:
    """Prune `panel_OP` (float32, rows contiguous) in place from left to right; return (errors [O, P], keep [O, P]).

    `upper_PP` is the diagonal block of U for the panel. The caller gives either the mask `keep_OP` or an N:M `target`.
    With a target, the sweep removes the lowest W²/U_jj² of a group when it enters the group. Of equal values it removes
    the lower index first. Errors are (w − ŵ)/U_jj, which the caller propagates beyond the panel. A given mask is
    returned unchanged.
    """
    if panel_OP.is_cuda:
        from niwaki.kernels.triton.sweep import sweep_panel_triton

        return sweep_panel_triton(panel_OP, upper_PP, keep_OP, target)
    work_OP = panel_OP.contiguous()  # the loop reads columns, which lie far apart in a wide matrix
    errors_OP, keep_OP = sweep_panel_reference(work_OP, upper_PP.contiguous(), keep_OP, target)
    panel_OP.copy_(work_OP)
    return errors_OP, keep_OP


def sweep_panel_reference(
    panel_OP: Tensor, upper_PP: Tensor, keep_OP: Tensor | None, target: NMTarget | None
) -> tuple[Tensor, Tensor]:
    """Sweep the panel in plain torch, one column at a time, on any device."""
    columns = panel_OP.shape[1]
    errors_OP = torch.empty_like(panel_OP)
    keep_OP = torch.ones_like(panel_OP, dtype=torch.bool) if keep_OP is None else keep_OP.clone()
    for column in range(columns):
        if target is not None and column % target.group == 0:
            end = column + target.group
            saliency_OM = (panel_OP[:, column:end] / upper_PP.diagonal()[column:end]).square()
            lowest_OM = saliency_OM.argsort(dim=1, stable=True)[:, : target.group - target.keep]
            keep_OP[:, column:end].scatter_(1, lowest_OM, False)
        pruned_O = panel_OP[:, column] * ~keep_OP[:, column]
        error_O = pruned_O / upper_PP[column, column]
        # Column `column` itself becomes w − w = 0 where pruned and stays where kept.
        panel_OP[:, column:] -= error_O[:, None] * upper_PP[column, column:][None]
        errors_OP[:, column] = error_O
    return errors_OP, keep_OP
