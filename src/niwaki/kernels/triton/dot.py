"""Products of some tokens with matrices stored as bit planes, on tensor cores: two Triton launches a layer.

The first lays the inputs out as the second reads them, in chunks of 16 bytes of columns: per chunk and lane a tile
[tokens, 16], in memory one after another, with the sum of every chunk's inputs. In the second a program owns 32 rows
and every warp walks chunks of its own; the sums of the warps are added at the end, always in the same order.

A code becomes a 16-bit float without arithmetic: its bits are put into the mantissa of a power of two that is large
enough for a step of one, so that the product yields (2^p + code) · x, exactly, and 2^p · Σx is taken off with the
offsets, in float32. Eight bits are two products, whose steps are 1 and 16.

Floor: the bytes of the planes over the memory bandwidth; per weight a shift, a logical operation and half a packing,
whatever the number of tokens, against one multiply-add a token in `triton_planes`.

Legend: N tokens, M tokens of a program, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes
of eight columns, J the 8 lanes (columns of a byte), S warps, each with a chunk of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from niwaki.kernels.triton.planes import TILE, form, interleave, load_scales, pointers
from niwaki.kernels.types import PlanePart

CHUNK = tl.constexpr(16)  # bytes of columns: the depth of one product of tensor cores
# The bits of 2^p with a step of 1, and of 2^(p + 4) with a step of 16: p = 7 in bfloat16, 10 in float16.
BASES = {torch.bfloat16: (0x4300, 0x4500, 7), torch.float16: (0x6400, 0x7400, 10)}


class Config(NamedTuple):
    """How a product is spread over the chip."""

    warps: int  # of a program; each walks chunks of its own
    stages: int  # of inputs in flight


def default_config(rows: int, block_tokens: int) -> Config:
    """A choice by shape: two warps leave room for more programs, where there are programs enough."""
    wide = block_tokens > 16 and rows > 256 * TILE
    return Config(warps=2 if wide else 4, stages=2 if block_tokens > 32 else 3)


def some_tokens(
    x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, out_NO: Tensor, config: Config | None = None
) -> None:
    """out = x Wᵀ + bias in bfloat16 or float16; parts as of `PlanePart.for_gpu`, their groups whole chunks."""
    tokens, rows = out_NO.shape
    block_tokens = min(max(triton.next_power_of_2(tokens), 16), 64)
    config = config or default_config(rows, block_tokens)
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
        form_0=form(parts, 0),
        form_1=form(parts, 1),
        block_tokens=block_tokens,
        num_warps=4,
    )
    _some[triton.cdiv(rows, TILE), blocks](
        spread,
        sums,
        out_NO,
        bias_O,
        rows,
        tokens,
        *pointers(parts, 0)[:4],
        *pointers(parts, 1)[:4],
        form_0=form(parts, 0),
        form_1=form(parts, 1),
        base=BASES[x_NI.dtype],
        block_tokens=block_tokens,
        splits=config.warps,
        num_warps=config.warps,
        num_stages=config.stages,
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
    form_0: tl.constexpr,
    form_1: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """A program: one chunk for some tokens, [8 lanes, tokens, 16 bytes]; what lies outside is zero."""
    chunks_0: tl.constexpr = (form_0[0] + 8 * CHUNK - 1) // (8 * CHUNK)
    chunk = tl.program_id(0)
    token = tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)[None, :, None]
    lane = tl.arange(0, 8)[:, None, None]
    byte = tl.arange(0, CHUNK)[None, None, :]
    if chunk < chunks_0:
        column = _columns(places_0, chunk * CHUNK + byte, lane, form_0)
    else:
        column = _columns(places_1, (chunk - chunks_0) * CHUNK + byte, lane, form_1)
    inside = (column >= 0) & (token < tokens)
    value = tl.load(x + token.to(tl.int64) * inputs + column, mask=inside, other=0.0)
    place = tl.program_id(1) * tl.num_programs(0) + chunk
    tile = (lane * block_tokens + tl.arange(0, block_tokens)[None, :, None]) * CHUNK + byte
    tl.store(spread + place.to(tl.int64) * (8 * block_tokens * CHUNK) + tile, value)
    total = tl.sum(tl.sum(value.to(tl.float32), axis=2), axis=0)
    tl.store(sums + place * block_tokens + tl.arange(0, block_tokens), total)


@triton.jit
def _columns(places, byte, lane, form: tl.constexpr):
    """Which input a lane of a byte is, −1 for none."""
    width: tl.constexpr = (form[0] + 7) // 8
    if places is not None:
        return tl.load(places + lane * width + byte, mask=byte < width, other=-1)
    column = byte * 8 + lane
    return tl.where(column < form[0], column, -1)


@triton.jit(do_not_specialize=["tokens"])
def _some(
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
    form_0: tl.constexpr,
    form_1: tl.constexpr,
    base: tl.constexpr,
    block_tokens: tl.constexpr,
    splits: tl.constexpr,
):
    """A program: a tile of rows for some tokens."""
    chunks_0: tl.constexpr = (form_0[0] + 8 * CHUNK - 1) // (8 * CHUNK)
    chunks_1: tl.constexpr = (form_1[0] + 8 * CHUNK - 1) // (8 * CHUNK)
    tile = tl.program_id(0)
    first = tl.program_id(1) * (chunks_0 + chunks_1)
    total = tl.zeros((splits, block_tokens, 32), tl.float32)
    part_0 = (planes_0, scale_0, offset_0, zero_0)
    total = _add_part(total, spread, sums, first, part_0, tile, rows, form_0, base, block_tokens, splits)
    if form_1[0] > 0:
        part_1 = (planes_1, scale_1, offset_1, zero_1)
        first += chunks_0
        total = _add_part(total, spread, sums, first, part_1, tile, rows, form_1, base, block_tokens, splits)
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
    form: tl.constexpr,
    base: tl.constexpr,
    block_tokens: tl.constexpr,
    splits: tl.constexpr,
):
    """Adds one part to the sums [warps, tokens, 32 rows]; `first` is its first chunk in `spread` and `sums`."""
    bits: tl.constexpr = form[1]
    group_bytes: tl.constexpr = form[2]
    width: tl.constexpr = (form[0] + 7) // 8
    chunks: tl.constexpr = (width + CHUNK - 1) // CHUNK
    planes = part[0] + tile.to(tl.int64) * (bits * width * 8)
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
            total = _add_scaled(total, here, high, inputs, part, group[:, None], inside, tile, rows, form, base)
            here = tl.zeros_like(here)
            high = tl.zeros_like(high)
            inputs = tl.zeros_like(inputs)
    if group_bytes == 0:
        total = _add_scaled(
            total, here, high, inputs, part, tl.zeros_like(split)[:, None], split >= 0, tile, rows, form, base
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
    """total += (base + code · step) · x for up to four planes, those from `plane` on."""
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
    """Up to four planes as [warps, 16 bytes, 32 rows] whose low bytes hold codes side by side (`triton_planes`)."""
    byte = tl.reshape(chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], (splits * CHUNK,))
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = byte[:, None] < width
    plane_0 = tl.load(planes + place, mask=inside, other=0)
    found = (_rows(plane_0, splits),)
    if bits > 1:
        plane_1 = tl.load(planes + width * 8 + place, mask=inside, other=0)
        even, odd = interleave(plane_0, plane_1, 1, 0x55555555)
        found = (_rows(even, splits), _rows(odd, splits))
        if bits > 2:
            plane_2 = tl.load(planes + 2 * width * 8 + place, mask=inside, other=0)
            plane_3 = tl.zeros_like(plane_2)
            if bits > 3:
                plane_3 = tl.load(planes + 3 * width * 8 + place, mask=inside, other=0)
            even_23, odd_23 = interleave(plane_2, plane_3, 1, 0x55555555)
            word_0, word_2 = interleave(even, even_23, 2, 0x33333333)
            word_1, word_3 = interleave(odd, odd_23, 2, 0x33333333)
            found = (_rows(word_0, splits), _rows(word_1, splits), _rows(word_2, splits), _rows(word_3, splits))
    return found


@triton.jit
def _rows(words, splits: tl.constexpr):
    """Words of four rows as [warps, 16 bytes, 32 rows]: the byte of a row is the lowest one."""
    apart = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.reshape(apart, (splits, CHUNK, 32)).to(tl.int16)


@triton.jit
def _add_scaled(total, here, high, inputs, part, group, inside, tile, rows, form: tl.constexpr, base: tl.constexpr):
    """total += scale · codes + offset · inputs, the powers of two taken off; `group` is [warps, 1]."""
    bits: tl.constexpr = form[1]
    splits: tl.constexpr = total.shape[0]
    quads = (rows + 3) // 4
    quad = tile * 8 + tl.arange(0, 8)[None, :]
    mask = inside[:, None] & (quad < quads)
    scale, offset = load_scales(part, group * quads + quad, mask, form[3])
    scale = tl.reshape(scale, (splits, 1, 32))
    offset = tl.reshape(offset, (splits, 1, 32))
    codes = here
    taken: tl.constexpr = 1 << base[2]
    if bits > 4:
        codes += high
        return total + scale * codes + (offset - (17 * taken) * scale) * inputs[:, :, None]
    return total + scale * codes + (offset - taken * scale) * inputs[:, :, None]
