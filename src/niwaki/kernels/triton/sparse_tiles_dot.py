"""Products of some tokens with two-four matrices of 4-bit codes in tiles (`sparse_tiles`), on tensor cores.

A program owns a tile of 32 rows, and every warp walks its own columns. At the end the sums of the warps are added,
always in the same order. A thread takes a byte of columns of two rows. It shifts the two codes of four columns to their
columns in a word of four codes. The word becomes four 16-bit floats without arithmetic: each code lies in the mantissa
of a power of two whose step is one. The sum of the inputs then takes off that power and the offset of 8 between signed
and unsigned codes.

Floor: the bytes of the tiles over the memory bandwidth, 3.125 bits per weight in groups of 128. A weight takes about
eight instructions for any number of tokens.

Legend: N tokens, M tokens of a program, O outputs, I inputs, B bytes of eight columns, S warps, R the 32 rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.bits import stack
from niwaki.kernels.triton.sparse_dot import SparseDotLaunch, block_of, put, whole_steps
from niwaki.kernels.triton.sparse_tiles import MULTIPROCESSORS
from niwaki.kernels.types import GpuRecord

# The bits of 2^p + 8 (twice in a word), and the number itself: p = 7 in bfloat16, 10 in float16.
BASES = {torch.bfloat16: (0x43084308, 136.0), torch.float16: (0x64086408, 1032.0)}
# With one program per multiprocessor, and with more. The width is that of a warp. More loads in flight leave less room
# for programs.
LAUNCH, MANY_LAUNCH = SparseDotLaunch(TILE, 16, 8, 1), SparseDotLaunch(TILE, 16, 4, 1)


def core_product(
    x_NI: Tensor, record: GpuRecord, bias_O: Tensor | None, out_NO: Tensor, launch: SparseDotLaunch | None = None
) -> None:
    """Write x Wᵀ + bias to `out_NO` in bfloat16 or float16, contiguous; groups hold whole steps."""
    tokens, rows = out_NO.shape
    block_tokens = block_of(tokens)
    launch = launch or whole_steps(record, LAUNCH if rows <= TILE * MULTIPROCESSORS else MANY_LAUNCH)
    assert x_NI.is_contiguous() and out_NO.is_contiguous() and x_NI.shape[1] == record.columns
    assert record.scale is not None and record.group % (8 * launch.width) == 0
    _cores[triton.cdiv(rows, TILE), triton.cdiv(tokens, block_tokens)](
        x_NI,
        out_NO,
        bias_O,
        record.places.view(torch.int16),
        record.values.view(torch.int16),
        record.scale,
        rows,
        tokens,
        columns=record.columns,
        group=record.group or record.columns,
        base_bits=BASES[x_NI.dtype][0],
        base=BASES[x_NI.dtype][1],
        block_tokens=block_tokens,
        block=launch.width,
        splits=launch.warps,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


@triton.jit(do_not_specialize=["tokens"])
def _cores(
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
    base_bits: tl.constexpr,
    base: tl.constexpr,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
):
    """Multiply a tile with some tokens."""
    width: tl.constexpr = columns // 8
    tile = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)
    stride = (rows + 31) // 32 * 32
    share = scale + tile * 32 + tl.arange(0, 32)[None, :]
    # One axis gives all loads the same layout: eight neighbouring units per thread, 16 bytes of columns per warp.
    unit = tl.arange(0, 16 * splits * block)
    places += tile * (width * 16)
    values += tile * (width * 32)
    split = tl.arange(0, splits)[:, None]
    lane = tl.arange(0, 8 * block)[None, None, :]
    total = tl.zeros((splits, block_tokens, 32), tl.float32)
    for step in tl.range(0, (width + block * splits - 1) // (block * splits)):
        first = step * (block * splits)
        column = first * 8 + split[:, :, None] * (8 * block) + lane
        some = (token < tokens)[None, :, None] & (column < columns)
        inputs = tl.load(x + token[None, :, None].to(tl.int64) * columns + column, mask=some, other=0.0)
        byte = first + unit // 16
        index = tl.load(places + byte * 16 + unit % 16, mask=byte < width, other=0).to(tl.int32)
        front = tl.load(values + byte * 32 + unit % 16, mask=byte < width, other=0).to(tl.int32)
        back = tl.load(values + byte * 32 + 16 + unit % 16, mask=byte < width, other=0).to(tl.int32)
        top = _biased(index, front, x.dtype, base_bits) + _biased(index >> 4, back, x.dtype, base_bits)
        low = _biased(index >> 2, front >> 4, x.dtype, base_bits) + _biased(index >> 6, back >> 4, x.dtype, base_bits)
        weight = tl.reshape(stack(top + low, unit.shape, 16), (splits, block, 16, 2, 8))
        weight = tl.reshape(tl.permute(weight, (0, 1, 4, 3, 2)), (splits, 8 * block, 32))
        sums = tl.sum(inputs.to(tl.float32), axis=2)
        here = tl.dot(inputs, weight) - base * sums[:, :, None]
        number = (first + split * block) * 8 // group
        factor = tl.load(share + number * stride, mask=number * group < columns, other=0.0).to(tl.float32)
        total += here * factor[:, None, :]
    put(out, tl.sum(total, axis=0), bias, token, tl.program_id(0) * 32 + tl.arange(0, 32), tokens, rows)


@triton.jit
def _biased(index, codes, like: tl.constexpr, power: tl.constexpr):
    """Return four columns of two codes, the second in the upper bytes, all plus 2^p + 8."""
    word = ((codes & 15) << ((index & 3) * 4)) | (((codes >> 8) & 15) << (((index >> 8) & 3) * 4))
    apart = word | (word << 12)  # columns 0 and 1 in both halves, 2 and 3 eight bits above them
    front = (apart & 0x000F000F) ^ power
    back = ((apart >> 8) & 0x000F000F) ^ power
    dtype: tl.constexpr = like.element_ty
    return (
        front.to(tl.int16).to(dtype, bitcast=True),
        (front >> 16).to(tl.int16).to(dtype, bitcast=True),
        back.to(tl.int16).to(dtype, bitcast=True),
        (back >> 16).to(tl.int16).to(dtype, bitcast=True),
    )
