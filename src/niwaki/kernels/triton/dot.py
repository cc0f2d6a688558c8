"""Products of some tokens with matrices stored as bit planes, on tensor cores: two Triton launches per layer.

The first launch rearranges the inputs into chunks of 16 bytes of columns, in the order in which the second one reads
them. Every chunk and lane is a tile [tokens, 16], and every chunk has the sum of its inputs. In the second launch a
program owns 32 rows, and every warp walks its own chunks. At the end the sums of the warps are added, always in the
same order.

A code becomes a 16-bit float without arithmetic. Its bits go into the mantissa of a power of two whose step is one.
The product yields (2^p + code) · x, exactly, and 2^p · Σx is subtracted with the offsets, in float32. Eight bits are
two products with steps of 1 and 16.

Floor: the bytes of the planes over the memory bandwidth. A weight takes a shift, a logical operation and half a packing
for any number of tokens, against one multiply-add per token in `triton.planes`.

Legend: N tokens, M tokens of a program, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes
of eight columns, J the 8 lanes (columns of a byte), S warps, each with its own chunks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.bits import PlanePointers, interleave, load_scales, pointers, shape_of
from niwaki.kernels.types import PlanePart

CHUNK = tl.constexpr(16)  # bytes of columns: the depth of one tensor-core product
# The bits of 2^p with a step of 1, and of 2^(p + 4) with a step of 16: p = 7 in bfloat16, 10 in float16.
BASES = {torch.bfloat16: (0x4300, 0x4500, 7), torch.float16: (0x6400, 0x7400, 10)}


class PlaneDotLaunch(NamedTuple):
    """Launch of the tensor-core product with bit planes."""

    warps: int  # per program; each walks its own chunks
    stages: int  # of inputs in flight


def default_launch(rows: int, block_tokens: int) -> PlaneDotLaunch:
    """Return the launch for a shape. With many programs, two warps each leave room for more programs."""
    wide = block_tokens > 16 and rows > 256 * TILE
    return PlaneDotLaunch(warps=2 if wide else 4, stages=2 if block_tokens > 32 else 3)


def core_product(
    x_NI: Tensor,
    parts: Sequence[PlanePart],
    bias_O: Tensor | None,
    out_NO: Tensor,
    launch: PlaneDotLaunch | None = None,
) -> None:
    """Write x Wᵀ + bias to `out_NO` in bfloat16 or float16; parts of `PlanePart.for_gpu`, groups of whole chunks."""
    tokens, rows = out_NO.shape
    block_tokens = min(max(triton.next_power_of_2(tokens), 16), 64)
    launch = launch or default_launch(rows, block_tokens)
    blocks = triton.cdiv(tokens, block_tokens)
    chunks = [triton.cdiv(part.columns, 8 * CHUNK.value) for part in parts] + [0]
    total = sum(chunks)
    spread = x_NI.new_empty(blocks * total * 8 * block_tokens * CHUNK.value)
    sums = x_NI.new_empty(blocks * total * block_tokens, dtype=torch.float32)
    _spread[total, blocks](
        x_NI,
        spread,
        sums,
        tokens,
        pointers(parts, 0)[4],
        pointers(parts, 1)[4],
        inputs=x_NI.shape[1],
        shape_0=shape_of(parts, 0),
        shape_1=shape_of(parts, 1),
        block_tokens=block_tokens,
        num_warps=4,
    )
    _cores[triton.cdiv(rows, TILE), blocks](
        spread,
        sums,
        out_NO,
        bias_O,
        rows,
        tokens,
        *pointers(parts, 0)[:4],
        *pointers(parts, 1)[:4],
        shape_0=shape_of(parts, 0),
        shape_1=shape_of(parts, 1),
        base=BASES[x_NI.dtype],
        block_tokens=block_tokens,
        splits=launch.warps,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


@triton.jit(do_not_specialize=["tokens"])
def _spread(
    x,
    spread,
    sums,
    tokens,
    places_0,
    places_1,
    inputs: tl.constexpr,
    shape_0: tl.constexpr,
    shape_1: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Copy one chunk of some tokens as [8 lanes, tokens, 16 bytes], with zeros outside the columns and tokens."""
    chunks_0: tl.constexpr = (shape_0.columns + 8 * CHUNK - 1) // (8 * CHUNK)
    chunk = tl.program_id(0)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)[None, :, None]
    lane = tl.arange(0, 8)[:, None, None]
    byte = tl.arange(0, CHUNK)[None, None, :]
    if chunk < chunks_0:
        column = _columns(places_0, chunk * CHUNK + byte, lane, shape_0)
    else:
        column = _columns(places_1, (chunk - chunks_0) * CHUNK + byte, lane, shape_1)
    inside = (column >= 0) & (token < tokens)
    value = tl.load(x + token.to(tl.int64) * inputs + column, mask=inside, other=0.0)
    place = tl.program_id(1) * tl.num_programs(0) + chunk
    tile = (lane * block_tokens + tl.arange(0, block_tokens)[None, :, None]) * CHUNK + byte
    tl.store(spread + place.to(tl.int64) * (8 * block_tokens * CHUNK) + tile, value)
    total = tl.sum(tl.sum(value.to(tl.float32), axis=2), axis=0)
    tl.store(sums + place * block_tokens + tl.arange(0, block_tokens), total)


