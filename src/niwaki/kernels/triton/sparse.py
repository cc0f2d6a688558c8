"""Products of a few tokens with pruned matrices (`sparse`) on a GPU, as one Triton launch a layer.

A program owns some rows and walks all columns; nothing is split between programs, so results do not depend on their
order. All threads lie along the columns: a thread takes a unit of one or two bytes of places (8 or 16 columns) of every
row, and the inputs of its columns serve all rows.

Two values for four columns: the four inputs lie in the thread, and every value picks its own by two selections on bits
of its index. Per pair of values and token 4 selections and 2 multiply-adds, and 4 tests of bits for all tokens. That is
far cheaper than gathering inputs, whose lanes would meet in the same banks.

A bitmap: how many values a row has up to the end of every 64 columns is in a small table (`ranks_OC`, 16 bits each:
0.25 bit a weight, made when the layer is prepared); the number of a thread's first value is that but the set bits from
there on. For four columns a thread loads the next four values, whether or not they all belong there, and moves them up
to their columns by six selections; values of bfloat16 as three words, so that there are fewer loads. Lanes are four
values apart on average, so a warp's loads lie in few lines. Products of columns without a value are left out by the
bits themselves, without a zero in their place. The chunks of the next step are loaded before the values of this one,
whose addresses they tell.

Floor: the bytes of places and values over the memory bandwidth, 9 bits a weight at half zeros and values of 16 bits.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, C chunks of 64 columns, G groups that share a scale.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import CHUNK_BYTES, GpuRecord

INTEGERS = {2: torch.int16, 4: torch.int32}


class Tiles(NamedTuple):
    """How a product is spread over the chip."""

    rows: int  # of a program
    warps: int  # of a program; each takes 32 units of columns at a time


# By layout, for up to so many tokens of a program: the best, or nearly, of 9 (two_four: 11) measured on an H100 with
# shapes from 4096² to 28672 × 8192.
TILES = {
    "bitmap": {1: Tiles(1, 4), 2: Tiles(4, 4), 4: Tiles(4, 4), 8: Tiles(4, 4)},
    "two_four": {1: Tiles(1, 4), 2: Tiles(2, 2), 4: Tiles(1, 2)},
}


def default_tiles(record: GpuRecord, tokens: int) -> Tiles:
    """A choice by shape: narrow matrices take fewer threads."""
    tiles = TILES[record.layout][_block_tokens(record, tokens)]
    while tiles.warps > 1 and 16 * tiles.warps * _unit_bytes(record) >= record.places.shape[1]:
        tiles = tiles._replace(warps=tiles.warps // 2)
    return tiles


def few_tokens(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, tiles: Tiles | None = None
) -> None:
    """out = x Wᵀ + bias. `x_NI` contiguous, of any float dtype, as `out_NO`; sums in float32."""
    tokens, rows = out_NO.shape
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    block_tokens = _block_tokens(record, tokens)
    tiles = tiles or default_tiles(record, tokens)
    places, values, unit = _views(record)
    _few[triton.cdiv(rows, tiles.rows), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        places,
        values,
        record.starts,
        record.ranks,
        record.scale,
        rows,
        tokens,
        columns=record.columns,
        layout=record.layout,
        bits=record.bits,
        group=record.group,
        unit=unit,
        block_tokens=block_tokens,
        block_rows=tiles.rows,
        block=32 * tiles.warps,
        num_warps=tiles.warps,
    )


def _block_tokens(record: GpuRecord, tokens: int) -> int:
    """Tokens of a program."""
    return min(int(triton.next_power_of_2(tokens)), max(TILES[record.layout]))


def _unit_bytes(record: GpuRecord) -> int:
    """Bytes of places that a thread takes at once."""
    even = record.places.shape[1] % 2 == 0 and record.group % 16 == 0
    return 2 if record.layout == "two_four" and even else 1


def _views(record: GpuRecord) -> tuple[Tensor, Tensor, int]:
    """Places and values as the kernel loads them, and the bytes of a unit."""
    places, values, unit = record.places, record.values, _unit_bytes(record)
    if record.layout == "bitmap":
        return (places.view(torch.int64) if places.shape[1] % CHUNK_BYTES == 0 else places), values, unit
    if unit == 2:
        places = places.view(torch.int16)
    return places, values.view(INTEGERS[2 * unit]) if record.bits == 4 else values, unit


@triton.jit(do_not_specialize=["tokens"])
def _few(
    x,
    out,
    bias,
    places,
    values,
    starts,
    ranks,
    scale,
    rows,
    tokens,
    columns: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    unit: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """A program: some rows for some tokens. Sums are [block] each, one for every row and token."""
    width: tl.constexpr = (columns + 7) // 8
    units: tl.constexpr = width // unit
    form: tl.constexpr = (columns, layout, unit, group)
    first = tl.program_id(0) * block_rows
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * columns
    here = tokens - token
    total = ()
    for _ in tl.static_range(block_rows * block_tokens):
        total = total + (tl.zeros((block,), tl.float32),)
    ahead = _ahead(places, ranks, first, rows, tl.arange(0, block), width, layout, block_rows)
    start = ()
    for r in tl.static_range(block_rows):
        start = start + (tl.load(starts + tl.minimum(first + r, rows - 1)) if layout == "bitmap" else 0,)
    for step in tl.range(0, (units + block - 1) // block):
        at = step * block + tl.arange(0, block)
        inside = at < units
        inputs = ()
        for m in tl.static_range(block_tokens):
            # Tokens beyond the last one repeat it; they are not stored.
            inputs = inputs + _load_inputs(x + tl.minimum(m, here - 1) * columns, at, columns, unit)
        chunks = ahead
        ahead = _ahead(places, ranks, first, rows, at + block, width, layout, block_rows)
        found = ()
        for r in tl.static_range(block_rows):
            if layout == "bitmap":
                found = found + (_near(values, chunks[r], start[r], at, bits),)
            else:
                row = tl.minimum(first + r, rows - 1).to(tl.int64)
                found = found + (_load_pairs(places, values, row, at, inside, width, bits, unit),)
        new = ()
        for r in tl.static_range(block_rows):
            row = tl.minimum(first + r, rows - 1).to(tl.int64)
            for m in tl.static_range(block_tokens):
                new = new + (_sum(found[r], inputs, total[r * block_tokens + m], scale, row, at, inside, m, form),)
        total = new
    count: tl.constexpr = block_rows * block_tokens
    y = tl.sum(stack(total, (block,), count), axis=0)
    row = first + tl.arange(0, count) // block_tokens
    m = tl.arange(0, count) % block_tokens
    stored = (row < rows) & (m < here)
    if scale is not None and group == 0:
        y *= tl.load(scale + row, mask=stored, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + (token + m).to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def stack(tensors, shape: tl.constexpr, count: tl.constexpr):
    """A power of two of tensors of one shape, as one with a last axis more: the highest bit tells the halves apart."""
    level = tensors
    for _ in tl.static_range(5):
        level = _pairs(level)
    return tl.reshape(level[0], shape + (count,))


@triton.jit
def _pairs(level):
    """Tensors of both halves joined, until there is one."""
    half: tl.constexpr = len(level) // 2
    new = level
    if half > 0:
        new = ()
        for i in tl.static_range(half):
            new = new + (tl.join(level[i], level[i + half]),)
    return new


@triton.jit
def eight(tile, shape: tl.constexpr):
    """What `stack` would put together: the eight tensors of a last axis of eight."""
    even, odd = tl.split(tl.reshape(tile, shape + (2, 2, 2)))
    t_0, t_2 = _halves(even)
    t_4, t_6 = t_0[1], t_2[1]
    s_1, s_3 = _halves(odd)
    return t_0[0], s_1[0], t_2[0], s_3[0], t_4, s_1[1], t_6, s_3[1]


@triton.jit
def four(tile, shape: tl.constexpr):
    """The four tensors of a last axis of four."""
    low, high = _halves(tl.reshape(tile, shape + (2, 2)))
    return low[0], high[0], low[1], high[1]


@triton.jit
def _halves(tile):
    """[…, 2, 2] → for each of the last axis, both of the one before."""
    low, high = tl.split(tile)
    return tl.split(low), tl.split(high)


@triton.jit
def _load_inputs(x, at, columns: tl.constexpr, unit: tl.constexpr):
    """The inputs of units of columns, 8 · unit tensors in float32."""
    block: tl.constexpr = at.shape[0]
    found = ()
    for k in tl.static_range(unit):
        if columns % 8 == 0 and x.dtype.element_ty == tl.bfloat16:
            # Two in a word: both are moved to the upper half by one instruction each.
            word = (at * unit + k)[:, None] * 4 + tl.arange(0, 4)[None, :]
            words = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=word < columns // 2, other=0)
            pairs = four(words, (block,))
            for i in tl.static_range(4):
                found = found + ((pairs[i] << 16).to(tl.float32, bitcast=True),)
                found = found + ((pairs[i] & -65536).to(tl.float32, bitcast=True),)
        else:
            column = (at * unit + k)[:, None] * 8 + tl.arange(0, 8)[None, :]
            found = found + eight(tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32), (block,))
    return found


@triton.jit
def _load_pairs(places, values, row, at, inside, width: tl.constexpr, bits: tl.constexpr, unit: tl.constexpr):
    """Of two values for four columns: the indices of a unit, and its values in float32."""
    block: tl.constexpr = at.shape[0]
    units: tl.constexpr = width // unit
    index = tl.load(places + row * units + at, mask=inside, other=0).to(tl.int32)
    found = (index,)
    if bits == 4:
        codes = tl.load(values + row * units + at, mask=inside, other=0).to(tl.int32)
        for i in tl.static_range(4 * unit):
            found = found + (signed_four(codes >> (4 * i)),)
    else:
        place = at[:, None] * (4 * unit) + tl.arange(0, 4 * unit)[None, :]
        tile = tl.load(values + row * (4 * width) + place, mask=inside[:, None], other=0).to(tl.float32)
        found = found + (eight(tile, (block,)) if unit == 2 else four(tile, (block,)))
    return found


@triton.jit
def signed_four(codes):
    """The lowest four bits of integers, as signed numbers in float32."""
    return (((codes & 15) ^ 0x4B000008).to(tl.float32, bitcast=True)) - 8388616.0


@triton.jit
def _sum_pairs(found, inputs, total, m: tl.constexpr, unit: tl.constexpr):
    """Adds products of the values of a unit and the inputs they belong to. The lower index comes first: it is no 3."""
    index = found[0]
    for i in tl.static_range(2 * unit):
        x_0 = inputs[8 * unit * m + 4 * i]
        x_1 = inputs[8 * unit * m + 4 * i + 1]
        x_2 = inputs[8 * unit * m + 4 * i + 2]
        x_3 = inputs[8 * unit * m + 4 * i + 3]
        lower = tl.where((index & (2 << (4 * i))) != 0, x_2, tl.where((index & (1 << (4 * i))) != 0, x_1, x_0))
        upper = tl.where((index & (4 << (4 * i))) != 0, x_3, x_2)
        upper = tl.where((index & (8 << (4 * i))) != 0, upper, x_1)
        total += found[1 + 2 * i] * lower
        total += found[2 + 2 * i] * upper
    return total


@triton.jit
def _sum(
    found,
    inputs,
    before,
    scale,
    row,
    at,
    inside,
    m: tl.constexpr,
    form: tl.constexpr,
):
    """`before` and the products of units of a row with the inputs of token m."""
    columns: tl.constexpr = form[0]
    unit: tl.constexpr = form[2]
    group: tl.constexpr = form[3]
    total = before if group == 0 else tl.zeros_like(before)
    total = _sum_set(found, inputs, total, m) if form[1] == "bitmap" else _sum_pairs(found, inputs, total, m, unit)
    if group > 0:
        place = row * ((columns + group - 1) // group) + at * (8 * unit) // group
        total = before + total * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _ahead(places, ranks, first, rows, byte, width: tl.constexpr, layout: tl.constexpr, block_rows: tl.constexpr):
    """Of a bitmap: the chunks of all rows, a step before their values, whose addresses they tell."""
    found = ()
    if layout == "bitmap":
        for r in tl.static_range(block_rows):
            row = tl.minimum(first + r, rows - 1).to(tl.int64)
            found = found + (chunk(places, ranks, row, byte, byte < width, width),)
    return found


@triton.jit
def set_values(values, index, byte, bits: tl.constexpr):
    """The values of eight columns, the first of which has this number; zero where the bit is not set."""
    near = near_values(values, index, byte, bits)
    found = ()
    for j in tl.static_range(8):
        found = found + (tl.where((byte & (1 << j)) != 0, near[j], tl.zeros_like(near[j])),)
    return found


@triton.jit
def near_values(values, index, byte, bits: tl.constexpr):
    """As `set_values`, but any value where the bit is not set: the products need no zeros."""
    if bits == 4:
        found = ()
        for j in tl.static_range(8):
            taken = (byte & (1 << j)) != 0
            pair = tl.load(values + (index >> 1), mask=taken, other=0).to(tl.int32)
            found = found + (signed_four(pair >> ((index & 1) * 4)),)
            index += (byte >> j) & 1
    else:
        found = _near_four(values + index, byte, 0) + _near_four(values + index + _count_four(byte), byte, 4)
    return found


@triton.jit
def _near_four(first, byte, at: tl.constexpr):
    """The values of four columns. Those behind the last value of all are slack."""
    return _moved(tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), byte, at)


@triton.jit
def _count_four(byte):
    """Set bits of the lower four."""
    return ((tl.full((), 0x4332322132212110, tl.int64) >> ((byte << 2) & 60).to(tl.int64)) & 15).to(tl.int32)


@triton.jit
def _near(values, found, start, byte, bits: tl.constexpr):
    """The bits of eight columns, and `near_values`; of bfloat16 in float32."""
    index, taken = locate(found, start, byte)
    if values.dtype.element_ty == tl.bfloat16:
        near = _near_words(values, index, taken, 0) + _near_words(values, index + _count_four(taken), taken, 4)
    else:
        near = near_values(values, index, taken, bits)
    return (taken,) + near


@triton.jit
def _near_words(values, index, byte, at: tl.constexpr):
    """The values of four columns: three words hold them, whether or not the first of them begins a word."""
    words = values.to(tl.pointer_type(tl.int32), bitcast=True) + (index >> 1)
    w_0 = tl.load(words).to(tl.uint32, bitcast=True).to(tl.uint64)
    w_1 = tl.load(words + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    w_2 = tl.load(words + 2).to(tl.uint32, bitcast=True).to(tl.uint64)
    shift = ((index & 1) * 16).to(tl.uint64)
    low = ((w_0 | (w_1 << 32)) >> shift).to(tl.uint32).to(tl.int32, bitcast=True)
    high = ((w_1 | (w_2 << 32)) >> shift).to(tl.uint32).to(tl.int32, bitcast=True)
    return _moved(
        (low << 16).to(tl.float32, bitcast=True),
        (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True),
        (high & -65536).to(tl.float32, bitcast=True),
        byte,
        at,
    )


@triton.jit
def _moved(v_0, v_1, v_2, v_3, byte, at: tl.constexpr):
    """Four values moved up to their columns by selections: the value of a column is the first but as many as there are
    before it; `next` is the one after it.
    """
    b_0 = (byte & (1 << at)) != 0
    b_1 = (byte & (2 << at)) != 0
    b_2 = (byte & (4 << at)) != 0
    c_1 = tl.where(b_0, v_1, v_0)
    next_1 = tl.where(b_0, v_2, v_1)
    c_2 = tl.where(b_1, next_1, c_1)
    next_2 = tl.where(b_1, tl.where(b_0, v_3, v_2), next_1)
    c_3 = tl.where(b_2, next_2, c_2)
    return v_0, c_1, c_2, c_3


@triton.jit
def chunk(places, ranks, row, byte, inside, width: tl.constexpr):
    """The 64 columns of a row around bytes, and how many values the row has up to their end."""
    chunks: tl.constexpr = (width + 7) // 8
    place = row * chunks + (byte >> 3)
    if width % 8 == 0:
        word = tl.load(places + place, mask=inside, other=0)
    else:
        word = tl.zeros_like(place)
        for k in tl.static_range(8):
            near = (byte >> 3) * 8 + k
            bits = tl.load(places + row * width + near, mask=inside & (near < width), other=0)
            word |= bits.to(tl.int64) << (8 * k)
    return word, tl.load(ranks + place, mask=inside, other=0)


@triton.jit
def locate(found, start, byte):
    """The number of the first value of bytes of a bitmap, and their bits, of what `chunk` found.

    `start` is the number of the row's first value.
    """
    above = found[0].to(tl.uint64, bitcast=True) >> ((byte & 7) * 8).to(tl.uint64)
    rank = found[1].to(tl.int32)
    if found[1].dtype == tl.int16:
        rank &= 0xFFFF
    return start + rank - count_bits(above), (above & 255).to(tl.int32)


@triton.jit
def count_bits(words):
    """Set bits of unsigned 64-bit words, in a form that compilers know."""
    x = words
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _sum_set(found, inputs, total, m: tl.constexpr):
    """Adds the products of the columns whose bit is set: one instruction each, which the bit allows."""
    for j in tl.static_range(8):
        taken = (found[0] & (1 << j)) != 0
        total = tl.where(taken, total + found[1 + j].to(tl.float32) * inputs[8 * m + j], total)
    return total
