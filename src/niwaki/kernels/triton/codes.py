"""Column sweep of quantization, one panel, as a Triton kernel: a program owns some rows and walks the columns.

Rows are independent, so a panel is one launch. The launch also fits the levels if all columns share them. Arithmetic in
registers bounds the time: O·P² fused multiply-adds.

Legend: O rows, P columns of the panel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import Fit, Grid


def sweep_codes_triton(
    wanted_OP: Tensor, base_OP: Tensor | None, feed_PP: Tensor, grid: Grid, keep_OP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Implement `kernels.codes.sweep_codes` for one panel in place. The rows of every tensor are contiguous.

    Unlike there, the wanted values are not changed.
    """
    code_OP = torch.empty(wanted_OP.shape, dtype=torch.uint8, device=wanted_OP.device)
    levels = grid.scale_OG, grid.offset_OG, grid.group_I, grid.top_I
    return code_OP, _launch(wanted_OP, base_OP, feed_PP, levels, keep_OP, code_OP, None)


def sweep_fitted_triton(
    wanted_OP: Tensor,
    feed_PP: Tensor,
    fit: Fit,
    keep_OP: Tensor | None,
    code_OP: Tensor,
    scale_O: Tensor,
    offset_O: Tensor,
) -> Tensor:
    """Implement `kernels.codes.sweep_fitted` for one panel in place."""
    return _launch(wanted_OP, None, feed_PP, (scale_O, offset_O, code_OP, feed_PP), keep_OP, code_OP, fit)


def _launch(
    wanted_OP: Tensor,
    base_OP: Tensor | None,
    feed_PP: Tensor,
    levels: tuple[Tensor, Tensor, Tensor, Tensor],
    keep_OP: Tensor | None,
    code_OP: Tensor,
    fit: Fit | None,
) -> Tensor:
    """Launch the kernel. With `fit`, the last two of `levels` (group and top of the columns) are not read."""
    rows, columns = wanted_OP.shape
    change_OP = torch.empty(wanted_OP.shape, device=wanted_OP.device)
    base = wanted_OP if base_OP is None else base_OP
    keep = wanted_OP if keep_OP is None else keep_OP.view(torch.uint8)
    block_rows = 16
    _sweep[(triton.cdiv(rows, block_rows),)](
        wanted_OP,
        base,
        feed_PP,
        *levels,
        keep,
        code_OP,
        change_OP,
        rows,
        wanted_OP.stride(0),
        base.stride(0),
        feed_PP.stride(0),
        levels[0].stride(0),
        levels[1].stride(0),
        keep.stride(0),
        code_OP.stride(0),
        columns=columns,
        has_base=base_OP is not None,
        has_keep=keep_OP is not None,
        fitted=fit is not None,
        centred=fit is not None and fit.centre is not None,
        steps=0.0 if fit is None else float(fit.top),
        centre=0.0 if fit is None else float(fit.centre or 0.0),
        smallest=0.0 if fit is None else fit.smallest,
        block_rows=block_rows,
        block_columns=triton.next_power_of_2(columns),
        num_warps=4,
    )
    return change_OP


@triton.jit
def _rounded(value):
    """Round half to even, as torch does: adding 1.5·2²³ leaves no bits below one."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _fit_levels(shown, centred: tl.constexpr, steps: tl.constexpr, centre: tl.constexpr, smallest: tl.constexpr):
    """Return scale and offset of every row as `kernels.codes.span` does.

    Weights outside the panel are zero, which every range includes.
    """
    if centred:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(shown), 1), steps - centre), smallest)
        offset = scale * (0.0 - centre)
    else:
        low = tl.minimum(tl.min(shown, 1), 0.0)
        high = tl.maximum(tl.max(shown, 1), 0.0)
        scale = tl.maximum(tl.div_rn(high - low, steps), smallest)
        zero = _rounded(tl.div_rn(0.0 - low, scale))
        offset = (0.0 - tl.minimum(tl.maximum(zero, 0.0), steps)) * scale
    return scale, offset


@triton.jit
def _load_levels(scale, offset, group, top, here):
    """Load scale, offset and highest code of a column. The pointers are those of its rows, its group and its top."""
    number = tl.load(group)
    return (
        tl.load(scale + number, mask=here, other=1.0),
        tl.load(offset + number, mask=here, other=0.0),
        tl.load(top),
    )


@triton.jit
def _kept(value, keep, inside, has_keep: tl.constexpr):
    """Return the values, with zero for pruned weights if there is a mask."""
    if has_keep:
        value = tl.where(tl.load(keep, mask=inside, other=0) != 0, value, 0.0)
    return value


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
    code_stride,
    columns: tl.constexpr,
    has_base: tl.constexpr,
    has_keep: tl.constexpr,
    fitted: tl.constexpr,
    centred: tl.constexpr,
    steps: tl.constexpr,
    centre: tl.constexpr,
    smallest: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """Sweep the columns of some rows."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_columns)
    here = row < rows
    inside = here[:, None] & (column[None, :] < columns)
    far = row.to(tl.int64)
    value = tl.load(wanted + far[:, None] * wanted_stride + column[None, :], mask=inside, other=0.0)
    if fitted:
        shown = _kept(value, keep + far[:, None] * keep_stride + column[None, :], inside, has_keep)
        scale_k, offset_k = _fit_levels(shown, centred, steps, centre, smallest)
        tl.store(scale + far * scale_stride, scale_k, mask=here)
        tl.store(offset + far * offset_stride, offset_k, mask=here)
    for k in range(columns):
        # The current value of the column, from the registers of the panel.
        value_k = tl.sum(tl.where(column[None, :] == k, value, 0.0), axis=1)
        top_k = steps
        if not fitted:
            scale_k, offset_k, top_k = _load_levels(
                scale + far * scale_stride, offset + far * offset_stride, group + k, top + k, here
            )
        near_k = _kept(value_k, keep + far * keep_stride + k, here, has_keep)
        code_k = _rounded(tl.minimum(tl.maximum((near_k - offset_k) / scale_k, 0.0), top_k))
        start_k = value_k
        if has_base:
            start_k = tl.load(base + far * base_stride + k, mask=here, other=0.0)
        change_k = code_k * scale_k + offset_k - start_k
        tl.store(code + far * code_stride + k, code_k.to(tl.uint8), mask=here)
        tl.store(change + far * columns + k, change_k, mask=here)
        feed_k = tl.load(feed + k * feed_stride + column, mask=(column > k) & (column < columns), other=0.0)
        value -= change_k[:, None] * feed_k[None, :]
