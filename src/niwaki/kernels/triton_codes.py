"""One panel of the quantizing column sweep as a Triton kernel: a program owns some rows and walks the columns.

Rows are independent, so a panel is one launch. Bound by arithmetic in registers: O·P² fused multiply-adds.

Legend: O rows, P columns of the panel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.codes import Grid


def sweep_codes_triton(
    wanted_OP: Tensor, base_OP: Tensor | None, feed_PP: Tensor, grid: Grid, keep_OP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of `kernels.codes.sweep_codes` for one panel, where it lies: rows of every tensor are contiguous.

    But for the values themselves, which stay as they were.
    """
    rows, columns = wanted_OP.shape
    code_OP = torch.empty(wanted_OP.shape, dtype=torch.uint8, device=wanted_OP.device)
    change_OP = torch.empty(wanted_OP.shape, device=wanted_OP.device)
    base = wanted_OP if base_OP is None else base_OP
    keep = wanted_OP if keep_OP is None else keep_OP.view(torch.uint8)
    block_rows = 16
    _sweep[(triton.cdiv(rows, block_rows),)](
        wanted_OP,
        base,
        feed_PP,
        grid.scale_OG,
        grid.offset_OG,
        grid.group_I,
        grid.top_I,
        keep,
        code_OP,
        change_OP,
        rows,
        wanted_OP.stride(0),
        base.stride(0),
        feed_PP.stride(0),
        grid.scale_OG.stride(0),
        grid.offset_OG.stride(0),
        keep.stride(0),
        columns=columns,
        has_base=base_OP is not None,
        has_keep=keep_OP is not None,
        block_rows=block_rows,
        block_columns=triton.next_power_of_2(columns),
        num_warps=4,
    )
    return code_OP, change_OP


@triton.jit
def _sweep(
    wanted,
    base,
    feed,
    scale,
    offset,
    group,
    top,
    keep,
    code,
    change,
    rows,
    wanted_stride,
    base_stride,
    feed_stride,
    scale_stride,
    offset_stride,
    keep_stride,
    columns: tl.constexpr,
    has_base: tl.constexpr,
    has_keep: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    far = row.to(tl.int64)
    value = tl.load(wanted + far[:, None] * wanted_stride + column[None, :], mask=inside, other=0.0)
    for k in range(columns):
        here = row < rows
        at = far * columns + k
        group_k = tl.load(group + k)
        # The column's present value, gathered from the registers of the panel.
        value_k = tl.sum(tl.where(column[None, :] == k, value, 0.0), axis=1)
        scale_k = tl.load(scale + far * scale_stride + group_k, mask=here, other=1.0)
        offset_k = tl.load(offset + far * offset_stride + group_k, mask=here, other=0.0)
        near_k = value_k
        if has_keep:
            near_k = tl.where(tl.load(keep + far * keep_stride + k, mask=here, other=0) != 0, value_k, 0.0)
        exact = (near_k - offset_k) / scale_k
        exact = tl.minimum(tl.maximum(exact, 0.0), tl.load(top + k))
        # Half to even, as torch rounds: adding 1.5·2²³ leaves no bits below one.
        code_k = (exact + 12582912.0) - 12582912.0
        start_k = value_k
        if has_base:
            start_k = tl.load(base + far * base_stride + k, mask=here, other=0.0)
        change_k = code_k * scale_k + offset_k - start_k
        tl.store(code + at, code_k.to(tl.uint8), mask=here)
        tl.store(change + at, change_k, mask=here)
        later = (column > k) & (column < columns)
        feed_k = tl.load(feed + k * feed_stride + column, mask=later, other=0.0)
        value -= change_k[:, None] * feed_k[None, :]
