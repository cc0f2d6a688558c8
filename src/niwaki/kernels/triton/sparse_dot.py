"""Pruned matrices (`sparse`, `sparse_tiles`) made dense in registers, tile by tile: for products of some tokens on
tensor cores, and to decode them.

A program of `_some` owns some rows and walks the columns: it loads values and places, puts every value into its column
by shifts that its index tells, and multiplies the tile. Per weight about three instructions whatever the number of
tokens. Codes are multiplied as they are, in steps within a group of columns; their scales come after the product.
Weights take the dtype of the inputs; sums are in float32. A bitmap is only decoded: on tensor cores it took 82 µs
(H100, 4096², 1 to 16 tokens), and decoding and multiplying it 46.

Floor: the bytes of places and values over the memory bandwidth; for `decode`, of the matrix that is written too.

Legend: N tokens, M tokens of a program, O outputs, R rows of a program, I inputs, B bytes of eight columns, T tiles of
32 rows, F groups of four columns, G groups of columns that share a scale.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.sparse import chunk, locate, set_values, signed_four, stack
from niwaki.kernels.types import CHUNK_BYTES, GpuRecord

TILED = "two_four_tiles"


class Tiles(NamedTuple):
    """How a product is spread over the chip."""

    rows: int  # of a program
    width: int  # bytes of eight columns at a time
    warps: int
    stages: int  # of loads in flight


# For up to so many tokens: for 16 the best of 34 measured on an H100 at 4096², 4096 × 11008 and 8192², for 32 of 39 at
# 4096².
TILES = {16: Tiles(16, 64, 2, 3), 32: Tiles(32, 32, 4, 3)}
DECODED = {"bitmap": (16, 32, 4), "two_four": (16, 32, 4), TILED: (32, 16, 4)}  # rows, bytes, warps
MAX_BLOCK_TOKENS = 32


def block_of(tokens: int) -> int:
    """Tokens of a program."""
    return min(max(int(triton.next_power_of_2(tokens)), 16), MAX_BLOCK_TOKENS)


def whole_steps(record: GpuRecord, tiles: Tiles) -> Tiles:
    """Narrowed until groups of columns hold whole steps."""
    while record.group and record.group % (8 * tiles.width):
        tiles = tiles._replace(width=tiles.width // 2)
    return tiles


def some_tokens(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, tiles: Tiles | None = None
) -> None:
    """out = x Wᵀ + bias in bfloat16 or float16, `x_NI` contiguous; two_four only; groups hold whole steps."""
    tokens, rows = out_NO.shape
    block_tokens = block_of(tokens)
    tiles = tiles or whole_steps(record, TILES[block_tokens])
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    assert record.layout == "two_four" and record.group % (8 * tiles.width) == 0
    _some[triton.cdiv(rows, tiles.rows), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        *_views(record),
        record.starts,
        record.ranks,
        record.scale,
        rows,
        tokens,
        columns=record.columns,
        layout=record.layout,
        bits=record.bits,
        group=record.group,
        block_tokens=block_tokens,
        block_rows=tiles.rows,
        block=tiles.width,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def decode(record: GpuRecord, first: int, out_RI: Tensor) -> None:
    """Writes rows [first, first + R) of the matrix, contiguous, in any float dtype; of tiles, `first` begins one."""
    assert out_RI.is_contiguous() and out_RI.shape[1] == record.columns
    assert record.layout != TILED or first % TILE == 0
    block_rows, block, warps = DECODED[record.layout]
    _decode[triton.cdiv(record.places.shape[1] if record.layout != TILED else record.columns // 8, block),
            triton.cdiv(len(out_RI), block_rows)](
        out_RI,
        *_views(record),
        record.starts,
        record.ranks,
        record.scale,
        record.rows,
        first,
        first + len(out_RI),
        columns=record.columns,
        layout=record.layout,
        bits=record.bits,
        group=record.group,
        block_rows=block_rows,
        block=block,
        num_warps=warps,
    )  # fmt: skip


def _views(record: GpuRecord) -> tuple[Tensor, Tensor]:
    """Places and values as the kernels load them."""
    places, values = record.places, record.values
    if record.layout == "bitmap" and places.shape[1] % CHUNK_BYTES == 0:
        return places.view(torch.int64), values
    if record.layout == "two_four" and record.bits == 4:
        return places, values.view(torch.int16)
    return places, values


@triton.jit(do_not_specialize=["tokens"])
def _some(
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
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """A program: some rows for some tokens."""
    width: tl.constexpr = (columns + 7) // 8
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    total = tl.zeros((block_tokens, block_rows), tl.float32)
    for step in tl.range(0, (width + block - 1) // block):
        column = step * (8 * block) + tl.arange(0, 8 * block)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        inputs = tl.load(x + token[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
        tile = _tile(places, values, starts, ranks, row, rows, step * block, width, layout, bits, block, x.dtype)
        if group > 0:
            share = _scales(scale, row, step * (8 * block) // group, rows, columns, layout, group)
            total += tl.dot(inputs, tl.trans(tile)) * share[None, :]
        else:
            total = tl.dot(inputs, tl.trans(tile), total)
    if scale is not None and group == 0:
        total *= _scales(scale, row, 0, rows, columns, layout, columns)[None, :]
    put(out, total, bias, token, row, tokens, rows)


@triton.jit
def put(out, total, bias, token, row, tokens, rows):
    """Sums [M, R] and the bias, to where rows of tokens lie."""
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    stored = (token < tokens)[:, None] & (row < rows)[None, :]
    place = token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["first", "last"])
def _decode(
    out,
    places,
    values,
    starts,
    ranks,
    scale,
    rows,
    first,
    last,
    columns: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """A program: some rows, some columns."""
    width: tl.constexpr = (columns + 7) // 8
    byte = tl.program_id(0) * block
    row = first + tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    tile = _tile(
        places, values, starts, ranks, row, rows, byte, width, layout, bits, block, tl.pointer_type(tl.float32)
    )
    column = byte * 8 + tl.arange(0, 8 * block)
    stored = (row < last)[:, None] & (column < columns)[None, :]
    if scale is not None:
        wide: tl.constexpr = group if group > 0 else columns
        tile *= _scales(scale, row[:, None], column[None, :] // wide, rows, columns, layout, wide)
    place = (row - first)[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + place, tile.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _scales(scale, row, number, rows, columns: tl.constexpr, layout: tl.constexpr, group: tl.constexpr):
    """Scales of rows for a group of columns, float32; those of tiles lie side by side for all rows."""
    groups: tl.constexpr = (columns + group - 1) // group
    if layout == "two_four_tiles":
        place = number * ((rows + 31) // 32 * 32) + row
    else:
        place = row.to(tl.int64) * groups + number
    return tl.load(scale + place, mask=(row < rows) & (number < groups), other=0.0).to(tl.float32)


@triton.jit
def _tile(
    places,
    values,
    starts,
    ranks,
    row,
    rows,
    byte,
    width: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    block: tl.constexpr,
    like: tl.constexpr,
):
    """Some rows, `block` bytes of columns from `byte` on, dense, without scales: [R, 8 · block] as `like` points to."""
    dtype: tl.constexpr = like.element_ty
    if layout == "two_four_tiles":
        tile = _tile_of_tiles(places, values, row, rows, byte, width, block, dtype)
    elif layout == "two_four":
        tile = _tile_of_pairs(places, values, row, rows, byte, width, bits, block, dtype)
    else:
        tile = _tile_of_bits(places, values, starts, ranks, row, rows, byte, width, bits, block, dtype)
    return tile


@triton.jit
def _tile_of_pairs(
    places, values, row, rows, byte, width: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, dtype
):
    """Of two values for four columns."""
    block_rows: tl.constexpr = row.shape[0]
    start = row.to(tl.int64)[:, None] * width
    near = byte + tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None] & (near < width)
    index = tl.load(places + start + near, mask=inside, other=0).to(tl.int32)
    if bits == 4:
        codes = tl.load(values + start + near, mask=inside, other=0).to(tl.int32)
        columns = _codes_of(index, index >> 2, codes, codes >> 4, dtype) + _codes_of(
            index >> 4, index >> 6, codes >> 8, codes >> 12, dtype
        )
    else:
        place = byte * 4 + tl.arange(0, 4 * block)[None, :]
        some = (row < rows)[:, None] & (place < 4 * width)
        found = tl.load(values + start * 4 + place, mask=some, other=0)
        if bits == 16:
            raw = found.to(tl.int16, bitcast=True)
        elif bits == 8:
            raw = found.to(tl.int16)
        else:
            raw = found.to(tl.int32, bitcast=True)
        even, odd = tl.split(tl.reshape(raw, (block_rows, block, 2, 2)))
        v_0, v_2 = tl.split(even)
        v_1, v_3 = tl.split(odd)
        kind: tl.constexpr = values.dtype.element_ty
        columns = _spread(index, v_0, v_1, bits, kind, dtype) + _spread(index >> 4, v_2, v_3, bits, kind, dtype)
    return tl.reshape(stack(columns, (block_rows, block), 8), (block_rows, 8 * block))


@triton.jit
def _spread(index, lower, upper, bits: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr):
    """The four columns of two values; those of 16 bits are shifted to their places in a word of 64 bits."""
    if bits == 32:
        none = tl.zeros_like(lower)
        i = index & 3
        j = index & 12
        d_0 = tl.where(i == 0, lower, none)
        d_1 = tl.where(i == 1, lower, tl.where(j == 4, upper, none))
        d_2 = tl.where(i == 2, lower, tl.where(j == 8, upper, none))
        d_3 = tl.where(j == 12, upper, none)
    else:
        word = (lower.to(tl.int64) & 0xFFFF) << ((index & 3) * 16).to(tl.int64)
        word |= (upper.to(tl.int64) & 0xFFFF) << ((index & 12) * 4).to(tl.int64)
        d_0 = word.to(tl.int16)
        d_1 = (word >> 16).to(tl.int16)
        d_2 = (word >> 32).to(tl.int16)
        d_3 = (word >> 48).to(tl.int16)
    return (
        _as_float(d_0, bits, kind, dtype),
        _as_float(d_1, bits, kind, dtype),
        _as_float(d_2, bits, kind, dtype),
        _as_float(d_3, bits, kind, dtype),
    )


@triton.jit
def _as_float(raw, bits: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr):
    """The number that integers of 16 bits (32 for float32) stand for."""
    return raw.to(tl.float32).to(dtype) if bits == 8 else raw.to(kind, bitcast=True).to(dtype)


@triton.jit
def _tile_of_bits(
    places, values, starts, ranks, row, rows, byte, width: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, dtype
):
    """Of a bitmap."""
    block_rows: tl.constexpr = row.shape[0]
    near = byte + tl.arange(0, block)[None, :] + tl.zeros((block_rows, 1), tl.int32)
    kept = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (near < width)
    index, bitmap = locate(chunk(places, ranks, kept, near, inside, width), tl.load(starts + kept), near)
    found = set_values(values, index, bitmap, bits)
    columns = ()
    for j in tl.static_range(8):
        columns = columns + (found[j].to(dtype),)
    return tl.reshape(stack(columns, (block_rows, block), 8), (block_rows, 8 * block))


@triton.jit
def _tile_of_tiles(places, values, row, rows, byte, width: tl.constexpr, block: tl.constexpr, dtype):
    """Of two 4-bit codes for four columns in tiles of 32 rows; `row` is one of them. All is loaded as it lies."""
    tile = tl.min(row, axis=0) // 32
    lane = tl.arange(0, 32)[None, :]
    near = byte + tl.arange(0, block)[:, None]
    inside = near < width
    base = tile.to(tl.int64) * (width * 32)
    index = tl.load(places + base + near * 32 + lane, mask=inside, other=0).to(tl.int32)
    front = tl.load(values + 2 * base + near * 64 + lane, mask=inside, other=0).to(tl.int32)
    back = tl.load(values + 2 * base + near * 64 + 32 + lane, mask=inside, other=0).to(tl.int32)
    i_0, i_1 = tl.split(tl.reshape(index, (block, 16, 2)))
    a_0, a_1 = tl.split(tl.reshape(front, (block, 16, 2)))
    b_0, b_1 = tl.split(tl.reshape(back, (block, 16, 2)))
    top = _codes_of(i_0, i_1, a_0, a_1, dtype) + _codes_of(i_0 >> 4, i_1 >> 4, b_0, b_1, dtype)
    i_0, i_1 = i_0 >> 2, i_1 >> 2
    low = _codes_of(i_0, i_1, a_0 >> 4, a_1 >> 4, dtype) + _codes_of(i_0 >> 4, i_1 >> 4, b_0 >> 4, b_1 >> 4, dtype)
    both = tl.join(stack(top, (block, 16), 8), stack(low, (block, 16), 8))
    return tl.reshape(tl.permute(both, (3, 1, 0, 2)), (32, 8 * block))


@triton.jit
def _codes_of(i_0, i_1, c_0, c_1, dtype):
    """The four columns of two codes: they are shifted to their places in a word of four codes first."""
    word = ((c_0 & 15) << ((i_0 & 3) * 4)) | ((c_1 & 15) << ((i_1 & 3) * 4))
    return (
        signed_four(word).to(dtype),
        signed_four(word >> 4).to(dtype),
        signed_four(word >> 8).to(dtype),
        signed_four(word >> 12).to(dtype),
    )
