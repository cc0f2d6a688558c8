"""Bit helpers and loaders that several kernels share: last axes, 4-bit codes, bitmaps, bit planes.

Legend: N tokens, C columns of a part, T tiles of 32 rows, B bytes of eight columns, W the 8 words of a tile (word w
holds rows 4w … 4w + 3).
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.types import PlanePart

INPUT_POWER = tl.constexpr(80)  # codes of 2⁻¹⁴⁹ times inputs of 2⁸⁰: the middle of the range of float32
CODE_POWER = tl.constexpr(149)


# Last axes: tensors joined to one tensor, and taken apart again.


@triton.jit
def stack(tensors, shape: tl.constexpr, count: tl.constexpr):
    """Stack a power of two of tensors on a new last axis. The highest bit of the index selects the half."""
    level = tensors
    for _ in tl.static_range(5):
        level = _join_halves(level)
    return tl.reshape(level[0], shape + (count,))


@triton.jit
def _join_halves(level):
    """Join the tensors of both halves in pairs. One tensor stays as it is."""
    half: tl.constexpr = len(level) // 2
    new = level
    if half > 0:
        new = ()
        for i in tl.static_range(half):
            new = new + (tl.join(level[i], level[i + half]),)
    return new


@triton.jit
def split_eight(tile, shape: tl.constexpr):
    """Return the eight tensors of a last axis of eight."""
    even, odd = tl.split(tl.reshape(tile, shape + (2, 2, 2)))
    t_0, t_2 = _split_two(even)
    t_4, t_6 = t_0[1], t_2[1]
    s_1, s_3 = _split_two(odd)
    return t_0[0], s_1[0], t_2[0], s_3[0], t_4, s_1[1], t_6, s_3[1]


@triton.jit
def split_four(tile, shape: tl.constexpr):
    """Return the four tensors of a last axis of four."""
    low, high = _split_two(tl.reshape(tile, shape + (2, 2)))
    return low[0], high[0], low[1], high[1]


@triton.jit
def _split_two(tile):
    """Split the last axis of […, 2, 2], then split both halves."""
    low, high = tl.split(tile)
    return tl.split(low), tl.split(high)


@triton.jit
def signed_four(codes):
    """Return the lowest four bits of integers as signed numbers in float32."""
    return (((codes & 15) ^ 0x4B000008).to(tl.float32, bitcast=True)) - 8388616.0


# Bitmaps: one bit per column, the values of a row one after another.


@triton.jit
def load_chunk(places, ranks, row, byte, inside, width: tl.constexpr):
    """Load the 64 columns around bytes of a row, and the number of values of the row up to the end of them."""
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
def locate(chunk, start, byte):
    """Return the number of the first value of bytes in a bitmap, and the bits of the bytes.

    The arguments are the result of `load_chunk` and the number of the first value of the row.
    """
    above = chunk[0].to(tl.uint64, bitcast=True) >> ((byte & 7) * 8).to(tl.uint64)
    rank = chunk[1].to(tl.int32)
    if chunk[1].dtype == tl.int16:
        rank &= 0xFFFF
    return start + rank - count_bits(above), (above & 255).to(tl.int32)


@triton.jit
def count_bits(words):
    """Count the set bits of unsigned 64-bit words, in a form that compilers know."""
    x = words
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def count_low_four(byte):
    """Count the set bits of the lower four."""
    return ((tl.full((), 0x4332322132212110, tl.int64) >> ((byte << 2) & 60).to(tl.int64)) & 15).to(tl.int32)


@triton.jit
def set_values(values, index, byte, bits: tl.constexpr):
    """Return the values of eight columns, and zero for a clear bit. `index` is the number of the first value."""
    near = near_values(values, index, byte, bits)
    masked = ()
    for j in tl.static_range(8):
        masked = masked + (tl.where((byte & (1 << j)) != 0, near[j], tl.zeros_like(near[j])),)
    return masked


@triton.jit
def near_values(values, index, byte, bits: tl.constexpr):
    """Return the values of eight columns, and any value for a clear bit: the products need no zeros."""
    if bits == 4:
        near = ()
        for j in tl.static_range(8):
            taken = (byte & (1 << j)) != 0
            pair = tl.load(values + (index >> 1), mask=taken, other=0).to(tl.int32)
            near = near + (signed_four(pair >> ((index & 1) * 4)),)
            index += (byte >> j) & 1
    else:
        near = _near_four(values + index, byte, 0) + _near_four(values + index + count_low_four(byte), byte, 4)
    return near


@triton.jit
def _near_four(first, byte, at: tl.constexpr):
    """Return the values of four columns. Loads may pass the last value: slack bytes follow it."""
    return move_up(tl.load(first), tl.load(first + 1), tl.load(first + 2), tl.load(first + 3), byte, at)


@triton.jit
def move_up(v_0, v_1, v_2, v_3, byte, at: tl.constexpr):
    """Move four consecutive values up to their columns by selections.

    The value of a column has the number of set bits before the column. `next` is the value after it.
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


# Bit planes: words of four rows × eight columns, one word per plane.


