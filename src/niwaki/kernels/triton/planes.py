"""Products of a few tokens with matrices stored as bit planes, as one Triton launch a layer.

A program owns some tiles of 32 rows and walks all columns of all parts; nothing is split between programs, so results
do not depend on their order. A thread loads words of four rows × eight columns. Bits of several planes are first
brought together (`load_fields`), so that a word holds codes side by side; a code is then isolated where it lies, by one
logical operation, and read as a float32: integers below 2²⁴ read as floats are that many times 2⁻¹⁴⁹, exactly.
The powers of two that remain are undone in the inputs, before (by the column), and in the scales, after (by the row).
Per weight: one logical operation, one multiply-add a token. Exact as long as inputs lie within 2±⁴⁰.

Floor: the bytes of the planes over the memory bandwidth. With one token, 1.6 bits need 2 instructions a weight: about
as long on an H100 (132 SMs × 128 lanes) as reading them at 3 TB/s.

Legend: N tokens, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns, W the
8 words of a tile (word w holds rows 4w … 4w + 3), G groups of columns that share a scale.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import PlanePart

INPUT_POWER = tl.constexpr(80)  # codes of 2⁻¹⁴⁹ times inputs of 2⁸⁰: the middle of the range of float32
CODE_POWER = tl.constexpr(149)
TILE = 32


class Config(NamedTuple):
    """How a product is spread over the chip."""

    warps: int  # of a program; each takes 16 bytes of every row of its tile at a time
    unroll: int  # bytes of one thread in flight


def default_config(rows: int, tokens: int) -> Config:
    """A choice by shape."""
    return Config(warps=8, unroll=2 if tokens < 4 else 1)


def few_tokens(
    x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, out_NO: Tensor, config: Config | None = None
) -> None:
    """out = x Wᵀ + bias. `x_NI` contiguous, of any float dtype, as `out_NO`; parts as of `PlanePart.for_gpu`."""
    tokens, rows = out_NO.shape
    block_tokens = min(triton.next_power_of_2(tokens), 4)
    config = config or default_config(rows, block_tokens)
    _few[triton.cdiv(rows, TILE), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        rows,
        tokens,
        *pointers(parts, 0),
        *pointers(parts, 1),
        inputs=x_NI.shape[1],
        form_0=form(parts, 0),
        form_1=form(parts, 1),
        block_tokens=block_tokens,
        block=16 * config.warps,
        unroll=config.unroll,
        num_warps=config.warps,
    )


def pointers(parts: Sequence[PlanePart], number: int) -> list[Tensor | None]:
    """The tensors of a part, as words of four rows."""
    if number >= len(parts):
        return [None] * 5
    part = parts[number]
    return [
        part.planes_TKBR.view(torch.int32),
        part.scale_GO.view(-1).view(torch.int64),
        None if part.offset_GO is None else part.offset_GO.view(-1).view(torch.int64),
        None if part.zero_GO is None else part.zero_GO.view(-1).view(torch.int32),
        part.columns_C,
    ]


def form(parts: Sequence[PlanePart], number: int) -> tuple[int, int, int, float]:
    """The numbers of a part, for a kernel: columns, bits, bytes of a group (0: one group), centre."""
    if number >= len(parts):
        return 0, 0, 0, 0.0
    part = parts[number]
    group_bytes = part.group // 8 if len(part.scale_GO) > 1 else 0
    return part.columns, part.planes_TKBR.shape[1], group_bytes, part.centre


@triton.jit(do_not_specialize=["tokens"])
def _few(
    x,
    out,
    bias,
    rows,
    tokens,
    planes_0,
    scale_0,
    offset_0,
    zero_0,
    places_0,
    planes_1,
    scale_1,
    offset_1,
    zero_1,
    places_1,
    inputs: tl.constexpr,
    form_0: tl.constexpr,
    form_1: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """A program: a tile of rows for some tokens."""
    tile = tl.program_id(0)
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * inputs
    here = tokens - token
    total = ()
    for _ in tl.static_range(block_tokens):
        total = total + (tl.zeros((block, 8, 2, 2), tl.float32),)
    part_0 = (planes_0, scale_0, offset_0, zero_0, places_0)
    total = _add_part(total, x, here, part_0, tile, rows, inputs, form_0, block_tokens, block, unroll)
    if form_1[0] > 0:
        part_1 = (planes_1, scale_1, offset_1, zero_1, places_1)
        total = _add_part(total, x, here, part_1, tile, rows, inputs, form_1, block_tokens, block, unroll)
    row = tile * 32 + tl.arange(0, 32)
    for m in tl.static_range(block_tokens):
        y = tl.reshape(tl.sum(total[m], axis=0), (32,))
        if bias is not None:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        place = (token + m).to(tl.int64) * rows + row
        tl.store(out + place, y.to(out.dtype.element_ty), mask=row < tl.where(m < here, rows, 0))


@triton.jit
def _add_part(
    total,
    x,
    tokens,
    part,
    tile,
    rows,
    inputs: tl.constexpr,
    form: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Adds one part to the sums of every token: [bytes, 8 words, 2, 2], the last two being the rows of a word."""
    columns: tl.constexpr = form[0]
    bits: tl.constexpr = form[1]
    group_bytes: tl.constexpr = form[2]
    width: tl.constexpr = (columns + 7) // 8
    # Bytes of a group lie together in one thread, which scales their sum once.
    together: tl.constexpr = unroll if group_bytes % unroll == 0 else 1
    planes = part[0] + tile.to(tl.int64) * (bits * width * 8)
    for step in tl.range(0, (width + block * together - 1) // (block * together)):
        sums = ()
        codes = ()
        for _ in tl.static_range(block_tokens):
            sums = sums + (tl.zeros((block, 1, 1, 1), tl.float32),)
            codes = codes + (tl.zeros((block, 8, 2, 2), tl.float32),)
        for u in tl.static_range(together):
            if group_bytes > 0:
                byte = (step * block + tl.arange(0, block)) * together + u
            else:
                byte = (step * together + u) * block + tl.arange(0, block)
            low = load_fields(planes, byte, width, bits if bits < 4 else 4)
            high = low
            if bits > 4:
                high = load_fields(planes + 4 * width * 8, byte, width, bits - 4)
            new_sums = ()
            new_codes = ()
            for m in tl.static_range(block_tokens):
                # Tokens beyond the last one repeat it; they are not stored.
                own = x + tl.minimum(m, tokens - 1) * inputs
                values = _load_inputs(own, part[4], byte, width, columns)
                new_sums = new_sums + (_add_values(sums[m], values),)
                new_codes = new_codes + (_add_codes(codes[m], low, high, values, bits),)
            sums = new_sums
            codes = new_codes
        group = tl.zeros((1, 1), tl.int32)
        if group_bytes > 0:
            group = ((step * block + tl.arange(0, block)) * together // group_bytes)[:, None]
        total = _add_scaled(total, codes, sums, part, group, tile, rows, columns, group_bytes, form[3], block_tokens)
    return total


@triton.jit
def _load_inputs(x, places, byte, width: tl.constexpr, columns: tl.constexpr):
    """One token's inputs of the eight lanes of every byte, [bytes, 1, 1, 1] each, in float32."""
    byte = byte[:, None, None, None]
    values = ()
    for j in tl.static_range(8):
        if places is not None:
            column = tl.load(places + j * width + byte, mask=byte < width, other=-1)
            value = tl.load(x + column, mask=column >= 0, other=0.0)
        else:
            value = tl.load(x + byte * 8 + j, mask=byte * 8 + j < columns, other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _add_values(total, values):
    for j in tl.static_range(8):
        total += values[j]
    return total


@triton.jit
def _add_codes(total, low, high, values, bits: tl.constexpr):
    """Products of codes, up to four bits of them at a time, and inputs; in units of `_unit`."""
    low_field: tl.constexpr = bits if bits < 3 else 4
    high_field: tl.constexpr = bits - 4 if bits - 4 < 3 else 4
    for j in tl.static_range(8):
        scaled = values[j] * (2.0 ** (INPUT_POWER - low_field * (j // low_field)))
        total += isolate(low, j, low_field) * scaled
    if bits > 4:
        for j in tl.static_range(8):
            scaled = values[j] * (2.0 ** (INPUT_POWER + 4 - high_field * (j // high_field)))
            total += isolate(high, j, high_field) * scaled
    return total


@triton.jit
def load_fields(planes, byte, width: tl.constexpr, bits: tl.constexpr):
    """Up to four planes as words in which the bits of a code lie side by side, in fields of F = 1, 2 or 4 bits.

    There are F words: field q of word s holds the code of bit F·q + s of the planes. Each is [bytes, 8 words, 2, 2]:
    the same word for all four rows, but shifted down by one row for the last one, so that its codes lie below bit 24.
    """
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = byte[:, None] < width
    plane_0 = tl.load(planes + place, mask=inside, other=0)
    found = (_rows(plane_0),)
    if bits > 1:
        plane_1 = tl.load(planes + width * 8 + place, mask=inside, other=0)
        even, odd = interleave(plane_0, plane_1, 1, 0x55555555)
        found = (_rows(even), _rows(odd))
        if bits > 2:
            plane_2 = tl.load(planes + 2 * width * 8 + place, mask=inside, other=0)
            plane_3 = tl.zeros_like(plane_2)
            if bits > 3:
                plane_3 = tl.load(planes + 3 * width * 8 + place, mask=inside, other=0)
            even_23, odd_23 = interleave(plane_2, plane_3, 1, 0x55555555)
            word_0, word_2 = interleave(even, even_23, 2, 0x33333333)
            word_1, word_3 = interleave(odd, odd_23, 2, 0x33333333)
            found = (_rows(word_0), _rows(word_1), _rows(word_2), _rows(word_3))
    return found


@triton.jit
def interleave(low, high, step: tl.constexpr, mask: tl.constexpr):
    """Fields of `step` bits joined in pairs: the even ones of both words, and the odd ones."""
    even = (low & mask) | ((high & mask) << step)
    odd = ((low >> step) & mask) | (high & ~mask)
    return even, odd


@triton.jit
def _rows(words):
    """[…, 2, 2] of words of four bytes; [k, l] belongs to row 2k + l."""
    return tl.join(tl.join(words, words), tl.join(words, words >> 8))


@triton.jit
def _row_shift():
    """Where the byte of a row begins in its word of `_rows`."""
    row = 2 * tl.arange(0, 2)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    return 8 * tl.minimum(row, 2)


@triton.jit
def isolate(words, lane: tl.constexpr, field: tl.constexpr):
    """The codes of a lane as float32, times 2⁻¹⁴⁹ and the place of their lowest bit."""
    mask = (((1 << field) - 1) << (field * (lane // field))) << _row_shift()
    return (words[lane % field] & mask).to(tl.float32, bitcast=True)


@triton.jit
def _add_scaled(
    total,
    codes,
    sums,
    part,
    group,
    tile,
    rows,
    columns: tl.constexpr,
    group_bytes: tl.constexpr,
    centre: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """total += scale · codes + offset · sums for the rows of every word and the groups [bytes or 1, 1]."""
    quads = (rows + 3) // 4
    quad = tile * 8 + tl.arange(0, 8)[None, :]
    inside = quad < quads
    if group_bytes > 0:
        inside = inside & (group * (8 * group_bytes) < columns)
    unit, offset = load_levels(part, group * quads + quad, inside, centre)
    new = ()
    for m in tl.static_range(block_tokens):
        new = new + (total[m] + unit * codes[m] + offset * sums[m],)
    return new


@triton.jit
def load_levels(part, place, inside, centre: tl.constexpr):
    """Scales and offsets as of `load_scales`, the scales in units of codes as `isolate` reads them.

    They undo those powers of two, and that which inputs are multiplied by (2^INPUT_POWER).
    """
    scale, offset = load_scales(part, place, inside, centre)
    exponent = 0 - _row_shift() + (127 + CODE_POWER - INPUT_POWER)
    return scale * (exponent << 23).to(tl.float32, bitcast=True), offset


@triton.jit
def load_scales(part, place, inside, centre: tl.constexpr):
    """Scales and offsets of the rows of words, […, 2, 2]; `place` is that of four rows of a group."""
    scale = _halves(tl.load(part[1] + place, mask=inside, other=0))
    if part[2] is not None:
        offset = _halves(tl.load(part[2] + place, mask=inside, other=0))
    elif part[3] is not None:
        zero = tl.load(part[3] + place, mask=inside, other=0)
        zero = tl.join(tl.join(zero, zero >> 16), tl.join(zero >> 8, zero >> 24)) & 255
        offset = zero.to(tl.float32) * -scale
    else:
        offset = scale * -centre
    return scale, offset


@triton.jit
def _halves(quads):
    """[…, 2, 2] float32 of the four float16 numbers in words of 64 bits; [k, l] belongs to row 2k + l."""
    rows = tl.join(tl.join(quads, quads >> 32), tl.join(quads >> 16, quads >> 48))
    return rows.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
