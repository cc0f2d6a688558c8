"""Decoding of matrices stored as bit planes, for products of many tokens: one Triton launch for rows of all parts.

The parts stand side by side in the result, [rows, C₀ + C₁], and the caller reorders the inputs to match. So every part
is written as whole runs of columns. Writes to the true columns would be single elements of two bytes, from two programs
into the same sectors. Inputs are far fewer than weights.

A program owns a tile of 32 rows and 16 bytes of columns per warp of one part. A thread reads four neighbouring words of
four rows × eight columns and isolates codes (`bits.isolate`). It stores the eight columns of a row at once: 16 bytes of
bf16. No value moves between threads, and a warp writes two runs of 256 bytes. Stores are narrower if the columns of the
matrix, or of its first part, are not a multiple of eight.

The decoding is exact. A code times a float16 scale has at most 19 bits, and so has −zero · scale. Only their sum in
float32 is rounded, as in `QuantizedColumns.decode`, and then the result.

Floor: the bytes of the planes and of the result (two per weight) over the memory bandwidth. The product then reads the
result again. At 4 bits a weight takes 6.5 instructions, at 8 bits 10: a quarter of the floor on an H100.

Legend: R rows to decode, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns, G groups of columns
that share a scale, W the 8 words of a tile (word w holds rows 4w … 4w + 3).
"""

# ruff: noqa: RUF005 (Triton knows no starred tuples)

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from niwaki.formats.quantized import TILE
from niwaki.kernels.triton.bits import (
    INPUT_POWER,
    PlanePointers,
    isolate,
    load_fields,
    load_levels,
    pointers,
    shape_of,
)
from niwaki.kernels.types import PlanePart

WARP_BYTES = tl.constexpr(16)  # of columns and 32 rows: one read of a warp, four words per thread
STORE_BYTES = 16  # the widest store of a thread
WARPS = 4  # per program