class PlaneShape(NamedTuple):
    """Constants of one part of a bit-plane matrix; a part without columns does not exist."""

    columns: int
    bits: int
    group: int  # columns that share a scale; 0 for one scale per row
    centre: float


class PlanePointers(NamedTuple):
    """Pointers of one part of a bit-plane matrix, inside a kernel."""

    planes: Any
    scale: Any
    offset: Any
    zero: Any
    places: Any


def pointers(parts: Sequence[PlanePart], number: int) -> list[Tensor | None]:
    """Return the tensors of a part in the order of `PlanePointers`, as words of four rows."""
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


def shape_of(parts: Sequence[PlanePart], number: int) -> PlaneShape:
    """Return the constants of a part."""
    if number >= len(parts):
        return PlaneShape(0, 0, 0, 0.0)
    part = parts[number]
    group = part.group if len(part.scale_GO) > 1 else 0
    return PlaneShape(part.columns, part.planes_TKBR.shape[1], group, part.centre)


@triton.jit
def load_fields(planes, byte, width: tl.constexpr, bits: tl.constexpr):
    """Load up to four planes as words of whole codes, in fields of F = 1, 2 or 4 bits.

    There are F words: field q of word s holds the code of bit F·q + s of the planes. Each is [bytes, 8 words, 2, 2].
    The four rows of a word hold the same word. The last row holds it shifted down by one row, so that its codes lie
    below bit 24.
    """
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = byte[:, None] < width
    plane_0 = tl.load(planes + place, mask=inside, other=0)
    fields = (_rows(plane_0),)
    if bits > 1:
        plane_1 = tl.load(planes + width * 8 + place, mask=inside, other=0)
        even, odd = interleave(plane_0, plane_1, 1, 0x55555555)
        fields = (_rows(even), _rows(odd))
        if bits > 2:
            plane_2 = tl.load(planes + 2 * width * 8 + place, mask=inside, other=0)
            plane_3 = tl.zeros_like(plane_2)
            if bits > 3:
                plane_3 = tl.load(planes + 3 * width * 8 + place, mask=inside, other=0)
            even_23, odd_23 = interleave(plane_2, plane_3, 1, 0x55555555)
            word_0, word_2 = interleave(even, even_23, 2, 0x33333333)
            word_1, word_3 = interleave(odd, odd_23, 2, 0x33333333)
            fields = (_rows(word_0), _rows(word_1), _rows(word_2), _rows(word_3))
    return fields


@triton.jit
def interleave(low, high, step: tl.constexpr, mask: tl.constexpr):
    """Join fields of `step` bits in pairs: the even fields of both words, and the odd fields."""
    even = (low & mask) | ((high & mask) << step)
    odd = ((low >> step) & mask) | (high & ~mask)
    return even, odd


@triton.jit
def _rows(words):
    """Return […, 2, 2] of words of four bytes; [k, l] belongs to row 2k + l."""
    return tl.join(tl.join(words, words), tl.join(words, words >> 8))


@triton.jit
def _row_shift():
    """Return the bit at which the byte of a row begins in its word of `_rows`."""
    row = 2 * tl.arange(0, 2)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    return 8 * tl.minimum(row, 2)


@triton.jit
def isolate(words, lane: tl.constexpr, field: tl.constexpr):
    """Return the codes of a lane as float32, times 2⁻¹⁴⁹ and the power of two of their lowest bit."""
    mask = (((1 << field) - 1) << (field * (lane // field))) << _row_shift()
    return (words[lane % field] & mask).to(tl.float32, bitcast=True)


@triton.jit
def load_levels(part, place, inside, centre: tl.constexpr):
    """Load scales and offsets as `load_scales` does, with the scales in units of the codes of `isolate`.

    The scales also undo the power of two of the inputs (2^INPUT_POWER).
    """
    scale, offset = load_scales(part, place, inside, centre)
    exponent = 0 - _row_shift() + (127 + CODE_POWER - INPUT_POWER)
    return scale * (exponent << 23).to(tl.float32, bitcast=True), offset


@triton.jit
def load_scales(part, place, inside, centre: tl.constexpr):
    """Load scales and offsets of the rows of words, […, 2, 2]. `place` counts words of four rows of a group."""
    scale = _four_halves(tl.load(part.scale + place, mask=inside, other=0))
    if part.offset is not None:
        offset = _four_halves(tl.load(part.offset + place, mask=inside, other=0))
    elif part.zero is not None:
        zero = tl.load(part.zero + place, mask=inside, other=0)
        zero = tl.join(tl.join(zero, zero >> 16), tl.join(zero >> 8, zero >> 24)) & 255
        offset = zero.to(tl.float32) * -scale
    else:
        offset = scale * -centre
    return scale, offset


@triton.jit
def _four_halves(quads):
    """Return […, 2, 2] float32 of the four float16 numbers in 64-bit words; [k, l] belongs to row 2k + l."""
    rows = tl.join(tl.join(quads, quads >> 32), tl.join(quads >> 16, quads >> 48))
    return rows.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
