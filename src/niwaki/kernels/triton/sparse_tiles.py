"""Products of a few tokens with two-four matrices of 4-bit codes in tiles (`sparse_tiles`) on a GPU, by multiply-adds.

A program owns a tile of 32 rows and walks all columns. A thread takes a byte of columns of four rows at a time.
That is a word of places, two words of codes (next to those of its neighbours), and eight inputs. Eight threads share
the inputs. Every code
selects its input by two selections on the bits of its index. A code becomes a float in place: one logical operation
puts it into the mantissa of 2²³, and one subtraction follows. The codes of half of the rows are then 16 times too
large, and their scales undo that.

Floor: the bytes of the tiles over the memory bandwidth, 3.125 bits per weight in groups of 128. A code takes about nine
instructions per token. On an H100 that is a little longer than the floor.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, T tiles, G groups of columns that share a scale. Word q
of the 8 in a byte of columns of a tile holds rows 2q, 2q + 1, 16 + 2q and 17 + 2q.
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.bits import stack
from niwaki.kernels.types import GpuRecord, TileLaunch

# By max tokens of a program: the best of 12 measured on an H100 at 4096², with one program per multiprocessor. The
# others are for more programs, measured at 11008 × 4096.
LAUNCHES = {1: TileLaunch(16, 4), 2: TileLaunch(16, 4), 4: TileLaunch(16, 1)}
MANY_LAUNCHES = {1: TileLaunch(16, 4), 2: TileLaunch(8, 2), 4: TileLaunch(8, 2)}
MULTIPROCESSORS = 132
MAX_BLOCK_TOKENS = 4  # per program


def fma_product(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, launch: TileLaunch | None = None
) -> None:
    """Write x Wᵀ + bias to `out_NO`. Inputs and outputs are contiguous, in any float dtype; sums are in float32."""
    tokens, rows = out_NO.shape
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    assert record.scale is not None
    block_tokens = min(triton.next_power_of_2(tokens), MAX_BLOCK_TOKENS)
    launch = launch or (LAUNCHES if rows <= TILE * MULTIPROCESSORS else MANY_LAUNCHES)[block_tokens]
    _fma[triton.cdiv(rows, TILE), triton.cdiv(tokens, block_tokens)](
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
        block=4 * launch.warps,
        unroll=launch.unroll,
        num_warps=launch.warps,
    )


@triton.jit(do_not_specialize=["tokens"])
def _fma(
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
    """Multiply a tile with some tokens. Every token has four sums [block · 8 words]: the rows of a word."""
    width: tl.constexpr = columns // 8
    packed: tl.constexpr = x.dtype.element_ty == tl.int64  # four inputs in the dtype of the output
    tile = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block_tokens
    x += token.to(tl.int64) * (columns // 4 if packed else columns)
    here = tokens - token
    places += tile * (width * 8)
    values += tile * (width * 16)
    scale += tile * 32
    stride = (rows + 31) // 32 * 32
    lane = tl.arange(0, 8 * block)  # one axis gives all loads the same layout
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
                # Tokens after the last one repeat it and are not stored.
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
    """Load the eight inputs of a byte in float32."""
    inputs = ()
    if packed:
        for i in tl.static_range(2):
            words = tl.load(x + byte * 2 + i, mask=inside, other=0)
            for j in tl.static_range(4):
                inputs = inputs + ((words >> (16 * j)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
    else:
        for j in tl.static_range(8):
            inputs = inputs + (tl.load(x + byte * 8 + j, mask=inside, other=0.0).to(tl.float32),)
    return inputs


@triton.jit
def _floats(words):
    """Return the codes of a group of four columns as floats: [2 · k + j] for value j of row k of a word.

    Words hold codes with inverted sign bits. The codes in the upper half of a byte come out 16 times too large.
    """
    codes = ()
    for k in tl.static_range(4):
        for j in tl.static_range(2):
            here = words >> (16 * (k // 2) + 8 * j)
            number = ((here & (15 << (4 * (k % 2)))) | 0x4B000000).to(tl.float32, bitcast=True)
            codes = codes + (number - (8388616.0 + 120.0 * (k % 2)),)
    return codes


@triton.jit
def _sum_pair(codes, index, inputs, k: tl.constexpr, part: tl.constexpr):
    """Return the sum of the two products of row k of a word with the first or second four columns, unscaled."""
    x_0 = inputs[4 * part]
    x_1 = inputs[4 * part + 1]
    x_2 = inputs[4 * part + 2]
    x_3 = inputs[4 * part + 3]
    at: tl.constexpr = 16 * (k // 2) + 2 * (k % 2) + 4 * part
    lower = tl.where((index & (2 << at)) != 0, x_2, tl.where((index & (1 << at)) != 0, x_1, x_0))
    upper = tl.where(((index >> (at + 8)) & 1) != 0, x_3, x_2)
    upper = tl.where(((index >> (at + 9)) & 1) != 0, upper, x_1)
    return codes[8 * part + 2 * k] * lower + codes[8 * part + 2 * k + 1] * upper