def decode_planes(parts: Sequence[PlanePart], rows: int, first: int, out_RC: Tensor, warps: int = WARPS) -> None:
    """Write rows [first, first + R) of `rows` to `out_RC`, all parts of `PlanePart.for_gpu` side by side.

    The output is contiguous, in any float dtype. `first` is the first row of a tile. The last row ends a tile or the
    matrix.
    """
    last = first + len(out_RC)
    assert first % TILE == 0 and (last % TILE == 0 or last == rows) and last <= rows
    assert out_RC.is_contiguous() and out_RC.shape[1] == sum(part.columns for part in parts)
    blocks = sum(triton.cdiv(part.columns, 8 * WARP_BYTES.value * warps) for part in parts)
    _decode[blocks, triton.cdiv(len(out_RC), TILE)](
        out_RC,
        rows,
        first // TILE,
        *pointers(parts, 0)[:4],
        *pointers(parts, 1)[:4],
        shape_0=shape_of(parts, 0),
        shape_1=shape_of(parts, 1),
        together=min(STORE_BYTES // out_RC.element_size(), 8),
        warps=warps,
        num_warps=warps,
    )


@triton.jit(do_not_specialize=["first"])
def _decode(
    out,
    rows,
    first,
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
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """Decode a tile of rows and some bytes of columns of one part. Programs of the first part come first."""
    columns: tl.constexpr = shape_0.columns + shape_1.columns
    blocks_0: tl.constexpr = (shape_0.columns + 8 * WARP_BYTES * warps - 1) // (8 * WARP_BYTES * warps)
    block = tl.program_id(0)
    tile = first + tl.program_id(1)
    out += tl.program_id(1).to(tl.int64) * (32 * columns)
    if block < blocks_0:
        part_0 = PlanePointers(planes_0, scale_0, offset_0, zero_0, None)
        _decode_block(out, columns, tile, block, part_0, rows, shape_0, together, warps)
    elif shape_1.columns > 0:
        part_1 = PlanePointers(planes_1, scale_1, offset_1, zero_1, None)
        _decode_block(out + shape_0.columns, columns, tile, block - blocks_0, part_1, rows, shape_1, together, warps)


@triton.jit
def _decode_block(
    out,
    stride: tl.constexpr,
    tile,
    block,
    part,
    rows,
    shape: tl.constexpr,
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """Decode one block of bytes of a part, storing `together` columns at a time; rows are `stride` elements apart."""
    columns: tl.constexpr = shape.columns
    bits: tl.constexpr = shape.bits
    group: tl.constexpr = shape.group
    width: tl.constexpr = (columns + 7) // 8
    low_field: tl.constexpr = bits if bits < 3 else 4
    high_field: tl.constexpr = bits - 4 if bits - 4 < 3 else 4
    byte = block * (WARP_BYTES * warps) + tl.arange(0, WARP_BYTES * warps)
    planes = part.planes + tile.to(tl.int64) * (bits * width * 8)
    low = load_fields(planes, byte, width, bits if bits < 4 else 4)
    high = low
    if bits > 4:
        high = load_fields(planes + 4 * width * 8, byte, width, bits - 4)
    unit, offset = _levels(part, byte, 0, tile, rows, columns, group, shape.centre)
    weights = ()
    for j in tl.static_range(8):
        code = isolate(low, j, low_field) * (2.0 ** (INPUT_POWER - low_field * (j // low_field)))
        if bits > 4:
            code += isolate(high, j, high_field) * (2.0 ** (INPUT_POWER + 4 - high_field * (j // high_field)))
        if group % 8 > 0:  # columns of a byte lie in several groups
            unit, offset = _levels(part, byte, j, tile, rows, columns, group, shape.centre)
        weights = weights + ((code * unit + offset).to(out.dtype.element_ty),)
    _store(out, weights, tile, block, rows, columns, stride, together, warps)


@triton.jit
def _levels(
    part,
    byte,
    lane: tl.constexpr,
    tile,
    rows,
    columns: tl.constexpr,
    group: tl.constexpr,
    centre: tl.constexpr,
):
    """Load scales and offsets of the rows of every word for a lane of every byte: [bytes or 1, 8 words, 2, 2]."""
    quads = (rows + 3) // 4
    place = tile * 8 + tl.arange(0, 8)[None, :]
    inside = place < quads
    if group > 0:
        column = byte[:, None] * 8 + lane
        inside = inside & (column < columns)
        place += column // group * quads
    return load_levels(part, place, inside, centre)


@triton.jit
def _store(
    out,
    weights,
    tile,
    block,
    rows,
    columns: tl.constexpr,
    stride: tl.constexpr,
    together: tl.constexpr,
    warps: tl.constexpr,
):
    """Store eight lanes of [bytes, 8 words, 2, 2] in chunks of `together` columns, in the order of the threads."""
    even = tl.join(tl.join(weights[0], weights[4]), tl.join(weights[2], weights[6]))
    odd = tl.join(tl.join(weights[1], weights[5]), tl.join(weights[3], weights[7]))
    byte_chunks: tl.constexpr = 8 // together
    chunks: tl.constexpr = warps * WARP_BYTES * 32 * byte_chunks
    value = tl.reshape(tl.join(even, odd), (warps, WARP_BYTES, 2, 4, 4, byte_chunks, together))
    # [chunk of a byte, row of a word, word of a thread; warp, byte, half of the words; columns]
    value = tl.reshape(tl.permute(value, (5, 4, 3, 0, 1, 2, 6)), (chunks, together))
    chunk = tl.arange(0, chunks)
    thread = chunk % (warps * WARP_BYTES * 2)
    store = chunk // (warps * WARP_BYTES * 2)
    row = thread % 2 * 16 + store % 4 * 4 + store // 4 % 4
    column = (block * (warps * WARP_BYTES) + thread // 2) * 8 + store // 16 * together
    row = row[:, None]
    column = column[:, None] + tl.arange(0, together)[None, :]
    tl.store(out + row * stride + column, value, mask=(tile * 32 + row < rows) & (column < columns))
