"""Pruning by rank and sums below the cuts of a row, as Triton kernels: one program and one pass per row.

The memory bandwidth bounds both. Pruning reads values and ranks and writes values. Sums read gradients, values and
order. A row is sorted by rank and summed inside one multiprocessor, always in the same order.

Legend: O rows, I columns, D cuts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # columns that a program prunes


def drop_lowest_triton(values_OI: Tensor, rank_OI: Tensor, zeros_O: Tensor) -> Tensor:
    """Implement `kernels.select.drop_lowest`."""
    rows, columns = values_OI.shape
    values_OI, rank_OI = values_OI.contiguous(), rank_OI.contiguous()
    pruned_OI = torch.empty_like(values_OI)
    grid = (rows, triton.cdiv(columns, BLOCK))
    _drop[grid](values_OI, rank_OI, zeros_O.to(torch.int32), pruned_OI, columns, block=BLOCK, num_warps=4)
    return pruned_OI


def sums_below_triton(gradient_OI: Tensor, values_OI: Tensor, order_OI: Tensor, cuts_D: Tensor) -> Tensor:
    """Implement `kernels.select.sums_below`."""
    rows, columns = values_OI.shape
    sums_OD = torch.empty(rows, len(cuts_D), device=values_OI.device)
    block = triton.next_power_of_2(columns)
    _sums[(rows,)](
        gradient_OI.contiguous(),
        values_OI.contiguous(),
        order_OI,
        cuts_D.to(torch.int32),
        sums_OD,
        columns,
        len(cuts_D),
        block=block,
        block_cuts=triton.next_power_of_2(len(cuts_D)),
        num_warps=min(max(block // 1024, 1), 16),
    )
    return sums_OD


@triton.jit
def _drop(values, rank, zeros, pruned, columns, block: tl.constexpr):
    """Prune some columns of a row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = row.to(tl.int64) * columns + column
    inside = column < columns
    value = tl.load(values + place, mask=inside)
    kept = tl.load(rank + place, mask=inside).to(tl.int32) >= tl.load(zeros + row)
    tl.store(pruned + place, tl.where(kept, value, 0.0), mask=inside)


@triton.jit
def _sums(gradient, values, order, cuts, sums, columns, count, block: tl.constexpr, block_cuts: tl.constexpr):
    """Sum a row in rank order up to each of `count` cuts."""
    row = tl.program_id(0)
    column = tl.arange(0, block)
    place = row.to(tl.int64) * columns + column
    inside = column < columns
    product = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    ordered = tl.gather(product, tl.load(order + place, mask=inside, other=0).to(tl.int32), 0)
    below = tl.cumsum(tl.where(inside, ordered, 0.0), 0)
    number = tl.arange(0, block_cuts)
    cut = tl.load(cuts + number, mask=number < count, other=0)
    taken = tl.where(cut > 0, tl.gather(below, tl.maximum(cut - 1, 0), 0), 0.0)
    tl.store(sums + row.to(tl.int64) * count + number, taken, mask=number < count)
