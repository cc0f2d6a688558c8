"""Column sweep of pruning, one panel, as a Triton kernel: a program owns some rows and walks the columns in registers.

Rows are independent inside a panel, so a panel is one launch instead of several per column. Arithmetic in registers
bounds the time: about O·P² fused multiply-adds, and the selection of one column at a time.

Legend: O rows, P columns of the panel, M group size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import NMTarget


def sweep_panel_triton(
    panel_OP: Tensor, upper_PP: Tensor, keep_OP: Tensor | None, target: NMTarget | None
) -> tuple[Tensor, Tensor]:
    """Implement `kernels.sweep.sweep_panel` in place, for float32 tensors on one device.

    It is one launch and nothing else, because the launches of the host bound the time of a sweep.
    """
    rows, columns = panel_OP.shape
    errors_OP = torch.empty(rows, columns, device=panel_OP.device)
    if keep_OP is None:
        keep_OP = torch.empty(rows, columns, dtype=torch.bool, device=panel_OP.device)
    block_rows = 16
    _sweep[(triton.cdiv(rows, block_rows),)](
        panel_OP,
        upper_PP,
        keep_OP.view(torch.uint8),
        errors_OP,
        rows,
        panel_OP.stride(0),
        upper_PP.stride(0),
        keep_OP.stride(0),
        columns=columns,
        pruned_per_group=target.group - target.keep if target is not None else 0,
        group=target.group if target is not None else 1,
        grouped=target is not None,
        block_rows=block_rows,
        block_columns=triton.next_power_of_2(columns),
        num_warps=4,
    )
    return errors_OP, keep_OP


@triton.jit
def _sweep(
    panel,
    upper,
    keep,
    errors,
    rows,
    panel_stride,
    upper_stride,
    keep_stride,
    columns: tl.constexpr,
    pruned_per_group: tl.constexpr,
    group: tl.constexpr,
    grouped: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sweep the columns of some rows."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    far = row.to(tl.int64)[:, None]
    place = far * panel_stride + column[None, :]
    weight = tl.load(panel + place, mask=inside, other=0.0)
    kept = tl.full((block_rows, block_columns), 1, tl.int32)
    if not grouped:
        kept = tl.load(keep + far * keep_stride + column[None, :], mask=inside, other=1).to(tl.int32)
    diagonal = tl.load(upper + column * upper_stride + column, mask=column < columns, other=1.0)
    error = tl.zeros_like(weight)
    for j in range(columns):
        if grouped:  # noqa: SIM102 (a constant: the compiler drops the branch)
            if j % group == 0:
                saliency = weight / diagonal[None, :]
                saliency = saliency * saliency
                member = (column >= j) & (column < j + group)
                for _ in range(pruned_per_group):
                    candidate = tl.where(member[None, :] & (kept == 1), saliency, float("inf"))
                    lowest = tl.argmin(candidate, axis=1, tie_break_left=True)
                    kept = tl.where(column[None, :] == lowest[:, None], 0, kept)
        here = column[None, :] == j
        pruned = tl.sum(tl.where(here & (kept == 0), weight, 0.0), axis=1)
        step = pruned / tl.load(upper + j * upper_stride + j)
        upper_row = tl.load(upper + j * upper_stride + column, mask=(column >= j) & (column < columns), other=0.0)
        weight = weight - step[:, None] * upper_row[None, :]
        error = tl.where(here, step[:, None], error)
    tl.store(panel + place, weight, mask=inside)
    tl.store(errors + far * columns + column[None, :], error, mask=inside)
    if grouped:
        tl.store(keep + far * keep_stride + column[None, :], kept.to(tl.uint8), mask=inside)
