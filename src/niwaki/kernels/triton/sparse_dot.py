"""Products of some tokens with pruned matrices (`sparse`, `sparse_tiles`) on tensor cores, and their decoding.

Both make tiles of the matrix dense in registers. A program of `_cores` owns some rows and walks the columns. It loads
values and places, shifts every value to its column by its index, and multiplies the tile. A weight takes about three
instructions for any number of tokens. Codes are multiplied without their scales, in steps within a group of columns,
and the products are scaled. Weights take the dtype of the inputs; sums are in float32. A bitmap is only decoded: on
tensor cores it took 82 µs (H100, 4096², 1 to 16 tokens), decoded and multiplied 46.

Floor: the bytes of places and values over the memory bandwidth; for `decode` also the bytes of the written matrix.

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
from niwaki.formats.sparse_tiles import LAYOUT
from niwaki.kernels.triton.bits import load_chunk, locate, set_values, signed_four, stack
from niwaki.kernels.types import CHUNK_BYTES, GpuRecord


class SparseDotLaunch(NamedTuple):
    """Launch of the tensor-core product with a pruned matrix."""

    rows: int  # per program
    width: int  # bytes of eight columns at a time
    warps: int
    stages: int  # of loads in flight


# By max tokens of a program: for 16 the best of 34 measured on an H100 at 4096², 4096 × 11008 and 8192², for 32 the
# best of 39 at 4096².
LAUNCHES = {16: SparseDotLaunch(16, 64, 2, 3), 32: SparseDotLaunch(32, 32, 4, 3)}
DECODE_BLOCKS = {"bitmap": (16, 32, 4), "two_four": (16, 32, 4), LAYOUT: (32, 16, 4)}  # rows, bytes, warps
MAX_BLOCK_TOKENS = 32


def block_of(tokens: int) -> int:
    """Return the tokens per program."""
    return min(max(int(triton.next_power_of_2(tokens)), 16), MAX_BLOCK_TOKENS)


def whole_steps(record: GpuRecord, launch: SparseDotLaunch) -> SparseDotLaunch:
    """Narrow a launch until groups of columns hold whole steps."""
    while record.group and record.group % (8 * launch.width):
        launch = launch._replace(width=launch.width // 2)
    return launch


def core_product(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, launch: SparseDotLaunch | None = None
) -> None:
    """Write x Wᵀ + bias to `out_NO` in bfloat16 or float16, contiguous; two_four only, groups of whole steps."""
    tokens, rows = out_NO.shape
    block_tokens = block_of(tokens)
    launch = launch or whole_steps(record, LAUNCHES[block_tokens])
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    assert record.layout == "two_four" and record.group % (8 * launch.width) == 0
    _cores[triton.cdiv(rows, launch.rows), triton.cdiv(tokens, block_tokens)](
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
        block_rows=launch.rows,
        block=launch.width,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def decode(record: GpuRecord, first: int, out_RI: Tensor) -> None:
    """Write rows [first, first + R) of the matrix, contiguous, in any float dtype.

    With tiles, `first` is the first row of a tile.
    """
    assert out_RI.is_contiguous() and out_RI.shape[1] == record.columns
    assert record.layout != LAYOUT or first % TILE == 0
    block_rows, block, warps = DECODE_BLOCKS[record.layout]
    _decode[triton.cdiv(record.places.shape[1] if record.layout != LAYOUT else record.columns // 8, block),
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
    """Return places and values as the kernels load them."""
    places, values = record.places, record.values
    if record.layout == "bitmap" and places.shape[1] % CHUNK_BYTES == 0:
        return places.view(torch.int64), values
    if record.layout == "two_four" and record.bits == 4:
        return places, values.view(torch.int16)
    return places, values


@triton.jit(do_not_specialize=["tokens"])
def _cores(
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
    """Multiply some rows with some tokens."""
    width: tl.constexpr = (columns + 7) // 8
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    total = tl.zeros((block_tokens, block_rows), tl.float32)
    for step in tl.range(0, (width + block - 1) // block):
        column = step * (8 * block) + tl.arange(0, 8 * block)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        inputs = tl.load(x + token[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
        tile = _dense(places, values, starts, ranks, row, rows, step * block, width, layout, bits, block, x.dtype)
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
    """Store the sums [M, R] plus bias at the rows of their tokens."""
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
    """Decode some rows and columns."""
    width: tl.constexpr = (columns + 7) // 8
    byte = tl.program_id(0) * block
    row = first + tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    tile = _dense(
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
    """Load the scales of rows for a group of columns in float32. With tiles, the scales of all rows are neighbours."""
    groups: tl.constexpr = (columns + group - 1) // group
    if layout == "two_four_tiles":
        place = number * ((rows + 31) // 32 * 32) + row
    else:
        place = row.to(tl.int64) * groups + number
    return tl.load(scale + place, mask=(row < rows) & (number < groups), other=0.0).to(tl.float32)


@triton.jit
def _dense(
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
    """Return some rows and `block` bytes of columns from `byte` on, dense, without scales: [R, 8 · block].

    The dtype is the one that `like` points to.
    """
    dtype: tl.constexpr = like.element_ty
    if layout == "two_four_tiles":
        tile = _dense_tiles(places, values, row, rows, byte, width, block, dtype)
    elif layout == "two_four":
        tile = _dense_pairs(places, values, row, rows, byte, width, bits, block, dtype)
    else:
        tile = _dense_bitmap(places, values, starts, ranks, row, rows, byte, width, bits, block, dtype)
    return tile


@triton.jit
def _dense_pairs(places, values, row, rows, byte, width: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, dtype):
    """Return the dense tile of two values for four columns."""
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
        loaded = tl.load(values + start * 4 + place, mask=some, other=0)
        if bits == 16:
            raw = loaded.to(tl.int16, bitcast=True)
        elif bits == 8:
            raw = loaded.to(tl.int16)
        else:
            raw = loaded.to(tl.int32, bitcast=True)
        even, odd = tl.split(tl.reshape(raw, (block_rows, block, 2, 2)))
        v_0, v_2 = tl.split(even)
        v_1, v_3 = tl.split(odd)
        kind: tl.constexpr = values.dtype.element_ty
        columns = _spread(index, v_0, v_1, bits, kind, dtype) + _spread(index >> 4, v_2, v_3, bits, kind, dtype)
    return tl.reshape(stack(columns, (block_rows, block), 8), (block_rows, 8 * block))


@triton.jit
def _spread(index, lower, upper, bits: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr):
    """Return the four columns of two values. Values of 16 bits are shifted to their columns in a 64-bit word."""
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
    """Return the number that integers of 16 bits (32 for float32) stand for."""
    return raw.to(tl.float32).to(dtype) if bits == 8 else raw.to(kind, bitcast=True).to(dtype)


@triton.jit
def _dense_bitmap(
    places, values, starts, ranks, row, rows, byte, width: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, dtype
):
    """Return the dense tile of a bitmap."""
    block_rows: tl.constexpr = row.shape[0]
    near = byte + tl.arange(0, block)[None, :] + tl.zeros((block_rows, 1), tl.int32)
    kept = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (near < width)
    index, bitmap = locate(load_chunk(places, ranks, kept, near, inside, width), tl.load(starts + kept), near)
    column_values = set_values(values, index, bitmap, bits)
    columns = ()
    for j in tl.static_range(8):
        columns = columns + (column_values[j].to(dtype),)
    return tl.reshape(stack(columns, (block_rows, block), 8), (block_rows, 8 * block))


@triton.jit
def _dense_tiles(places, values, row, rows, byte, width: tl.constexpr, block: tl.constexpr, dtype):
    """Return the dense tile of a stored tile: two 4-bit codes for four columns of 32 rows. Loads keep its order."""
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
    """Return the four columns of two codes, which are first shifted to their columns in a word of four codes."""
    word = ((c_0 & 15) << ((i_0 & 3) * 4)) | ((c_1 & 15) << ((i_1 & 3) * 4))
    return (
        signed_four(word).to(dtype),
        signed_four(word >> 4).to(dtype),
        signed_four(word >> 8).to(dtype),
        signed_four(word >> 12).to(dtype),
    )