@triton.jit
def _columns(places, byte, lane, shape: tl.constexpr):
    """Return the input of a lane of a byte, −1 for none."""
    width: tl.constexpr = (shape.columns + 7) // 8
    if places is not None:
        return tl.load(places + lane * width + byte, mask=byte < width, other=-1)
    column = byte * 8 + lane
    return tl.where(column < shape.columns, column, -1)


@triton.jit(do_not_specialize=["tokens"])
def _cores(
    spread,
    sums,
    out,
    bias,
    rows,
    tokens,
    planes_0,
    scale_0,
    offset_0,
    zero_0,
    planes_1,
    scale_1,
    offset_1,
    zero_1,
    shape_0: tl.constexpr,
    shape_1: tl.constexpr,
    base: tl.constexpr,
    block_tokens: tl.constexpr,
    splits: tl.constexpr,
):
    """Multiply a tile of rows with some tokens."""
    chunks_0: tl.constexpr = (shape_0.columns + 8 * CHUNK - 1) // (8 * CHUNK)
    chunks_1: tl.constexpr = (shape_1.columns + 8 * CHUNK - 1) // (8 * CHUNK)
    tile = tl.program_id(0)
    first = tl.program_id(1) * (chunks_0 + chunks_1)
    total = tl.zeros((splits, block_tokens, 32), tl.float32)
    part_0 = PlanePointers(planes_0, scale_0, offset_0, zero_0, None)
    total = _add_part(total, spread, sums, first, part_0, tile, rows, shape_0, base, block_tokens, splits)
    if shape_1.columns > 0:
        part_1 = PlanePointers(planes_1, scale_1, offset_1, zero_1, None)
        first += chunks_0
        total = _add_part(total, spread, sums, first, part_1, tile, rows, shape_1, base, block_tokens, splits)
    y = tl.sum(total, axis=0)
    row = tile * 32 + tl.arange(0, 32)[None, :]
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)[:, None]
    if bias is not None:
        y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit
