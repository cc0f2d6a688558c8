"""The lowest scores of matrices that lie one below the other, found by the digits of their bits (radix selection).

A float's bits, seen as an unsigned number with the sign turned, are in its order. Three passes count 11, 11 and 10 of
them, each only among the scores that share the digits found so far; a fourth writes the mask. All parts of a panel take
part in the same four launches. Bound by the reads: four of every score, from the cache at the size of a panel.

Legend: O rows of all parts, P columns, M parts.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

PASSES = 3
BINS = tl.constexpr(2048)
BLOCK = 8192


def keep_highest_triton(scores_OP: Tensor, rows: Sequence[int], zeros: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The contract of `kernels.select.keep_highest`."""
    device, columns, parts = scores_OP.device, scores_OP.shape[1], len(rows)
    scores_OP = scores_OP.contiguous()
    firsts = accumulate(rows, initial=0)
    table = [(first * columns, count * columns, gone) for first, count, gone in zip(firsts, rows, zeros, strict=False)]
    # Out of pinned memory, or the host would wait until everything before this has been computed.
    about_M3 = torch.tensor(table, pin_memory=scores_OP.is_cuda).to(device, non_blocking=True)
    counts = torch.zeros(PASSES, parts, BINS.value, dtype=torch.int32, device=device)
    keep_OP = torch.empty(scores_OP.shape, dtype=torch.bool, device=device)
    bound_M = torch.empty(parts, device=device)
    grid = (triton.cdiv(max(rows) * columns, BLOCK), parts)
    for number in range(PASSES):
        _count[grid](scores_OP, about_M3, counts, parts, number=number, block=BLOCK, num_warps=8)
    _mask[grid](
        scores_OP, about_M3, counts, keep_OP.view(torch.uint8), bound_M, parts, block=BLOCK, num_warps=8
    )  # fmt: skip
    return keep_OP, bound_M


@triton.jit
def _key(score):
    """Unsigned numbers in the order of the scores; both zeros are one."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _found(counts, part, parts, zeros, passes: tl.constexpr):
    """The leading digits of the last score that goes, how many with these digits go, and how many have them."""
    bins = tl.arange(0, BINS)
    prefix = tl.zeros((), tl.uint32)
    left = zeros
    alike = zeros
    for number in tl.static_range(passes):
        count = tl.load(counts + (number * parts + part) * BINS + bins)
        digit = tl.sum((tl.cumsum(count, 0) < left).to(tl.int32))
        left -= tl.sum(tl.where(bins < digit, count, 0))
        alike = tl.sum(tl.where(bins == digit, count, 0))
        prefix = (prefix << (11 if number < 2 else 10)) | digit.to(tl.uint32)
    return prefix, left, alike


@triton.jit
def _count(scores, about, counts, parts, number: tl.constexpr, block: tl.constexpr):
    part = tl.program_id(1)
    size = tl.load(about + 3 * part + 1).to(tl.int32)
    if tl.program_id(0) * block < size:
        zeros = tl.load(about + 3 * part + 2).to(tl.int32)
        place = tl.program_id(0) * block + tl.arange(0, block)
        here = place < size
        key = _key(tl.load(scores + tl.load(about + 3 * part) + place, mask=here, other=0.0))
        if number > 0:
            prefix, _, _ = _found(counts, part, parts, zeros, number)
            here = here & ((key >> (21 if number == 1 else 10)) == prefix)
        digit = key >> 21 if number == 0 else (key >> 10) & 2047 if number == 1 else key & 1023
        bins = tl.arange(0, BINS)
        found = tl.histogram(tl.where(here, digit, 0).to(tl.int32), BINS)
        found -= tl.where(bins == 0, block - tl.sum(here.to(tl.int32)), 0)
        tl.atomic_add(counts + (number * parts + part) * BINS + bins, found, mask=found > 0, sem="relaxed")


@triton.jit
def _mask(scores, about, counts, keep, bound, parts, block: tl.constexpr):
    part = tl.program_id(1)
    size = tl.load(about + 3 * part + 1).to(tl.int32)
    if tl.program_id(0) * block < size:
        zeros = tl.load(about + 3 * part + 2).to(tl.int32)
        lowest, left, alike = _found(counts, part, parts, zeros, 3)
        first = tl.load(about + 3 * part)
        inside = tl.arange(0, block)
        place = tl.program_id(0) * block + inside
        here = place < size
        key = _key(tl.load(scores + first + place, mask=here, other=0.0))
        stays = (key > lowest) | (zeros == 0)
        if alike > left:  # of those that tie, the ones that come first go
            before = tl.zeros((), tl.int32)
            for other in range(tl.program_id(0)):
                theirs = _key(tl.load(scores + first + other * block + inside))
                before += tl.sum((theirs == lowest).to(tl.int32))
            tied = (key == lowest) & here
            stays = stays | (tied & (before + tl.cumsum(tied.to(tl.int32), 0) > left))
        tl.store(keep + first + place, stays.to(tl.uint8), mask=here)
        if tl.program_id(0) == 0:
            bits = tl.where(lowest >> 31 == 1, lowest & 0x7FFFFFFF, ~lowest)
            score = bits.to(tl.float32, bitcast=True)
            tl.store(bound + part, tl.where(zeros == 0, float("-inf"), score))
