"""Products of a few tokens with two-four matrices of 4-bit codes in tiles of 32 rows (`sparse_tiles`) on a GPU.

A program owns a tile and walks all columns. A thread takes a byte of columns of four rows at a time: a word of places,
two words of codes, side by side in memory with those of its neighbours, and eight inputs, which eight threads share.
Every code picks its input by two selections on bits of its index. A code becomes a float where it lies, by one logical
operation that puts it into the mantissa of 2²³ and one subtraction; the codes of half of the rows are then 16 times too
large, which is undone with their scales.

Floor: the bytes of the tiles over the memory bandwidth, 3.125 bits a weight in groups of 128. About nine instructions a
code and token: on an H100 a little longer than that.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, T tiles, G groups of columns that share a scale. Word q
of the 8 of a tile's byte of columns holds rows 2q, 2q + 1, 16 + 2q and 17 + 2q.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.sparse import stack
from niwaki.kernels.types import GpuRecord


class Tiles(NamedTuple):
    """How a product is spread over the chip."""

    warps: int  # of a program; each takes four bytes of columns at a time
    unroll: int  # bytes of one thread in flight


# For up to so many tokens: the best of 12 measured on an H100 at 4096², a program for every multiprocessor, and with
# more programs at 11008 × 4096.
TILES = {1: Tiles(16, 4), 2: Tiles(16, 4), 4: Tiles(16, 1)}
MANY_TILES = {1: Tiles(16, 4), 2: Tiles(8, 2), 4: Tiles(8, 2)}
MULTIPROCESSORS = 132
BLOCK_TOKENS = 4  # of a program


def few_tokens(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, tiles: Tiles | None = None
) -> None:
    """out = x Wᵀ + bias. `x_NI` contiguous, of any float dtype, as `out_NO`; sums in float32."""
    tokens, rows = out_NO.shape
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    assert record.scale is not None
    block_tokens = min(triton.next_power_of_2(tokens), BLOCK_TOKENS)
    tiles = tiles or (TILES if rows <= TILE * MULTIPROCESSORS else MANY_TILES)[block_tokens]
    _few[triton.cdiv(rows, TILE), triton.cdiv(tokens, block_tokens)](
        x_NI.view(torch.int64) if x_NI.element_size() == 2 else x_NI,
        out_NO,
        bias_O,
        record.places.view(torch.int32),
        record.values.view(torch.int32),
        record.scale,
        rows,
        tokens,
        columns=record.columns,
        group=record.group or record.columns,
        block_tokens=block_tokens,
        block=4 * tiles.warps,
        unroll=tiles.unroll,
        num_warps=tiles.warps,
    )


@triton.jit(do_not_specialize=["tokens"])
def _few(
    x,
    out,
    bias,
    places,
    values,
    scale,
    rows,
    tokens,
    columns: tl.constexpr,
    group: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """A program: a tile for some tokens. Sums are [block · 8 words], for every token four: the rows of a word."""
    width: tl.constexpr = columns // 8
    packed: tl.constexpr = x.dtype.element_ty == tl.int64  # four inputs of the output's dtype
    tile = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * (columns // 4 if packed else columns)
    here = tokens - token
    places += tile * (width * 8)
    values += tile * (width * 16)
    scale += tile * 32
    stride = (rows + 31) // 32 * 32
    lane = tl.arange(0, 8 * block)  # one axis, so that all loads lie alike
    word = lane % 8
    total = ()
    for _ in tl.static_range(4 * block_tokens):
        total = total + (tl.zeros((8 * block,), tl.float32),)
    for step in tl.range(0, (width + block * unroll - 1) // (block * unroll)):
        for u in tl.static_range(unroll):
            byte = (step * unroll + u) * block + lane // 8
            inside = byte < width
            index = tl.load(places + byte * 8 + word, mask=inside, other=0)
            front = tl.load(values + byte * 16 + word, mask=inside, other=0) ^ -0x77777778  # 0x88888888
            back = tl.load(values + byte * 16 + 8 + word, mask=inside, other=0) ^ -0x77777778
            codes = _floats(front) + _floats(back)
            share = scale + byte * 8 // group * stride + 2 * word
            new = ()
            for m in tl.static_range(block_tokens):
                # Tokens beyond the last one repeat it; they are not stored.
                own = x + tl.minimum(m, here - 1) * (columns // 4 if packed else columns)
                inputs = _load_inputs(own, byte, inside, packed, out.dtype.element_ty)
                for k in tl.static_range(4):
                    part = _sum_pair(codes, index, inputs, k, 0) + _sum_pair(codes, index, inputs, k, 1)
                    factor = tl.load(share + 16 * (k % 2) + k // 2, mask=inside, other=0.0).to(tl.float32)
                    new = new + (total[4 * m + k] + factor * part,)
            total = new
    y = tl.sum(tl.reshape(stack(total, (8 * block,), 4 * block_tokens), (block, 8, 4 * block_tokens)), axis=0)
    number = tl.arange(0, 4 * block_tokens)[None, :]
    row = tl.program_id(0) * 32 + 2 * tl.arange(0, 8)[:, None] + 16 * (number % 2) + number // 2 % 2
    m = number // 4
    y *= tl.where(number % 2 == 1, 0.0625, 1.0)  # undoes the 16 of `_floats`
    stored = (row < rows) & (m < here)
    if bias is not None:
        y += tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + (token + m).to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _load_inputs(x, byte, inside, packed: tl.constexpr, dtype: tl.constexpr):
    """The eight inputs of a byte in float32."""
    found = ()
    if packed:
        for i in tl.static_range(2):
            words = tl.load(x + byte * 2 + i, mask=inside, other=0)
            for j in tl.static_range(4):
                found = found + ((words >> (16 * j)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
    else:
        for j in tl.static_range(8):
            found = found + (tl.load(x + byte * 8 + j, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _floats(words):
    """The codes of a group of four columns as floats, [2 · k + j] for value j of row k (k: 2 · (rows apart) + half).

    Words hold codes with their sign bit turned over. Those of the upper half of a byte are 16 times too large.
    """
    found = ()
    for k in tl.static_range(4):
        for j in tl.static_range(2):
            here = words >> (16 * (k // 2) + 8 * j)
            number = ((here & (15 << (4 * (k % 2)))) | 0x4B000000).to(tl.float32, bitcast=True)
            found = found + (number - (8388616.0 + 120.0 * (k % 2)),)
    return found


@triton.jit
def _sum_pair(codes, index, inputs, k: tl.constexpr, part: tl.constexpr):
    """The two products of row k of a word with the first or second four columns, in units of codes."""
    x_0 = inputs[4 * part]
    x_1 = inputs[4 * part + 1]
    x_2 = inputs[4 * part + 2]
    x_3 = inputs[4 * part + 3]
    at: tl.constexpr = 16 * (k // 2) + 2 * (k % 2) + 4 * part
    lower = tl.where((index & (2 << at)) != 0, x_2, tl.where((index & (1 << at)) != 0, x_1, x_0))
    upper = tl.where(((index >> (at + 8)) & 1) != 0, x_3, x_2)
    upper = tl.where(((index >> (at + 9)) & 1) != 0, upper, x_1)
    return codes[8 * part + 2 * k] * lower + codes[8 * part + 2 * k + 1] * upper