def _add_part(
    total,
    spread,
    sums,
    first,
    part,
    tile,
    rows,
    shape: tl.constexpr,
    base: tl.constexpr,
    block_tokens: tl.constexpr,
    splits: tl.constexpr,
):
    """Add one part to the sums [warps, tokens, 32 rows]. `first` is its first chunk in `spread` and `sums`."""
    bits: tl.constexpr = shape.bits
    group_bytes: tl.constexpr = shape.group // 8
    width: tl.constexpr = (shape.columns + 7) // 8
    chunks: tl.constexpr = (width + CHUNK - 1) // CHUNK
    planes = part.planes + tile.to(tl.int64) * (bits * width * 8)
    split = tl.arange(0, splits)
    token = tl.arange(0, block_tokens)
    here = tl.zeros((splits, block_tokens, 32), tl.float32)
    high = here
    inputs = tl.zeros((splits, block_tokens), tl.float32)
    for step in tl.range(0, (chunks + splits - 1) // splits):
        chunk = step * splits + split
        own = first + chunk
        inside = chunk < chunks
        inputs += tl.load(sums + own[:, None] * block_tokens + token[None, :], mask=inside[:, None], other=0.0)
        tiles = spread + own.to(tl.int64)[:, None, None] * (8 * block_tokens * CHUNK)
        tiles += token[None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
        here = _add_products(here, tiles, planes, chunk, width, chunks, 0, bits if bits < 4 else 4, base, splits)
        if bits > 4:
            high = _add_products(high, tiles, planes, chunk, width, chunks, 4, bits - 4, base, splits)
        if group_bytes > 0:
            group = chunk * CHUNK // group_bytes
            total = _add_scaled(total, here, high, inputs, part, group[:, None], inside, tile, rows, shape, base)
            here = tl.zeros_like(here)
            high = tl.zeros_like(high)
            inputs = tl.zeros_like(inputs)
    if group_bytes == 0:
        total = _add_scaled(
            total, here, high, inputs, part, tl.zeros_like(split)[:, None], split >= 0, tile, rows, shape, base
        )
    return total


@triton.jit
def _add_products(
    total,
    tiles,
    planes,
    chunk,
    width: tl.constexpr,
    chunks: tl.constexpr,
    plane: tl.constexpr,
    bits: tl.constexpr,
    base: tl.constexpr,
    splits: tl.constexpr,
):
    """Add (base + code · step) · x of up to four planes, from plane number `plane` on."""
    block_tokens: tl.constexpr = total.shape[1]
    field: tl.constexpr = bits if bits < 3 else 4
    power: tl.constexpr = base[0] if plane == 0 else base[1]
    x_dtype: tl.constexpr = tiles.dtype.element_ty
    words = _load_words(planes + plane * (width * 8), chunk, width, bits, splits)
    inside = (chunk < chunks)[:, None, None]
    for j in tl.static_range(8):
        x = tl.load(tiles + j * (block_tokens * CHUNK), mask=inside, other=0.0)
        code = (words[j % field] >> (field * (j // field))) & ((1 << field) - 1)
        weight = (code | power).to(tl.int16).to(x_dtype, bitcast=True)
        total = tl.dot(x, weight, total)
    return total


@triton.jit
def _load_words(planes, chunk, width: tl.constexpr, bits: tl.constexpr, splits: tl.constexpr):
    """Load up to four planes as [warps, 16 bytes, 32 rows]. The low bytes hold fields as in `bits.load_fields`."""
    byte = tl.reshape(chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], (splits * CHUNK,))
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = byte[:, None] < width
    plane_0 = tl.load(planes + place, mask=inside, other=0)
    words = (_rows(plane_0, splits),)
    if bits > 1:
        plane_1 = tl.load(planes + width * 8 + place, mask=inside, other=0)
        even, odd = interleave(plane_0, plane_1, 1, 0x55555555)
        words = (_rows(even, splits), _rows(odd, splits))
        if bits > 2:
            plane_2 = tl.load(planes + 2 * width * 8 + place, mask=inside, other=0)
            plane_3 = tl.zeros_like(plane_2)
            if bits > 3:
                plane_3 = tl.load(planes + 3 * width * 8 + place, mask=inside, other=0)
            even_23, odd_23 = interleave(plane_2, plane_3, 1, 0x55555555)
            word_0, word_2 = interleave(even, even_23, 2, 0x33333333)
            word_1, word_3 = interleave(odd, odd_23, 2, 0x33333333)
            words = (_rows(word_0, splits), _rows(word_1, splits), _rows(word_2, splits), _rows(word_3, splits))
    return words


@triton.jit
def _rows(words, splits: tl.constexpr):
    """Return words of four rows as [warps, 16 bytes, 32 rows], with the byte of a row as the lowest one."""
    apart = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.reshape(apart, (splits, CHUNK, 32)).to(tl.int16)


@triton.jit
def _add_scaled(total, here, high, inputs, part, group, inside, tile, rows, shape: tl.constexpr, base: tl.constexpr):
    """Add scale · codes + offset · inputs without the powers of two. `group` is [warps, 1]."""
    bits: tl.constexpr = shape.bits
    splits: tl.constexpr = total.shape[0]
    quads = (rows + 3) // 4
    quad = tile * 8 + tl.arange(0, 8)[None, :]
    mask = inside[:, None] & (quad < quads)
    scale, offset = load_scales(part, group * quads + quad, mask, shape.centre)
    scale = tl.reshape(scale, (splits, 1, 32))
    offset = tl.reshape(offset, (splits, 1, 32))
    codes = here
    taken: tl.constexpr = 1 << base[2]
    if bits > 4:
        codes += high
        return total + scale * codes + (offset - (17 * taken) * scale) * inputs[:, :, None]
    return total + scale * codes + (offset - taken * scale) * inputs[:, :, None]
