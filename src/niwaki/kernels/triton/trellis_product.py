"""Products of a few tokens with trellis-coded matrices, and decoding, by one Triton launch (see `kernels.trellis`).

A program owns a tile of 32 rows and walks all columns of all parts. No sum is split between programs, so results do not
depend on their order. A thread takes eight neighboring rows of a column. They begin in one word and end in the next.

The level of a state comes from shared memory. There 32 threads read one word each per cycle, if these lie in different
banks. So the 256 levels lie there 32 times: entry 32 · state + lane is in the bank of its thread. Triton copies this
table for every gather, so a step has as many columns as the registers hold. A weight takes a shift, a logical
operation, a read, and one multiply-add. About as much again goes to loads, masks and the copies of the table.

With more tokens the same levels go to the tensor cores, where every warp multiplies its own columns.

Floor: reads of shared memory, 32 levels per cycle of an SM. So 45 million weights take 6 µs on an H200 at 1.8 GHz.
Their bytes take 2.4 µs at two bits. Measured: 21 µs.

Legend: N tokens, O rows, I inputs, R some rows, T threads, U columns of a thread in a step, W warps.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.trellis import RING
from niwaki.kernels.types import TrellisLaunch, TrellisPart

DECODE_WARPS, DECODE_UNROLL = 16, 8
SPREAD = 1024  # inputs that a program copies


def default_launch(tokens: int, dtype: torch.dtype, parts: int) -> TrellisLaunch:
    """Return the launch for a number of tokens: the best one or close to it at all shapes and widths on an H200."""
    if tokens > 2 and dtype in (torch.bfloat16, torch.float16):
        return TrellisLaunch(cores=True, warps=8, unroll=8, registers=128)
    if tokens > 1:
        return TrellisLaunch(cores=False, warps=16, unroll=4)
    return TrellisLaunch(cores=False, warps=16, unroll=16 if parts == 1 else 8)


def product_triton(
    x_NI: Tensor,
    parts: Sequence[TrellisPart],
    bias_O: Tensor | None,
    out_NO: Tensor,
    launch: TrellisLaunch | None = None,
) -> None:
    """Write x Wᵀ + bias to `out_NO`. Inputs and outputs are contiguous, in any float dtype."""
    tokens, rows = out_NO.shape
    launch = launch or default_launch(tokens, x_NI.dtype, len(parts))
    block = triton.next_power_of_2(tokens)
    block = max(block, 16) if launch.cores else min(block, 4)
    if launch.cores and len(parts) > 1:
        x_NI = _in_order(x_NI, parts)
    kernel = _cores if launch.cores else _fma
    kernel[triton.cdiv(rows, RING), triton.cdiv(tokens, block)](
        x_NI, out_NO, bias_O, rows, tokens, x_NI.shape[1], *_pointers(parts, 0), *_pointers(parts, 1),
        bits_0=parts[0].bits, bits_1=parts[1].bits if len(parts) > 1 else 0, block=block, threads=32 * launch.warps,
        unroll=launch.unroll, num_warps=launch.warps, num_stages=1, maxnreg=launch.registers,
    )  # fmt: skip


def _in_order(x_NI: Tensor, parts: Sequence[TrellisPart]) -> Tensor:
    """Return the inputs of the first part beside those of the second one."""
    spread_NI = torch.empty_like(x_NI)
    tokens, inputs = x_NI.shape
    _spread[triton.cdiv(inputs, SPREAD), tokens](
        x_NI, parts[0].columns_C, parts[1].columns_C, spread_NI, parts[0].rings_TCB.shape[1], inputs, block=SPREAD
    )
    return spread_NI


def decode_triton(parts: Sequence[TrellisPart], rows: int, first: int, out_RI: Tensor) -> None:
    """Write rows [first, first + R) of the matrix to `out_RI`, the parts side by side; `first` begins a tile.

    In the order of the inputs, neighboring threads would write to different rows: Triton does not see that the columns
    of a part ascend. At 2.25 bits that took 20 times as long.
    """
    begin = 0
    for number in range(len(parts)):
        rings, levels, scale, _, columns = _pointers(parts, number)
        grid = triton.cdiv(len(out_RI), RING), triton.cdiv(columns, 8 * DECODE_WARPS * DECODE_UNROLL)
        _decode[grid](
            rings, levels, scale, columns, out_RI[:, begin:], first // RING, first, first + len(out_RI), rows,
            out_RI.stride(0), bits=parts[number].bits, threads=32 * DECODE_WARPS, unroll=DECODE_UNROLL,
            num_warps=DECODE_WARPS,
        )  # fmt: skip
        begin += columns


def _pointers(parts: Sequence[TrellisPart], number: int) -> tuple[Any, ...]:
    """Return rings as words, levels, scales, places and columns of a part, or nothing where there is none."""
    if number >= len(parts):
        return None, None, None, None, 0
    rings_TCB, levels_S, scale_O, places_C = parts[number]
    columns = rings_TCB.shape[1]
    return rings_TCB.view(torch.int32), levels_S.view(torch.int8), scale_O.view(torch.float16), places_C, columns


@triton.jit(do_not_specialize=["tokens"])
def _fma(
    x, out, bias, rows, tokens, inputs, rings_0, levels_0, scale_0, places_0, columns_0,
    rings_1, levels_1, scale_1, places_1, columns_1, bits_0: tl.constexpr, bits_1: tl.constexpr, block: tl.constexpr,
    threads: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows with some tokens by multiply-adds."""
    tile = tl.program_id(0)
    first = tl.program_id(1) * block
    x += first.to(tl.int64) * inputs
    here = tokens - first
    sums = _sums(x, here, rings_0, levels_0, places_0, tile, rows, columns_0, inputs, bits_0, block, threads, unroll)
    row = tile * 32 + tl.arange(0, 32)
    inside = row < rows
    scale = tl.load(scale_0 + row, mask=inside, other=0.0).to(tl.float32)
    if bits_1 > 0:
        more = _sums(
            x, here, rings_1, levels_1, places_1, tile, rows, columns_1, inputs, bits_1, block, threads, unroll
        )
        other = tl.load(scale_1 + row, mask=inside, other=0.0).to(tl.float32)
    for m in tl.static_range(block):
        y = sums[m] * scale
        if bits_1 > 0:
            y += more[m] * other
        if bias is not None:
            y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        place = (first + m).to(tl.int64) * rows + row
        tl.store(out + place, y.to(out.dtype.element_ty), mask=row < tl.where(m < here, rows, 0))


