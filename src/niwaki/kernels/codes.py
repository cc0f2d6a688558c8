"""Column sweep of quantization: the torch reference, and the dispatch to the compiled kernels.

Legend: O rows, I columns, P columns of a panel, C columns that share levels, G groups of columns that share a scale.
"""

import torch
from torch import Tensor

from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.types import Fit, Grid

PANEL_COLUMNS = 128


def span(weight_OC: Tensor, fit: Fit, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return scale and offset [O, 1] of levels that cover `share` of the range of the weights (the last dimension)."""
    if fit.centre is not None:
        reach_O1 = weight_OC.abs().amax(-1, keepdim=True) * share
        scale_O1 = (reach_O1 / (fit.top - fit.centre)).clamp_min(fit.smallest)
        return scale_O1, -fit.centre * scale_O1
    low_O1, high_O1 = torch.aminmax(weight_OC, dim=-1, keepdim=True)
    low_O1, high_O1 = low_O1.clamp_max(0) * share, high_O1.clamp_min(0) * share
    scale_O1 = ((high_O1 - low_O1) / fit.top).clamp_min(fit.smallest)
    return scale_O1, -(-low_O1 / scale_O1).round().clamp(0, fit.top) * scale_O1


def sweep_fitted(
    wanted_OC: Tensor,
    feed_CC: Tensor,
    fit: Fit,
    keep_OC: Tensor | None,
    code_OC: Tensor,
    scale_O: Tensor,
    offset_O: Tensor,
) -> Tensor:
    """Fit levels to columns that share them, then round the columns as `sweep_codes` does without a base.

    Write codes (uint8), scales and offsets to the given tensors, and return the changes [O, C]. With a mask, the levels
    follow from the kept weights alone. Float32. `wanted_OC` is not changed.
    """
    if wanted_OC.is_cuda and wanted_OC.shape[1] <= PANEL_COLUMNS:
        from niwaki.kernels.triton.codes import sweep_fitted_triton

        return sweep_fitted_triton(wanted_OC, feed_CC, fit, keep_OC, code_OC, scale_O, offset_O)
    work_OC = wanted_OC.clone(memory_format=torch.contiguous_format)
    scale_O1, offset_O1 = span(work_OC if keep_OC is None else work_OC * keep_OC, fit)
    same_C = torch.zeros(work_OC.shape[1], dtype=torch.int32, device=work_OC.device)
    grid = Grid(scale_O1, offset_O1, same_C, torch.full_like(same_C, fit.top, dtype=torch.float32))
    new_code_OC, change_OC = sweep_codes(work_OC, None, feed_CC, grid, keep_OC)
    code_OC.copy_(new_code_OC)
    scale_O.copy_(scale_O1[:, 0])
    offset_O.copy_(offset_O1[:, 0])
    return change_OC


def sweep_codes(
    wanted_OI: Tensor, base_OI: Tensor | None, feed_II: Tensor, grid: Grid, keep_OI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round the columns from left to right, and move the change of each column to the columns on its right.

    Column k takes the level nearest to `wanted_OI[:, k]`. Where `keep_OI` (boolean) is false, it takes the level
    nearest to zero. The change is measured from `base_OI[:, k]`, or from the wanted value if there is no base. The
    wanted values on the right change by −change · `feed_II[k]`. Only the upper triangle of `feed_II` is read. Float32;
    `wanted_OI` is overwritten. Return (codes [O, I] uint8, changes [O, I]).
    """
    if wanted_OI.is_cuda:
        return _sweep_panels(wanted_OI, base_OI, feed_II, grid, keep_OI)
    compiled = cpu_module()
    if compiled is None or wanted_OI.dtype != torch.float32:
        return sweep_codes_reference(wanted_OI, base_OI, feed_II, grid, keep_OI)
    code_OI = torch.empty(wanted_OI.shape, dtype=torch.uint8)
    change_OI = torch.empty_like(wanted_OI)
    compiled.sweep_codes(
        wanted_OI,
        wanted_OI if base_OI is None else base_OI.contiguous(),
        base_OI is not None,
        feed_II.contiguous(),
        grid.scale_OG.contiguous(),
        grid.offset_OG.contiguous(),
        grid.group_I,
        grid.top_I,
        None if keep_OI is None else keep_OI.contiguous().view(torch.uint8),
        code_OI,
        change_OI,
        torch.get_num_threads(),
    )
    return code_OI, change_OI


def sweep_codes_reference(
    wanted_OI: Tensor, base_OI: Tensor | None, feed_II: Tensor, grid: Grid, keep_OI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sweep in plain torch, one column at a time, on any device and in any float dtype."""
    code_OI = torch.empty(wanted_OI.shape, dtype=torch.uint8, device=wanted_OI.device)
    change_OI = torch.empty_like(wanted_OI)
    for column, group in enumerate(grid.group_I.tolist()):
        scale_O, offset_O = grid.scale_OG[:, group], grid.offset_OG[:, group]
        wanted_O = wanted_OI[:, column]
        near_O = wanted_O if keep_OI is None else torch.where(keep_OI[:, column], wanted_O, 0.0)
        code_O = ((near_O - offset_O) / scale_O).round().clamp(0, float(grid.top_I[column]))
        change_O = code_O * scale_O + offset_O - (wanted_O if base_OI is None else base_OI[:, column])
        wanted_OI[:, column + 1 :] -= change_O[:, None] * feed_II[column, column + 1 :]
        code_OI[:, column], change_OI[:, column] = code_O.to(torch.uint8), change_O
    return code_OI, change_OI


def _sweep_panels(
    wanted_OI: Tensor, base_OI: Tensor | None, feed_II: Tensor, grid: Grid, keep_OI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sweep every panel of columns in one launch, and update the columns on its right by one matrix product."""
    from niwaki.kernels.triton.codes import sweep_codes_triton

    columns = wanted_OI.shape[1]
    codes, changes = [], []
    for start in range(0, columns, PANEL_COLUMNS):
        end = min(start + PANEL_COLUMNS, columns)
        code_OP, change_OP = sweep_codes_triton(
            wanted_OI[:, start:end],
            None if base_OI is None else base_OI[:, start:end],
            feed_II[start:end, start:end],
            grid.columns(start, end),
            None if keep_OI is None else keep_OI[:, start:end],
        )
        codes.append(code_OP)
        changes.append(change_OP)
        if end < columns:
            wanted_OI[:, end:].addmm_(change_OP, feed_II[start:end, end:], alpha=-1)
    return (codes[0], changes[0]) if len(codes) == 1 else (torch.cat(codes, dim=1), torch.cat(changes, dim=1))
