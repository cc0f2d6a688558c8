"""Selection of the lowest scores of stacked matrices by the digits of their bits (radix selection).

The bits of a float, read as an unsigned number with the sign inverted, have the order of the floats. Four passes count
digits of 8 bits, each only for the scores that share the digits of the passes before. A fifth pass writes the mask. All
parts of a panel share the same five launches. The reads bound the time: five per score, from the cache at panel size.

Legend: O rows of all parts, P columns, M parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import PanelParts

PASSES = tl.constexpr(4)
BINS = tl.constexpr(256)
BLOCK = 4096


def keep_in_panel_triton(scores_OP: Tensor, parts: PanelParts, columns: int, start: int) -> tuple[Tensor, Tensor]:
    """Implement `kernels.select.keep_in_panel`."""
    device, width, count = scores_OP.device, scores_OP.shape[1], len(parts.rows)
    blocks = triton.cdiv(max(parts.rows) * width, BLOCK)
    counts = torch.zeros(PASSES.value, count, BINS.value, dtype=torch.int32, device=device)
    each = torch.empty(
        count, blocks, BINS.value, dtype=torch.int32, device=device
    )  # counts of the last digit per block
    keep_OP = torch.empty(scores_OP.shape, dtype=torch.bool, device=device)
    bound_M = torch.empty(count, device=device)
    place = scores_OP.contiguous(), parts.about_M3, counts, each, count, width, start, columns
    for number in range(PASSES.value):
        _count[(blocks, count)](*place, number=number, block=BLOCK, num_warps=8)
    _mask[(blocks, count)](*place, keep_OP.view(torch.uint8), bound_M, block=BLOCK, num_warps=8)
    return keep_OP, bound_M


@triton.jit
def _part(about, width, start, columns):
    """Return the first score of the part of this program, and the numbers of its scores and removed scores."""
    here = about + 3 * tl.program_id(1)
    zeros = tl.load(here + 2)
    goes = zeros * (start + width) // columns - zeros * start // columns
    return tl.load(here) * width, (tl.load(here + 1) * width).to(tl.int32), goes.to(tl.int32)


@triton.jit
def _key(score):
    """Return unsigned numbers in the order of the scores. Both zeros have the same number."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    # Not ~bits: the interpreter of Triton 3.7 cannot invert unsigned numbers.
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _last_removed(counts, many, goes, passes: tl.constexpr):
    """Return the leading digits of the last removed score, and the numbers of removed and of all scores with them."""
    bins = tl.arange(0, BINS)
    prefix = tl.zeros((), tl.uint32)
    left = goes
    alike = goes
    for number in tl.static_range(passes):
        count = tl.load(counts + (number * many + tl.program_id(1)) * BINS + bins)
        digit = tl.sum((tl.cumsum(count, 0) < left).to(tl.int32))
        left -= tl.sum(tl.where(bins < digit, count, 0))
        alike = tl.sum(tl.where(bins == digit, count, 0))
        prefix = (prefix << 8) | digit.to(tl.uint32)
    return prefix, left, alike


@triton.jit
def _count(scores, about, counts, each, many, width, start, columns, number: tl.constexpr, block: tl.constexpr):
    """Count one digit of the scores of a block."""
    first, size, goes = _part(about, width, start, columns)
    if tl.program_id(0) * block < size:
        place = tl.program_id(0) * block + tl.arange(0, block)
        here = place < size
        key = _key(tl.load(scores + first + place, mask=here, other=0.0))
        if number > 0:
            prefix, _, _ = _last_removed(counts, many, goes, number)
            here = here & ((key >> (32 - 8 * number)) == prefix)
        bins = tl.arange(0, BINS)
        digit = (key >> (24 - 8 * number)) & 255
        counted = tl.histogram(tl.where(here, digit, 0).to(tl.int32), BINS)
        counted -= tl.where(bins == 0, block - tl.sum(here.to(tl.int32)), 0)
        to = counts + (number * many + tl.program_id(1)) * BINS + bins
        tl.atomic_add(to, counted, mask=counted > 0, sem="relaxed")
        if number == PASSES - 1:
            own = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            tl.store(each + own * BINS + bins, counted)


@triton.jit
def _mask(scores, about, counts, each, many, width, start, columns, keep, bound, block: tl.constexpr):
    """Write the mask of a block, and in the first block the bound of the part."""
    first, size, goes = _part(about, width, start, columns)
    if tl.program_id(0) * block < size:
        lowest, left, alike = _last_removed(counts, many, goes, PASSES)
        inside = tl.arange(0, block)
        place = tl.program_id(0) * block + inside
        here = place < size
        key = _key(tl.load(scores + first + place, mask=here, other=0.0))
        stays = (key > lowest) | (goes == 0)
        if alike > left:  # of equal scores the first ones are removed
            before = tl.zeros((), tl.int32)
            digit = (lowest & 255).to(tl.int32)
            for others in range(0, tl.program_id(0), BINS):
                other = others + tl.arange(0, BINS)
                theirs = (tl.program_id(1) * tl.num_programs(0) + other) * BINS + digit
                before += tl.sum(tl.load(each + theirs, mask=other < tl.program_id(0), other=0))
            tied = (key == lowest) & here
            stays = stays | (tied & (before + tl.cumsum(tied.to(tl.int32), 0) > left))
        tl.store(keep + first + place, stays.to(tl.uint8), mask=here)
        if tl.program_id(0) == 0:
            bits = tl.where(lowest >> 31 == 1, lowest & 0x7FFFFFFF, lowest ^ 0xFFFFFFFF)
            score = bits.to(tl.float32, bitcast=True)
            tl.store(bound + tl.program_id(1), tl.where(goes == 0, float("-inf"), score))