@triton.jit
def _sums(
    x, here, rings, levels, places, tile, rows, columns, inputs, bits: tl.constexpr, block: tl.constexpr,
    threads: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """Return Σ level · x of every token: [32] each."""
    thread = tl.arange(0, threads)
    bank = _bank(thread, rows)
    step: tl.constexpr = threads // 4 * unroll
    rings += tile.to(tl.int64) * columns * bits
    total = ()
    for _ in tl.static_range(block):
        total = total + (tl.zeros((threads, 8), tl.float32),)
    table = _table(levels)
    for start in tl.range(0, columns, step):
        words = _load_words(rings, thread, start, columns, bits, threads, unroll)
        values = _load_inputs(x, here, places, thread, start, columns, inputs, block, threads, unroll)
        weight = _weights(table, words, thread, bank, bits, threads, unroll)
        new = ()
        for m in tl.static_range(block):
            own = ()
            for u in tl.static_range(unroll):
                own = own + (values[u * block + m].to(tl.float32),)
            own = tl.reshape(_joined(own, unroll), (threads, unroll, 1))
            new = new + (total[m] + tl.sum(weight * own, 1),)
        total = new
    sums = ()
    for m in tl.static_range(block):
        sums = sums + (tl.reshape(tl.sum(tl.reshape(total[m], (threads // 4, 4, 8)), 0), (32,)),)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _cores(
    x, out, bias, rows, tokens, inputs, rings_0, levels_0, scale_0, places_0, columns_0,
    rings_1, levels_1, scale_1, places_1, columns_1, bits_0: tl.constexpr, bits_1: tl.constexpr, block: tl.constexpr,
    threads: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of rows with some tokens on tensor cores."""
    tile = tl.program_id(0)
    first = tl.program_id(1) * block
    x += first.to(tl.int64) * inputs
    here = tokens - first
    y = _dots(x, here, rings_0, levels_0, tile, rows, columns_0, inputs, bits_0, block, threads, unroll)
    row = tile * 32 + tl.arange(0, 32)
    inside = row < rows
    y *= tl.load(scale_0 + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bits_1 > 0:
        x += columns_0
        more = _dots(x, here, rings_1, levels_1, tile, rows, columns_1, inputs, bits_1, block, threads, unroll)
        y += more * tl.load(scale_1 + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    token = first + tl.arange(0, block)
    place = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside[None, :] & (token < tokens)[:, None])


@triton.jit
def _dots(
    x, here, rings, levels, tile, rows, columns, inputs, bits: tl.constexpr, block: tl.constexpr,
    threads: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """Return Σ level · x: [N, 32]. A warp multiplies its own columns, eight neighboring ones of every step and u."""
    warps: tl.constexpr = threads // 32
    depth: tl.constexpr = 8 * unroll
    thread = tl.arange(0, threads)
    bank = _bank(thread, rows)
    step: tl.constexpr = threads // 4 * unroll
    rings += tile.to(tl.int64) * columns * bits
    total = tl.zeros((warps, block, 32), tl.float32)
    k = tl.arange(0, depth)[None, None, :]
    shift = k // 8 * (threads // 4) + tl.arange(0, warps)[:, None, None] * 8 + k % 8
    token = tl.arange(0, block)[None, :, None]
    own = x + tl.minimum(token, here - 1).to(tl.int64) * inputs
    table = _table(levels)
    for start in tl.range(0, columns, step):
        column = start + shift
        value = tl.load(own + column, mask=(column < columns) & (token < here), other=0.0)
        words = _load_words(rings, thread, start, columns, bits, threads, unroll)
        weight = _weights(table, words, thread, bank, bits, threads, unroll).to(x.dtype.element_ty)
        weight = tl.permute(tl.reshape(weight, (warps, 8, 4, unroll, 8)), (0, 3, 1, 2, 4))
        total = tl.dot(value, tl.reshape(weight, (warps, depth, 32)), total)
    return tl.sum(total, 0)


@triton.jit
def _spread(x, places_0, places_1, spread, columns_0, inputs, block: tl.constexpr):
    """Copy some inputs of a token in the order of the parts."""
    column = tl.program_id(0) * block + tl.arange(0, block)
    before = column < columns_0
    inside = column < inputs
    first = tl.load(places_0 + column, mask=before, other=0)
    second = tl.load(places_1 + (column - columns_0), mask=inside & (column >= columns_0), other=0)
    own = tl.program_id(1).to(tl.int64) * inputs
    value = tl.load(x + own + tl.where(before, first, second), mask=inside, other=0.0)
    tl.store(spread + own + column, value, mask=inside)


@triton.jit
def _table(levels):
    """Return the levels, each 32 times."""
    return tl.load(levels + (tl.arange(0, 8192) >> 5)).to(tl.float32)


@triton.jit
def _bank(thread, rows):
    """Return the byte of every thread among the copies of a level.

    The compiler must not know its bits. Else it moves them out of the logical operation into one more addition.
    """
    return (((thread & 31) ^ (rows >> 31)) << 2).to(tl.uint32)


@triton.jit
def _load_words(rings, thread, start, columns, bits: tl.constexpr, threads: tl.constexpr, unroll: tl.constexpr):
    """Load the word in which the rows of a thread begin, and the one after it, for every column of a step."""
    own = thread >> 2
    begin = (thread & 3) * bits // 4
    left = columns - start - own
    # Constants are added last, because then a load adds them by itself.
    first = rings + own * bits + begin + start * bits
    second = rings + own * bits + (begin + 1) % bits + start * bits
    words = ()
    for u in tl.static_range(unroll):
        inside = left > u * (threads // 4)
        low = tl.load(first + u * (threads // 4 * bits), mask=inside, other=0)
        high = low
        if bits > 1:
            high = tl.load(second + u * (threads // 4 * bits), mask=inside, other=0)
        words = words + (low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True))
    return words


@triton.jit
def _load_inputs(
    x, here, places, thread, start, columns, inputs, block: tl.constexpr, threads: tl.constexpr, unroll: tl.constexpr
):
    """Load the inputs of every column of a step and every token. Tokens after the last one repeat it."""
    own = thread >> 2
    left = columns - start - own
    values = ()
    for u in tl.static_range(unroll):
        inside = left > u * (threads // 4)
        for m in tl.static_range(block):
            token = x + tl.minimum(m, here - 1).to(tl.int64) * inputs
            if places is not None:
                place = tl.load(places + start + own + u * (threads // 4), mask=inside, other=0)
                value = tl.load(token + place, mask=inside, other=0.0)
            else:
                value = tl.load(token + start + own + u * (threads // 4), mask=inside, other=0.0)
            values = values + (value,)
    return values


@triton.jit
def _weights(table, words, thread, bank, bits: tl.constexpr, threads: tl.constexpr, unroll: tl.constexpr):
    """Return the levels [T, U, 8 rows] of a step."""
    turn = ((thread & 3) * (8 * bits) % 32).to(tl.uint64)
    at = ()
    for u in tl.static_range(unroll):
        low = words[2 * u]
        high = words[2 * u + 1]
        if bits < 4:
            low = (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> turn).to(tl.uint32)
        for j in tl.static_range(8):
            at = at + (_place(low, high, j, bank, bits),)
    index = tl.reshape(_joined(at, 8 * unroll), (threads * 8 * unroll,))
    return tl.reshape(tl.gather(table, index, 0), (threads, unroll, 8))


@triton.jit
def _place(low, high, j: tl.constexpr, bank, bits: tl.constexpr):
    """Return the entry of the state of row j in the table. The byte of it needs no more operations."""
    begin: tl.constexpr = bits * j
    if begin < 7:
        state = (low << (7 - begin)) & 0x7F80
    elif begin + 8 <= 32:
        state = (low >> (begin - 7)) & 0x7F80
    else:
        state = ((low >> 21) & 0x780) | ((high << 11) & 0x7800)
    return ((state ^ bank) >> 2).to(tl.int32)


@triton.jit
def _joined(parts, count: tl.constexpr):
    """Return tensors as one with an axis of two per halving of their count, in their order."""
    joined = parts[0]
    if count > 1:
        halves = ()
        for k in tl.static_range(count // 2):
            halves = halves + (tl.join(parts[k], parts[k + count // 2]),)
        joined = _joined(halves, count // 2)
    return joined


@triton.jit
def _decode(
    rings, levels, scale, columns, out, first_tile, first, last, rows, stride, bits: tl.constexpr,
    threads: tl.constexpr, unroll: tl.constexpr,
):  # fmt: skip
    """Write one tile and step of columns to out[row − first, column]."""
    step: tl.constexpr = threads // 4 * unroll
    tile = first_tile + tl.program_id(0)
    thread = tl.arange(0, threads)
    start = tl.program_id(1) * step
    rings += tile.to(tl.int64) * columns * bits
    words = _load_words(rings, thread, start, columns, bits, threads, unroll)
    weight = _weights(_table(levels), words, thread, _bank(thread, rows), bits, threads, unroll)
    weight = tl.permute(tl.reshape(weight, (threads // 4, 4, unroll, 8)), (1, 3, 2, 0))
    row = tile * 32 + tl.arange(0, 32)
    here = row < last
    weight = tl.reshape(weight, (32, step)) * tl.load(scale + row, mask=here, other=0.0).to(tl.float32)[:, None]
    column = start + tl.arange(0, step)
    inside = column < columns
    at = (row - first).to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(out + at, weight.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])
